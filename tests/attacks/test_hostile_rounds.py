"""Rounds and adapters that no honest coordinator sends: nothing is trained on them, and nothing is charged.

On the code before these bounds each of them was trained on and charged to the data.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.core.config.run import Spec
from fedloom.core.errors import ConfigError, PolicyError, ProtocolError, SchemaError
from fedloom.core.schema import Array, Role, linear_name
from tests.attacks.lying import ALL, Liar, Site, announcement, broadcast, edited


@pytest.fixture
def site(tiny_model: AdapterModel, rows: Rows, policy: Policy, tmp_path: Path) -> Iterator[Site]:
    with Ledger(tmp_path / "ledger", "sha256:" + "0" * 64) as ledger:
        yield Site(tiny_model, rows, policy, ledger)


def honest(model: AdapterModel) -> dict[str, Array]:
    rng = np.random.default_rng(7)
    return {each.name: rng.normal(0, 0.3, each.shape).astype(np.float32) for each in model.schema.tensors}


def liar_of(site: Site, spec: Spec, tensors: dict[str, Array] | None = None, **fields: Any) -> Liar:
    work, payload = broadcast(site.model.schema, honest(site.model) if tensors is None else tensors, **fields)
    return Liar(spec.model_dump_json(), site.model.schema.to_json(), work, payload)


def test_an_honest_round_is_trained_and_charged(site: Site, spec: Spec) -> None:
    liar = liar_of(site, spec)

    site.hears(liar)  # it ends at the final adapter, of which this coordinator has none

    assert len(liar.updates) == 1
    assert len(site.ledger.charges()) == 1


def test_a_charged_round_is_answered_even_where_its_codec_cannot_carry_the_update(site: Site, spec: Spec) -> None:
    """Otherwise the same round is asked for, charged and lost again whenever the client is started."""
    liar = liar_of(site, spec, upload_codec="fp16")
    liar.spec = edited(spec, train={"learning_rate": 1000.0}, privacy={"clip_norm": 1000.0}, wire={"upload": "fp16"})

    site.hears(liar)

    (sent,) = liar.updates
    values = np.frombuffer(sent, "<f2")
    assert np.isfinite(values).all()
    assert np.abs(values).max() == 65504
    (charge,) = site.ledger.charges()
    assert charge.digest is not None


@pytest.mark.parametrize("round", [2, 5000, 99_999])
def test_a_round_after_the_runs_last_is_not_trained(site: Site, spec: Spec, round: int) -> None:
    liar = liar_of(site, spec, round=round)

    error = site.hears(liar)

    assert isinstance(error, PolicyError)
    assert f"asks for round {round + 1} of a run of 2" in str(error)
    assert site.ledger.charges() == []
    assert liar.heard == ["join", "join", "work", "leave: refused"]


@pytest.mark.parametrize("round", [100_000, 2**31 - 1, 2**32 - 1])
def test_a_round_that_no_run_has_is_no_message(site: Site, spec: Spec, round: int) -> None:
    liar = liar_of(site, spec, round=round)

    assert isinstance(site.hears(liar), ProtocolError)
    assert site.ledger.charges() == []
    assert "fetch" not in liar.heard


def test_a_run_within_the_policy_does_not_go_on_beyond_it(site: Site, spec: Spec) -> None:
    """The limit of the policy holds for each round, whatever the run's length was said to be."""
    limits = site.policy.limits.model_copy(update={"max_rounds": 1})
    site.policy = site.policy.model_copy(update={"limits": limits})
    one = spec.model_copy(update={"run": spec.run.model_copy(update={"rounds": 1})})
    liar = liar_of(site, one, round=1)

    assert isinstance(site.hears(liar), PolicyError)
    assert site.ledger.charges() == []


def test_a_correction_of_gigabytes_is_not_even_fetched(site: Site, spec: Spec) -> None:
    rank = 2**22
    roles = frozenset({*ALL, Role.BASE_A, Role.BASE_B})
    derived = site.model.schema.with_base(1).size - site.model.schema.size
    liar = Liar(spec.model_dump_json(), site.model.schema.to_json())
    size = 4 * (site.model.schema.size + derived * rank)
    liar.work = announcement(min(size, 4 << 30), base_rank=rank, broadcast_roles=roles)

    error = site.hears(liar)

    assert isinstance(error, PolicyError)
    assert f"corrections of rank {rank}; the weights they are for allow 0 to 32" in str(error)
    assert "fetch" not in liar.heard
    assert site.ledger.charges() == []


def trap(model: AdapterModel, value: float, role: str = Role.HEAD) -> dict[str, Array]:
    values = honest(model)
    name = next(each.name for each in model.schema.tensors if each.role == role and len(each.shape) < 3)
    values[name] = values[name].copy()
    values[name].flat[0] = value
    return values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1000.0, -1000.0, 1e30])
@pytest.mark.parametrize("role", [Role.HEAD, Role.LORA_A, Role.LORA_B])
def test_an_adapter_that_is_a_trap_is_not_trained_on(site: Site, spec: Spec, value: float, role: str) -> None:
    liar = liar_of(site, spec, trap(site.model, value, role))

    error = site.hears(liar)

    assert isinstance(error, PolicyError)
    assert "limits.max_weight" in str(error)
    assert site.ledger.charges() == []
    assert liar.updates == []
    assert liar.heard[-1] == "leave: refused"


