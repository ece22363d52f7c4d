"""What a round may ask of a client: ranks, rounds, overrides, memory, and the values it is to start from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.client.policy import Policy
from fedloom.client.session.assignment_checks import check_broadcast, check_order
from fedloom.core.config.run import Spec
from fedloom.core.errors import PolicyError, ProtocolError
from fedloom.core.schema import Array, Role, Schema, TensorSpec
from fedloom.proto.checks import LOCAL_NAMES
from fedloom.proto.messages import Assignment, broadcast_schema, moving, upload_schema

A, B, HEAD = (
    TensorSpec("q.A", "q", Role.LORA_A, (4, 8)),
    TensorSpec("q.B", "q", Role.LORA_B, (16, 4)),
    TensorSpec("head.bias", "head", Role.HEAD, (2,)),
)
SCHEMA = Schema((A, B, HEAD), scale=2.0)
ROLES = frozenset({Role.LORA_A, Role.LORA_B, Role.HEAD})


def policy(**sections: dict[str, Any]) -> Policy:
    tables: dict[str, Any] = {"client": {"name": "a"}, "data": {"source": "train.csv"}}
    return Policy.model_validate(tables | sections)


@pytest.fixture
def run() -> Spec:
    return Spec.model_validate(
        {
            "run": {"name": "demo", "rounds": 30},
            "model": {"base": "x", "labels": ["a", "b"]},
            "train": {"steps": 20, "sampling_rate": 0.1, "learning_rate": 1.0},
            "privacy": {"noise_multiplier": 0.8},
        }
    )


def order(**fields: Any) -> Assignment:
    values: dict[str, Any] = {"round": 0, "broadcast_digest": "0" * 64, "broadcast_bytes": 0}
    return Assignment(**{"train": ROLES, "broadcast_roles": ROLES} | values | fields)


def adapter(**changes: Array) -> dict[str, Array]:
    return {**SCHEMA.zeros(), "q.A": np.full((4, 8), 0.3, np.float32), **changes}


def test_what_an_honest_coordinator_asks_passes(run: Spec) -> None:
    asked = order(round=29, rank=4, base_rank=8, local=dict.fromkeys(LOCAL_NAMES, 0.5))

    train = check_order(policy(), run, SCHEMA, asked)

    assert (train.learning_rate, train.momentum, train.proximal_mu) == (0.5, 0.5, 0.5)
    assert train.steps == 20
    assert check_order(policy(), run, SCHEMA, order()) == run.train


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "the round after the last": ({"round": 30}, "asks for round 31 of a run of 30"),
    "round 5000": ({"round": 5000}, "asks for round 5001 of a run of 30"),
    "the last round of all": ({"round": 2**31 - 1}, "asks for round 2147483648 of a run of 30"),
    "a round before the first": ({"round": -1}, "asks for round 0 of a run of 30"),
    "no rank": ({"rank": 0}, "asks for rank 0; this run's adapter allows 1 to 4"),
    "a rank above the schema's": ({"rank": 5}, "asks for rank 5; this run's adapter allows 1 to 4"),
    "a base rank above the matrices'": (
        {"base_rank": 9},
        "corrections of rank 9; the weights they are for allow 0 to 8",
    ),
    "a base rank of gigabytes": ({"base_rank": 2**24}, "corrections of rank 16777216"),
    "a base rank below none": ({"base_rank": -1}, "corrections of rank -1"),
    "no learning rate": ({"local": {"learning_rate": 0.0}}, "sets learning_rate to 0.0 for one round"),
    "a rate that is none": ({"local": {"learning_rate": float("nan")}}, "sets learning_rate to nan for one round"),
    "a rate that shows the last bit": ({"local": {"learning_rate": 3e38}}, r"sets learning_rate to 3e\+38 for one"),
    "a rate above the policy's": ({"local": {"learning_rate": 1001.0}}, "learning_rate to 1001 .*at most 1000"),
    "momentum that never ends": ({"local": {"momentum": 1.0}}, "sets momentum to 1.0 for one round"),
    "momentum below none": ({"local": {"momentum": -0.1}}, "sets momentum to -0.1 for one round"),
    "a pull that explodes": ({"local": {"proximal_mu": 1e30}}, r"sets proximal_mu to 1e\+30 for one round"),
    "a push": ({"local": {"proximal_mu": -1.0}}, "sets proximal_mu to -1.0 for one round"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_beyond_the_run_or_the_policy_is_refused(case: str, run: Spec) -> None:
    fields, message = REFUSED[case]

    with pytest.raises(PolicyError, match=message):
        check_order(policy(), run, SCHEMA, order(**fields))


@pytest.mark.parametrize(
    "name", ["steps", "sampling_rate", "clip_norm", "noise_multiplier", "microbatch", "optimizer", ""]
)
def test_no_other_override_passes(name: str, run: Spec) -> None:
    with pytest.raises(PolicyError, match="only learning_rate, momentum, proximal_mu may vary"):
        check_order(policy(), run, SCHEMA, order(local={"learning_rate": 0.1, name: 1.0}))


def test_a_site_may_end_before_the_run_does(run: Spec) -> None:
    short = policy(limits={"max_rounds": 10})

    check_order(short, run, SCHEMA, order(round=9))
    with pytest.raises(PolicyError, match=r"round 11 of a run of 30; rounds 1 to 10 are allowed"):
        check_order(short, run, SCHEMA, order(round=10))


def test_an_adapter_beyond_the_sites_memory_is_refused(run: Spec) -> None:
    wide = Schema((TensorSpec("q.A", "q", Role.LORA_A, (1, 4096)), TensorSpec("q.B", "q", Role.LORA_B, (4096, 1))))
    corrected = frozenset({*wide.roles, Role.BASE_A, Role.BASE_B})
    asked = order(train=wide.roles, base_rank=4096, broadcast_roles=corrected)

    check_order(policy(compute={"memory_mib": 300}), run, wide, asked)
    with pytest.raises(PolicyError, match=r"needs 256 MiB .*compute\.memory_mib = 200"):
        check_order(policy(compute={"memory_mib": 200}), run, wide, asked)


@pytest.mark.parametrize(
    "fields",
    [
        {"train": frozenset({"lora_Z"})},
        {"train": frozenset({Role.LORA_B, "q.C"})},
        {"train": frozenset({Role.LORA_B}), "personal": frozenset({Role.HEAD})},
        {"train": frozenset({"q.B"}), "personal": frozenset({Role.LORA_B, Role.HEAD})},
    ],
)
def test_what_the_adapter_has_not_is_neither_trained_nor_kept(run: Spec, fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match=r"this adapter has head, lora_A, lora_B"):
        check_order(policy(), run, SCHEMA, order(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"linear": frozenset({"lora_Z"})},
        {"linear": frozenset({"q.B.linear"})},
        {"train": frozenset({Role.LORA_B}), "linear": frozenset({Role.LORA_B, Role.HEAD})},
        {"personal": frozenset({Role.HEAD}), "linear": frozenset({Role.HEAD})},
    ],
)
def test_only_what_is_trained_and_uploaded_has_a_term_for_its_gradient(run: Spec, fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match=r"sends terms for the gradients of .*; only what is trained and uploaded"):
        check_order(policy(), run, SCHEMA, order(**fields))


def test_a_broadcast_with_terms_has_the_shapes_of_what_they_are_for(run: Spec) -> None:
    asked = order(rank=2, linear=frozenset({Role.LORA_B, "head.bias"}), broadcast_roles=ROLES)

    check_order(policy(), run, SCHEMA, asked)

    shapes = {spec.name: spec.shape for spec in broadcast_schema(SCHEMA, asked).tensors}
    assert shapes == {
        "q.A": (2, 8),
        "q.B": (16, 2),
        "head.bias": (2,),
        "q.B.linear": (16, 2),
        "head.bias.linear": (2,),
    }


def test_terms_count_against_the_sites_memory(run: Spec) -> None:
    wide = Schema((TensorSpec("q.B", "q", Role.LORA_B, (1 << 21, 8)),))
    asked = order(train=wide.roles, broadcast_roles=wide.roles)

    check_order(policy(compute={"memory_mib": 200}), run, wide, asked)
    with pytest.raises(PolicyError, match=r"needs 256 MiB .*compute\.memory_mib = 200"):
        check_order(policy(compute={"memory_mib": 200}), run, wide, replace(asked, linear=wide.roles))


def test_tensors_are_selected_by_role_or_by_name(run: Spec) -> None:
    asked = order(train=frozenset({Role.LORA_B, "head.bias"}), personal=frozenset({"head.bias"}))

    check_order(policy(), run, SCHEMA, asked)

    assert upload_schema(SCHEMA, asked).names() == {"q.B"}


def test_turns_and_noise_of_bands_are_refused_together(run: Spec) -> None:
    turns = (Role.LORA_B, Role.LORA_A)
    asked = order(train=frozenset(turns), turns=turns)
    bands = run.privacy.model_copy(update={"noise_bands": 2})

    check_order(policy(), run, SCHEMA, asked)
    with pytest.raises(PolicyError, match=r"tensors take turns in a run with privacy.noise_bands = 2"):
        check_order(policy(), run.model_copy(update={"privacy": bands}), SCHEMA, asked)


@pytest.mark.parametrize("turns", [("lora_Z",), (Role.LORA_B, Role.LORA_A), (Role.LORA_B, "head.bias")])
def test_nothing_takes_turns_that_is_not_trained(run: Spec, turns: tuple[str, ...]) -> None:
    asked = order(train=frozenset({Role.LORA_B}), turns=turns)

    with pytest.raises(ProtocolError, match=r"is to move by turns and is not all trained; what is trained is lora_B"):
        check_order(policy(), run, SCHEMA, asked)
    with pytest.raises(ProtocolError, match="this adapter has head"):
        check_order(policy(), run, SCHEMA, order(train=frozenset({"lora_Z"}), turns=("lora_Z",)))


def test_a_cycle_has_what_moves_in_each_step() -> None:
    assert moving(SCHEMA, ROLES, ()) == (SCHEMA.names(),)
    b, a = frozenset({"q.B", "head.bias"}), frozenset({"q.A", "head.bias"})
    assert moving(SCHEMA, ROLES, (Role.LORA_B, Role.LORA_A)) == (b, a)
    assert moving(SCHEMA, ROLES, (Role.LORA_B, "q.B", Role.LORA_A)) == (b, b, a)


def test_corrections_of_quantised_weights_are_refused_before_the_charge(run: Spec) -> None:
    with pytest.raises(PolicyError, match="cannot be done to 4-bit weights"):
        check_order(policy(compute={"quantization": "4bit"}), run, SCHEMA, order(base_rank=1))


def test_trained_values_pass() -> None:
    check_broadcast(policy(), SCHEMA, adapter(**{"head.bias": np.array([30.0, -30.0], np.float32)}))
    check_broadcast(policy(), SCHEMA, adapter(**{"q.B": np.full((16, 4), 10.0, np.float32)}))
    check_broadcast(policy(), SCHEMA, {})


def ones(shape: tuple[int, ...], value: float) -> Array:
    return np.full(shape, value, np.float32)


TRAPS: dict[str, dict[str, Array]] = {
    "a head that is sure of one class": {"head.bias": np.array([1000.0, 0.0], np.float32)},
    "a head that is sure of the other": {"head.bias": np.array([-1000.0, 0.0], np.float32)},
    "huge weights": {"q.B": ones((16, 4), 1e30)},
    "a term that is longer than any gradient": {"q.B.linear": ones((16, 4), 1e30)},
    "a term of NaN": {"head.bias.linear": np.array([0.0, np.nan], np.float32)},
    "NaN": {"head.bias": np.array([0.0, np.nan], np.float32)},
    "infinity": {"q.A": ones((4, 8), np.inf)},
    "minus infinity": {"q.A": ones((4, 8), -np.inf)},
    "a pair whose factors are small and whose product is not": {"q.A": ones((4, 8), 50.0), "q.B": ones((16, 4), 1.0)},
    "a correction whose product is large": {"q.base_A": ones((2, 8), 9.0), "q.base_B": ones((16, 2), -9.0)},
    "a correction with one large entry": {
        "q.base_A": np.eye(2, 8, dtype=np.float32) * 9,
        "q.base_B": np.eye(16, 2, dtype=np.float32) * 9,
    },
}


@pytest.mark.parametrize("case", TRAPS)
def test_traps_are_refused(case: str) -> None:
    with pytest.raises(PolicyError, match=r"finite values up to 100 are allowed \(limits\.max_weight"):
        check_broadcast(policy(), SCHEMA, adapter(**TRAPS[case]))


def test_a_site_may_widen_the_limit_but_not_to_what_overflows() -> None:
    wide = policy(limits={"max_weight": 1e6})

    check_broadcast(wide, SCHEMA, adapter(**{"head.bias": np.array([1000.0, 0.0], np.float32)}))
    for case in ("huge weights", "NaN", "infinity"):
        with pytest.raises(PolicyError, match="max_weight"):
            check_broadcast(wide, SCHEMA, adapter(**TRAPS[case]))


def test_the_bound_on_a_product_holds_for_each_of_its_entries() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = rng.normal(0, 3, (4, 8)).astype(np.float32), rng.normal(0, 3, (16, 4)).astype(np.float32)
        largest = float(np.abs(SCHEMA.scale * b @ a).max())
        limit = policy(limits={"max_weight": max(1.0, largest * 0.999)})
        with pytest.raises(PolicyError):
            check_broadcast(limit, SCHEMA, {"q.A": a, "q.B": b})


@pytest.mark.parametrize("name", ["sentiment", "newsgroups", "images", "instruct", "findings"])
def test_the_examples_are_within_every_bound(name: str, request: pytest.FixtureRequest) -> None:
    from fedloom.client.policy import check_spec
    from fedloom.core.config.run import load_run

    spec = load_run(
        Path(str(request.config.rootpath)) / "examples" / f"{name}.toml", ("privacy.noise_multiplier=0.6",)
    ).spec

    own = {"task": spec.model.task, "labels": spec.model.labels}
    check_spec(policy(data={"source": "x", "declared_examples": 1000} | own), spec)
