"""A round's training against hand-written loops, and what moves and what does not."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.eval.score import evaluate
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.api import Trained
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import AdapterSection, Spec
from fedloom.core.privacy.gaussian import deviation, longest
from fedloom.core.schema import LORA, Array, Role
from fedloom.proto.messages import upload_schema
from tests.client.rounds import ALL, Everyone, assignment, changed, start


def sampled(entropy: Seeded, count: int, rate: float) -> npt.NDArray[np.int64]:
    return np.flatnonzero(entropy.uniform(count) < rate)


def plain_loop(model: AdapterModel, rows: Rows, spec: Spec, values: dict[str, Array], name: str) -> dict[str, Array]:
    """SGD with momentum by hand, the whole Poisson sample in one batch."""
    model.load(values)
    parameters = model.trainable(ALL)
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    entropy, train = Seeded(spec.run.seed, 0, key), spec.train
    encoded = encode(rows, model.tokenizer, spec.model.max_length)
    velocity = [torch.zeros_like(p) for p in parameters]
    for _ in range(train.steps):
        batch = collate(encoded, sampled(entropy, len(rows), train.sampling_rate), model.tokenizer.pad_token_id)
        loss = F.cross_entropy(model.logits(batch), batch["labels"])
        with torch.no_grad():
            for p, v, g in zip(parameters, velocity, torch.autograd.grad(loss, parameters), strict=True):
                v.mul_(train.momentum).add_(g)
                p.sub_(train.learning_rate * v)
    after = model.read(model.schema)
    return {name: after[name] - values[name] for name in values}


def test_plain_training_equals_a_hand_written_loop(
    tiny_model: AdapterModel, rows: Rows, plain: Spec, policy: Policy
) -> None:
    spec = changed(plain, train={"momentum": 0.5})
    values = start(tiny_model)
    expected = plain_loop(tiny_model, rows, spec, values, "site-a")

    first = Trainer(tiny_model, rows, spec, policy, None).train("run", assignment(), values)
    again = Trainer(tiny_model, rows, spec, policy, None).train("run", assignment(), values)

    assert first.charge is None
    assert max(np.abs(value).max() for value in expected.values()) > 1e-2
    for name, value in expected.items():
        np.testing.assert_allclose(first.delta[name], value, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(first.delta[name], again.delta[name])


def test_plain_sampling_differs_by_round_and_client(
    tiny_model: AdapterModel, rows: Rows, plain: Spec, policy: Policy
) -> None:
    other = policy.model_copy(update={"client": policy.client.model_copy(update={"name": "site-b"})})
    values = start(tiny_model)

    deltas = [
        Trainer(tiny_model, rows, plain, site, None).train("run", assignment(round=number), values).delta
        for site, number in ((policy, 0), (policy, 1), (other, 0))
    ]

    head = next(name for name in values if name.endswith("classifier.weight"))
    assert len({delta[head].tobytes() for delta in deltas}) == 3


def private_loop(model: AdapterModel, rows: Rows, spec: Spec, values: dict[str, Array]) -> dict[str, Array]:
    """DP-SGD by hand (Abadi et al., CCS 2016, Algorithm 1): one backward pass per example."""
    model.load(values)
    parameters = model.trainable(ALL)
    entropy, train, privacy = Seeded(7, 0), spec.train, spec.privacy
    assert privacy.noise_multiplier is not None
    encoded = encode(rows, model.tokenizer, spec.model.max_length)
    for _ in range(train.steps):
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for i in sampled(entropy, len(rows), train.sampling_rate):
            one = collate(encoded, np.array([i]), model.tokenizer.pad_token_id)
            loss = F.cross_entropy(model.logits(one), one["labels"])
            flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]).double()
            total += flat * min(1.0, privacy.clip_norm / float(flat.norm()))
        total += (
            torch.from_numpy(entropy.normal(deviation(privacy.noise_multiplier), len(total)) / longest(len(total)))
            * privacy.clip_norm
        )
        step = (total * train.learning_rate / (train.sampling_rate * 40)).float()
        with torch.no_grad():
            for p, part in zip(parameters, torch.split(step, [p.numel() for p in parameters]), strict=True):
                p.sub_(part.view_as(p))
    after = model.read(model.schema)
    return {name: after[name] - values[name] for name in values}


def test_private_training_equals_a_hand_written_loop(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    values = start(tiny_model)
    expected = private_loop(tiny_model, rows, spec, values)

    trainer = Trainer(tiny_model, rows, spec, policy, ledger, entropy_for=lambda number: Seeded(7, number))
    delta = trainer.train("run", assignment(), values).delta

    for name, value in expected.items():
        np.testing.assert_allclose(delta[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("private", [True, False])
def test_the_microbatch_does_not_change_the_result(
    private: bool, tiny_model: AdapterModel, rows: Rows, spec: Spec, plain: Spec, policy: Policy, ledger: Ledger
) -> None:
    values = start(tiny_model)

    deltas = [
        Trainer(
            tiny_model,
            rows,
            changed(spec if private else plain, train={"microbatch": size}),
            policy,
            ledger if private else None,
            entropy_for=lambda number: Seeded(7, number),
        )
        .train("run", assignment(), values)
        .delta
        for size in (1, 4, 64)
    ]

    for name in values:
        for delta in deltas[1:]:
            np.testing.assert_allclose(delta[name], deltas[0][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize(
    ("adapter", "roles"),
    [
        (AdapterSection(rank=4), frozenset({Role.LORA_B})),
        (AdapterSection(rank=4), frozenset({Role.LORA_A, Role.HEAD})),
        (AdapterSection(kind="bias"), frozenset({Role.BIAS})),
        (AdapterSection(kind="head"), frozenset({Role.HEAD})),
    ],
    ids=["B", "A+head", "bias", "head"],
)
def test_only_the_roles_asked_for_move(
    private: bool,
    adapter: AdapterSection,
    roles: frozenset[str],
    build_model: Callable[[AdapterSection], AdapterModel],
    rows: Rows,
    spec: Spec,
    plain: Spec,
    policy: Policy,
    ledger: Ledger,
) -> None:
    model = build_model(adapter)
    values = start(model)
    model.load(values)
    moving = {id(slot.parameter) for slot in model.slots.values() if slot.spec.role in roles}
    state = [*model.model.named_parameters(), *model.model.named_buffers()]
    before = {name: tensor.detach().clone() for name, tensor in state}

    trainer = Trainer(model, rows, spec if private else plain, policy, ledger if private else None)
    delta = trainer.train("run", assignment(roles), values).delta

    model.schema.select(roles).check(delta)
    for name, tensor in state:
        assert torch.equal(tensor, before[name]) == (id(tensor) not in moving), name


def test_delta_plus_broadcast_is_what_the_model_holds(
    tiny_model: AdapterModel, rows: Rows, plain: Spec, policy: Policy
) -> None:
    values = start(tiny_model)

    delta = Trainer(tiny_model, rows, plain, policy, None).train("run", assignment(), values).delta

    for name, value in tiny_model.read(tiny_model.schema).items():
        assert delta[name].dtype == np.float32
        np.testing.assert_allclose(values[name] + delta[name], value, rtol=0, atol=1e-7)


def test_personal_roles_are_kept_and_never_sent(
    tiny_model: AdapterModel, rows: Rows, plain: Spec, policy: Policy
) -> None:
    trainer = Trainer(tiny_model, rows, plain, policy, None)
    order = assignment(personal=frozenset({Role.HEAD}))
    kept = tiny_model.schema.select([Role.HEAD])

    first = trainer.train("run", order, start(tiny_model))
    mine = tiny_model.read(kept)
    frozen = replace(order, train=frozenset({Role.LORA_B, Role.HEAD}), local={"learning_rate": 1e-9})
    trainer.train("run", frozen, start(tiny_model, seed=6))

    tiny_model.schema.select(LORA).check(first.delta)
    for name, value in tiny_model.read(kept).items():
        np.testing.assert_allclose(value, mine[name], atol=1e-6)


def test_personal_values_never_reach_another_client_of_the_same_model(
    tiny_model: AdapterModel, rows: Rows, plain: Spec, policy: Policy
) -> None:
    other = policy.model_copy(update={"client": policy.client.model_copy(update={"name": "site-b"})})
    order = assignment(personal=frozenset({Role.HEAD}), broadcast_roles=LORA)
    values = {name: value for name, value in start(tiny_model).items() if "classifier" not in name}
    alone = Trainer(tiny_model, rows, plain, other, None).train("run", order, values).delta

    Trainer(tiny_model, rows, plain, policy, None).train("run", order, values)
    after = Trainer(tiny_model, rows, plain, other, None).train("run", order, values).delta

    for name, value in alone.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon", "galore"])
@pytest.mark.parametrize("private", [True, False])
def test_rows_beyond_the_rank_stay_zero(
    private: bool,
    optimizer: str,
    tiny_model: AdapterModel,
    rows: Rows,
    spec: Spec,
    plain: Spec,
    policy: Policy,
    ledger: Ledger,
) -> None:
    options = {"galore": {"projection_rank": 3}}.get(optimizer, {})
    chosen = changed(spec if private else plain, train={"optimizer": optimizer, "learning_rate": 0.05, **options})
    trainer = Trainer(tiny_model, rows, chosen, policy, ledger if private else None)
    order = assignment(rank=2)

    delta = trainer.train("run", order, start(tiny_model, rank=2)).delta

    upload_schema(tiny_model.schema, order).check(delta)
    whole = tiny_model.read(tiny_model.schema)
    for pair in tiny_model.schema.pairs:
        assert np.abs(delta[pair.a]).max() > 0
        assert np.abs(delta[pair.b]).max() > 0
        assert not whole[pair.a][2:].any()
        assert not whole[pair.b][:, 2:].any()


@pytest.mark.parametrize("private", [True, False])
def test_proximal_mu_pulls_toward_the_start(
    private: bool, tiny_model: AdapterModel, rows: Rows, spec: Spec, plain: Spec, policy: Policy, ledger: Ledger
) -> None:
    chosen = changed(spec if private else plain, train={"learning_rate": 0.2, "steps": 6})
    values = start(tiny_model)

    def distance(mu: float) -> float:
        trainer = Trainer(
            tiny_model, rows, chosen, policy, ledger if private else None, entropy_for=lambda _: Seeded(3)
        )
        delta = trainer.train("run", assignment(local={"proximal_mu": mu}), values).delta
        return float(np.sqrt(sum(np.square(value).sum() for value in delta.values())))

    free, held = distance(0.0), distance(3.0)

    assert 0 < held < 0.8 * free


def test_the_proximal_term_is_its_gradient(tiny_model: AdapterModel, rows: Rows, plain: Spec, policy: Policy) -> None:
    # Without a data gradient, w - start shrinks by 1 - lr * mu a step; with one, two steps on every example of
    # rate lr obey w2 = w1 - lr * (g(w1) + mu * (w1 - w0)).
    values, mu, rate = start(tiny_model), 2.0, 0.1

    def deltas(steps: int, mu: float, begin: dict[str, Array]) -> dict[str, Array]:
        chosen = changed(plain, train={"steps": steps, "learning_rate": rate, "proximal_mu": mu})
        trainer = Trainer(tiny_model, rows, chosen, policy, None, entropy_for=lambda _: Everyone())
        return trainer.train("run", assignment(), begin).delta

    first = deltas(1, mu, values)
    second = deltas(1, 0.0, {name: values[name] + first[name] for name in values})

    for name, value in deltas(2, mu, values).items():
        np.testing.assert_allclose(value, first[name] * (1 - rate * mu) + second[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("private", [True, False])
def test_clients_that_share_a_model_do_not_disturb_each_other(
    private: bool, tiny_model: AdapterModel, rows: Rows, spec: Spec, plain: Spec, policy: Policy, ledger: Ledger
) -> None:
    chosen = spec if private else plain
    halves = {"site-a": rows.take(np.arange(20)), "site-b": rows.take(np.arange(20, 40))}
    orders = [assignment(personal=frozenset({Role.HEAD}), round=number, rank=4 - 2 * number) for number in (0, 1)]
    values = [start(tiny_model), start(tiny_model, seed=6, rank=2)]

    def trainers() -> dict[str, Trainer]:
        sites = {
            name: policy.model_copy(update={"client": policy.client.model_copy(update={"name": name})})
            for name in halves
        }
        return {
            name: Trainer(
                tiny_model,
                halves[name],
                chosen,
                site,
                ledger if private else None,
                entropy_for=lambda number, name=name: Seeded(number, len(name), ord(name[-1])),  # type: ignore[misc]
            )
            for name, site in sites.items()
        }

    separate: dict[str, list[Trained]] = {
        name: [trainer.train(f"{name}-apart", order, begin) for order, begin in zip(orders, values, strict=True)]
        for name, trainer in trainers().items()
    }
    interleaved: dict[str, list[Trained]] = {name: [] for name in halves}
    shared = trainers()
    for order, begin in zip(orders, values, strict=True):
        for name, trainer in shared.items():
            interleaved[name].append(trainer.train(f"{name}-together", order, begin))

    for name in halves:
        for one, other in zip(separate[name], interleaved[name], strict=True):
            assert one.delta.keys() == other.delta.keys()
            for key in one.delta:
                np.testing.assert_array_equal(one.delta[key], other.delta[key])


def test_evaluation_counts_right_answers(tiny_model: AdapterModel, rows: Rows) -> None:
    encoded = encode(rows, tiny_model.tokenizer, 16)
    batch = collate(encoded, np.arange(40), tiny_model.tokenizer.pad_token_id)
    with torch.no_grad():
        scores = tiny_model.logits(batch)

    score = evaluate(tiny_model, encoded, batch=7)

    assert score.examples == 40
    assert score.accuracy == float((scores.argmax(1) == batch["labels"]).double().mean())
    assert score.loss == pytest.approx(float(F.cross_entropy(scores, batch["labels"])), rel=1e-5)


def test_a_broadcast_without_a_correction_is_trained_on_the_pretrained_weights(
    tiny_model: AdapterModel, rows: Rows, plain: Spec, policy: Policy
) -> None:
    """Whoever trained before on this model, for another client or in an earlier round, may have left one."""
    trainer = Trainer(tiny_model, rows, plain, policy, None, entropy_for=lambda round: Seeded(3, round))
    values = start(tiny_model)
    corrected = tiny_model.schema.with_base(2)
    factors = {s.name: np.ones(s.shape, np.float32) for s in corrected.tensors if s.name not in values}
    order = assignment(base_rank=2, broadcast_roles=corrected.roles)

    clean = trainer.train("run", assignment(), values).delta
    other = trainer.train("run", order, {**values, **factors}).delta
    again = trainer.train("run", assignment(), values).delta

    assert any(not np.array_equal(clean[name], other[name]) for name in clean)
    assert all(np.array_equal(clean[name], again[name]) for name in clean)