def test_a_correction_that_is_a_trap_is_not_trained_on(site: Site, spec: Spec) -> None:
    roles = frozenset({*ALL, Role.BASE_A, Role.BASE_B})
    schema = site.model.schema.with_base(1)
    rng = np.random.default_rng(0)
    tensors = {each.name: rng.normal(0, 0.3, each.shape).astype(np.float32) for each in schema.tensors}
    for each in schema.tensors:
        if each.role in (Role.BASE_A, Role.BASE_B):
            tensors[each.name][...] = 20.0
    work, payload = broadcast(site.model.schema, tensors, base_rank=1, broadcast_roles=roles)

    error = site.hears(Liar(spec.model_dump_json(), site.model.schema.to_json(), work, payload))

    assert isinstance(error, PolicyError)
    assert "may add 800 to a frozen weight" in str(error)
    assert site.ledger.charges() == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -1000.0, 1e30])
def test_a_term_that_is_a_trap_is_not_trained_with(site: Site, spec: Spec, value: float) -> None:
    whole = site.model.schema.with_linear(ALL)
    tensors = {**{each.name: np.zeros(each.shape, np.float32) for each in whole.tensors}, **honest(site.model)}
    tensors[linear_name(next(iter(tensors)))].flat[-1] = value
    work, payload = broadcast(site.model.schema, tensors, linear=ALL)

    error = site.hears(Liar(spec.model_dump_json(), site.model.schema.to_json(), work, payload))

    assert isinstance(error, PolicyError)
    assert "the term for the gradient of" in str(error)
    assert site.ledger.charges() == []


def test_terms_that_the_announced_length_does_not_hold_are_not_fetched(site: Site, spec: Spec) -> None:
    """A build that knows no terms passes their field over, and refuses by the length what it would misread."""
    liar = Liar(spec.model_dump_json(), site.model.schema.to_json())
    liar.work = announcement(4 * site.model.schema.size, linear=ALL)

    error = site.hears(liar)

    assert isinstance(error, ProtocolError)
    assert "under the schema needs" in str(error)
    assert "fetch" not in liar.heard
    assert site.ledger.charges() == []


@pytest.mark.parametrize(
    "local",
    [{"learning_rate": 3e38}, {"learning_rate": 1e5}, {"momentum": 0.99999}, {"proximal_mu": 1e38}, {"clip_norm": 1.0}],
)
def test_an_override_out_of_range_is_no_message(site: Site, spec: Spec, local: dict[str, float]) -> None:
    liar = liar_of(site, spec, local=local)

    assert isinstance(site.hears(liar), ProtocolError)
    assert "fetch" not in liar.heard
    assert site.ledger.charges() == []


DENORMAL = {
    "privacy": {"clip_norm": 0.55 * 2.0**-149, "noise_multiplier": 0.9},
    "train": {"learning_rate": 3e38, "sampling_rate": 0.005},
}


def test_a_denormal_clip_norm_does_not_remove_the_noise(site: Site, spec: Spec) -> None:
    """σ·C rounded to 0 in float32 while the clip factor rounded up to one unit, which the learning rate made visible.

    With it 770 of 770 values were exactly 0 but for the target's row, and the ledger said epsilon 0.71.
    """
    liar = liar_of(site, spec)
    liar.spec = edited(spec, **DENORMAL)

    assert isinstance(site.hears(liar), ConfigError)
    assert "fetch" not in liar.heard
    assert site.ledger.charges() == []


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("privacy", "clip_norm", 0.55 * 2.0**-149),
        ("privacy", "clip_norm", 1e38),
        ("privacy", "noise_multiplier", 1e-9),
        ("privacy", "noise_multiplier", 1e9),
        ("train", "learning_rate", 3e38),
        ("train", "head_learning_rate", 3e38),
        ("train", "learning_rate", 1e-300),
        ("train", "momentum", 0.99999),
        ("train", "proximal_mu", 1e30),
        ("train", "sampling_rate", 1e-30),
        ("train", "microbatch", 2**31),
        ("adapter", "alpha", 1e38),
        ("adapter", "alpha", 1e-38),
        ("run", "rounds", 2**31),
        ("secure_aggregation", "max_change", 1e-300),
    ],
)
def test_no_number_out_of_range_passes_for_a_run(site: Site, spec: Spec, section: str, key: str, value: float) -> None:
    liar = liar_of(site, spec)
    liar.spec = edited(spec, **{section: {key: value}})

    error = site.hears(liar)

    assert isinstance(error, ConfigError)
    assert f"{section}.{key}" in str(error)
    assert site.ledger.charges() == []


def test_a_scale_that_the_run_does_not_have_is_refused(site: Site, spec: Spec) -> None:
    """The scale stands in the spec (alpha over rank) and in the schema; a client computes its own and compares."""
    liar = liar_of(site, spec)
    liar.schema = liar.schema.replace('"scale":2.0', '"scale":9999.0')

    assert isinstance(site.hears(liar), SchemaError)
    assert "work" not in liar.heard
    assert site.ledger.charges() == []


def test_a_scale_that_no_run_has_is_no_schema(site: Site, spec: Spec) -> None:
    liar = liar_of(site, spec)
    liar.schema = liar.schema.replace('"scale":2.0', '"scale":1e+30')

    error = site.hears(liar)

    assert isinstance(error, SchemaError)
    assert "LoRA scale 1e+30" in str(error)
