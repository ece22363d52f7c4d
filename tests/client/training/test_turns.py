"""Tensors that take turns within a round: what rests neither moves nor counts, and the charge is that of any step."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import AdapterSection, Spec
from fedloom.core.privacy.accounting import Spend
from fedloom.core.privacy.gaussian import deviation, longest
from fedloom.core.schema import Array, Role
from tests.client.rounds import ALL, Everyone, assignment, changed, start

TURNS = (Role.LORA_B, Role.LORA_A)
CYCLE = (frozenset({Role.LORA_B, Role.HEAD}), frozenset({Role.LORA_A, Role.HEAD}))


def alternating_loop(model: AdapterModel, rows: Rows, spec: Spec, values: dict[str, Array]) -> dict[str, Array]:
    """DP-SGD by hand, a backward pass for each example, on the tensors of one turn in each step; or without privacy."""
    model.load(values)
    entropy, train, privacy = Seeded(7, 0), spec.train, spec.privacy
    encoded = encode(rows, model.tokenizer, spec.model.max_length)
    for step in range(train.steps):
        parameters = model.trainable(CYCLE[step % 2])
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        sample = np.flatnonzero(entropy.uniform(len(rows)) < train.sampling_rate)
        for i in sample:
            one = collate(encoded, np.array([i]), model.tokenizer.pad_token_id)
            loss = F.cross_entropy(model.logits(one), one["labels"])
            flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]).double()
            total += flat * (min(1.0, privacy.clip_norm / float(flat.norm())) if privacy.enabled else 1.0)
        divisor = float(len(sample))
        if privacy.enabled:
            assert privacy.noise_multiplier is not None
            units = entropy.normal(deviation(privacy.noise_multiplier), len(total))
            total += torch.from_numpy(units / longest(len(total))) * privacy.clip_norm
            divisor = train.sampling_rate * 40
        with torch.no_grad():
            parts = torch.split((total * train.learning_rate / divisor).float(), [p.numel() for p in parameters])
            for p, part in zip(parameters, parts, strict=True):
                p.sub_(part.view_as(p))
    after = model.read(model.schema)
    return {name: after[name] - values[name] for name in values}


@pytest.mark.parametrize("private", [True, False])
def test_a_round_of_turns_equals_a_hand_written_loop(
    private: bool, tiny_model: AdapterModel, rows: Rows, spec: Spec, plain: Spec, policy: Policy, ledger: Ledger
) -> None:
    """Also its clip norm, that of one factor and the head, and the noise, as many values as move."""
    chosen = changed(spec if private else plain, train={"steps": 5}, privacy={"clip_norm": 0.05})
    values = start(tiny_model)
    expected = alternating_loop(tiny_model, rows, chosen, values)
    book = ledger if private else None

    trainer = Trainer(tiny_model, rows, chosen, policy, book, entropy_for=lambda number: Seeded(7, number))
    delta = trainer.train("run", assignment(turns=TURNS), values).delta

    for name, value in expected.items():
        np.testing.assert_allclose(delta[name], value, rtol=1e-4, atol=1e-5)  # values of up to 1, in float32
        assert np.abs(value).max() > 1e-4
    if private:
        assert [charge.spend for charge in ledger.charges()] == [Spend(0.3, 1.0, 5)]


@pytest.mark.parametrize("private", [True, False])
def test_what_rests_keeps_every_bit_whatever_moves_it_otherwise(
    private: bool, tiny_model: AdapterModel, rows: Rows, spec: Spec, plain: Spec, policy: Policy, ledger: Ledger
) -> None:
    """One step is B's: neither noise, nor momentum, nor FedProx's pull, nor the filter moves A in it."""
    options = {"steps": 1, "momentum": 0.9, "proximal_mu": 0.5, "smoothing": True}
    chosen = changed(spec if private else plain, train=options)
    order = assignment(turns=TURNS)

    trainer = Trainer(tiny_model, rows, chosen, policy, ledger if private else None)
    delta = trainer.train("run", order, start(tiny_model)).delta

    for spec_ in tiny_model.schema.tensors:
        assert delta[spec_.name].any() == (spec_.role != Role.LORA_A), spec_.name


def test_a_factor_at_rest_takes_nothing_of_the_clip_norm(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    """B is large, and with it the gradient on A: where A counts, B hardly moves; where it rests, B has all of C."""
    one = changed(spec, train={"steps": 1}, privacy={"clip_norm": 1e-3})
    values = {n: v * 20 if n.endswith("lora_B.weight") else v for n, v in start(tiny_model).items()}

    def moved(number: int, **fields: object) -> float:
        trainer = Trainer(tiny_model, rows, one, policy, ledger, entropy_for=lambda _: Everyone())
        delta = trainer.train(f"run-{number}", assignment(ALL - {Role.HEAD}, **fields), values).delta
        b = tiny_model.schema.names(Role.LORA_B)
        return float(np.sqrt(sum(np.square(delta[name]).sum() for name in b)))

    together, alone = moved(0), moved(1, turns=TURNS)

    assert alone > 3 * together


def test_turns_and_the_mean_of_iterates_go_together(
    tiny_model: AdapterModel, rows: Rows, plain: Spec, policy: Policy
) -> None:
    """The mean over two steps of a tensor that moved in the first one only is where it was then."""
    values = start(tiny_model)

    def delta(**train: object) -> dict[str, Array]:
        chosen = changed(plain, train={"steps": 2, **train})
        trainer = Trainer(tiny_model, rows, chosen, policy, None, entropy_for=lambda _: Everyone())
        return trainer.train("run", assignment(turns=TURNS), values).delta

    last, mean = delta(), delta(ema=0.5)

    for name in tiny_model.schema.names(Role.LORA_B):
        np.testing.assert_allclose(mean[name], last[name], atol=1e-6)
    for name in tiny_model.schema.names(Role.LORA_A):
        np.testing.assert_allclose(mean[name], last[name] / 1.5, atol=1e-6)


def test_parts_of_one_module_take_turns(
    build_model: Callable[[AdapterSection], AdapterModel], rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    """Hydra has four tensors on one module: the tape records the two that move, and autograd leaves the others."""
    model = build_model(AdapterSection(kind="hydra", rank=2))
    values = start(model)
    turns = ("parallel_B", "sequential_B")
    one = changed(spec, train={"steps": 1})

    trainer = Trainer(model, rows, one, policy, ledger)
    delta = trainer.train("run", assignment(frozenset(turns), turns=turns), values).delta

    for name, value in delta.items():
        assert value.any() == name.endswith("parallel_B"), name
