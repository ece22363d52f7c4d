"""An adapter kind that PEFT does not know and an optimiser, both of packages beside fedloom, through whole runs."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedloom.client.eval.held_out import HeldOut
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.models.exports.result import save_final
from fedloom.client.models.load import load_model
from fedloom.client.policy import Policy, check_spec
from fedloom.client.session.prepare import prepare
from fedloom.core import registry
from fedloom.core.config.run import RunConfig, Spec
from fedloom.core.errors import ConfigError, ModelError, PolicyError
from fedloom.simulation.federation import completed
from fedloom.simulation.simulate import simulate
from tests.support.runs import tiny_run

pytestmark = pytest.mark.usefixtures("preloaded_clients")

PLUGINS = Path(__file__).parents[3] / "examples" / "plugins"
INSTALLED = {
    "scale-shift": ("adapters", "fedloom_scale_shift:ScaleShift"),
    "sign-sgd": ("optimizers", "fedloom_sign_sgd:SignSGD"),
}


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both packages, as an installer leaves them, for this process and for those that it starts."""
    site = tmp_path / "site-packages"
    for name, (group, target) in INSTALLED.items():
        folder = site / f"{target.partition(':')[0]}-0.1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fedloom-{name}\nVersion: 0.1.0\n")
        (folder / "entry_points.txt").write_text(f"[fedloom.{group}]\n{name} = {target}\n")
        shutil.copy(PLUGINS / name / f"{target.partition(':')[0]}.py", site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    registry.refresh()
    yield
    registry.refresh()


def config_of(data: Path, base: Path, **sections: Any) -> RunConfig:
    tables: dict[str, Any] = {
        "adapter": {"kind": "scale-shift", "targets": ["query", "value", "dense"]},
        "train": {"steps": 3, "sampling_rate": 0.5, "optimizer": "sign-sgd", "learning_rate": 0.05, "momentum": 0.5},
        "privacy": {"epsilon": 20.0, "delta": 1e-2},
        "strategy": {"name": "fedavg", "weighting": "examples"},
        "rounds": {"min_clients": 2},
        "data": {"source": str(data), "clients": 2},
    }
    return tiny_run(base, **tables | sections)


@pytest.mark.e2e
@pytest.mark.timeout(1200)  # whole runs; a busy machine must not fail one
@pytest.mark.parametrize("engine", ["inprocess", "grpc"])
def test_a_private_run_leaves_a_merged_model_that_predicts_the_same(
    data: Path, tiny_base: Path, tmp_path: Path, engine: str
) -> None:
    config = config_of(data, tiny_base, engine={"kind": engine, "threads": 1})

    result = simulate(config, tmp_path / "runs")

    assert result.agreement == 1.0
    assert all(spent.epsilon > 0 for spent in result.privacy.values())
    assert result.exported == result.folder / "merged"
    assert not (result.folder / "adapter").exists()
    assert "adapter.safetensors" in (result.exported / "README.md").read_text()
    tensors = load_file(result.exported / "adapter.safetensors")
    moved = {name: float(np.abs(each).max()) for name, each in tensors.items() if name.endswith((".scale", ".shift"))}
    assert min(moved.values()) > 0
    # Sign-SGD with three steps of 0.05 in each of two rounds, averaged: no value moves further.
    assert max(moved.values()) <= 2 * 3 * 0.05 + 1e-6


def test_the_result_is_scored_exported_kept_and_gone_on_from(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = config_of(data, tiny_base)
    first = simulate(config, tmp_path / "runs")
    tensors = load_file(first.exported / "adapter.safetensors")

    # `fedloom evaluate --adapter`
    held_out = HeldOut.load(completed(config), str(data))
    assert held_out.score_exported(first.exported).accuracy == first.final.accuracy

    # `fedloom client --adapter`
    spec: Spec = completed(config).spec
    save_final(load_model(spec.model, spec.adapter), spec, tensors, tmp_path / "client", 2)
    names = {path.name for path in first.exported.iterdir()}
    assert {path.name for path in (tmp_path / "client").iterdir()} == names
    weights, card = (
        [(each / name).read_bytes() for each in (tmp_path / "client", first.exported)]
        for name in ("model.safetensors", "README.md")
    )
    assert weights[0] == weights[1]
    # A client has no held-out rows of the coordinator's, and states what the run cost; a simulation's ledgers state
    # all that they have charged. The rest of the card both know.
    assert b"- Accuracy on the coordinator's held-out rows: %.4f" % first.final.accuracy in card[1].splitlines()
    known = card[1].replace(b"over the whole life of the data set", b"over this run").splitlines()
    assert card[0].splitlines() == [line for line in known if b" held-out rows: " not in line]

    # [start]
    second = simulate(config_of(data, tiny_base, start={"adapter": str(first.exported)}), tmp_path / "again")
    assert (second.start.accuracy, second.start.loss) == pytest.approx((first.final.accuracy, first.final.loss))
    facts = json.loads((second.exported / "fedloom.json").read_text())
    assert facts["start"]["adapter"] == "merged"
    other = config_of(data, tiny_base, adapter={"kind": "lora"}, start={"adapter": str(first.exported)})
    with pytest.raises(ConfigError, match=r"start\.adapter lacks \d+ tensors.*set \[adapter\]"):
        simulate(other, tmp_path / "no")

    # A PEFT folder is refused in words.
    with pytest.raises(ModelError, match="PEFT does not know the adapter kind ScaleShift; export with format merged"):
        save_adapter(held_out.model, tmp_path / "peft", {})


def test_a_site_that_does_not_name_them_refuses_them(data: Path, tiny_base: Path, policy: Policy) -> None:
    spec = completed(config_of(data, tiny_base)).spec
    with pytest.raises(PolicyError) as refused:
        check_spec(policy, spec)

    for group, name in (("adapters", "scale-shift"), ("optimizers", "sign-sgd")):
        said = f"{name!r} of the package fedloom-{name} (components.{group} = "
        said += f'["fedloom"]; add "{name}" to allow it)'
        assert said in str(refused.value)


def test_a_kind_that_is_not_private_is_refused_before_anything_is_loaded(
    data: Path, tiny_base: Path, tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedloom.client.adapters.api import Traits

    kind: Any = registry.load("adapters", "scale-shift")
    monkeypatch.setattr(kind, "traits", Traits(private=False, peft=False))
    config = config_of(data, tiny_base)

    with pytest.raises(ModelError, match=r"adapter\.kind = 'scale-shift' is not for private runs"):
        simulate(config, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ModelError, match="not for private runs"):
        prepare(policy, completed(config).spec)
    assert not policy.client.state.exists()

    open_run = config_of(data, tiny_base, privacy={"enabled": False})
    assert simulate(open_run, tmp_path / "runs").agreement == 1.0
