"""Families of models from elsewhere: each is trained, exported and predicts the same when reloaded, or is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ModelError
from fedloom.simulation.simulate import simulate
from tests.families import FAMILIES, save_family

pytestmark = [pytest.mark.usefixtures("preloaded_clients"), pytest.mark.slow]

REFUSED = {
    ("bart", False): "is an encoder and a decoder",
    ("bart", True): "is an encoder and a decoder",
    ("t5", False): "is an encoder and a decoder",
    ("t5", True): "is an encoder and a decoder",
    ("xlnet", True): "its gradient mixes examples",
}
"""By family and whether the run is private. XLNet's layers see examples beside each other in one matrix."""
TRAINED = [(family, private) for family in FAMILIES for private in (False, True) if (family, private) not in REFUSED]
SERVED = ("bert", "deberta", "modernbert", "xlnet")
"""Those whose checkpoint lacks more than a classifier: what processes must agree on is most."""

GOOD, BAD = ("great", "happy", "fine"), ("awful", "sad", "poor")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts whose last word tells the label."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in {"train": 80, "test": 40}.items():
        rows = []
        for number in range(count):
            words = BAD if number % 2 else GOOD
            filler = " ".join(["film"] * int(rng.integers(1, 5)))
            rows.append({"text": f"{filler} {words[rng.integers(3)]}", "label": "blame" if number % 2 else "praise"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_of(base: Path, data: Path, *, private: bool, engine: str = "inprocess") -> dict[str, Any]:
    """A run file of two clients and two rounds."""
    privacy = {"epsilon": 50.0, "delta": 1e-2} if private else {"enabled": False}
    return {
        "run": {"name": f"{base.name}-{engine}-{private}", "rounds": 2, "seed": 5},
        "model": {"base": str(base), "labels": ["praise", "blame"], "max_length": 32},
        "adapter": {"rank": 2, "alpha": 4, "targets": "auto"},
        "train": {"steps": 3, "sampling_rate": 0.4, "learning_rate": 0.05, "optimizer": "adam"},
        "privacy": privacy,
        "rounds": {"min_clients": 2},
        "data": {"source": str(data), "clients": 2},
        "engine": {"threads": 1, "kind": engine},
    }


@pytest.mark.parametrize(("family", "private"), TRAINED)
def test_a_reloaded_adapter_predicts_what_the_run_saw(tmp_path: Path, data: Path, family: str, private: bool) -> None:
    base = save_family(family, tmp_path / family)
    config = RunConfig.model_validate(run_of(base, data, private=private))

    result = simulate(config, tmp_path / "runs")

    assert result.agreement == 1.0
    assert np.isfinite(result.final.loss)
    facts = json.loads((result.folder / "adapter" / "fedloom.json").read_text())
    assert (facts["privacy"] is not None) == private


@pytest.mark.e2e
@pytest.mark.parametrize("family", SERVED)
def test_processes_of_their_own_come_to_the_same_model(tmp_path: Path, data: Path, family: str) -> None:
    base = save_family(family, tmp_path / family)
    here, there = (
        simulate(RunConfig.model_validate(run_of(base, data, private=False, engine=engine)), tmp_path / "runs")
        for engine in ("inprocess", "grpc")
    )

    assert there.agreement == 1.0
    assert there.final.accuracy == here.final.accuracy
    assert there.final.loss == pytest.approx(here.final.loss, rel=1e-4)


@pytest.mark.parametrize(("family", "private"), REFUSED)
def test_a_model_that_cannot_do_the_task_is_refused_by_name(
    tmp_path: Path, data: Path, family: str, private: bool
) -> None:
    base = save_family(family, tmp_path / family)
    config = RunConfig.model_validate(run_of(base, data, private=private))

    with pytest.raises(ModelError, match=REFUSED[family, private]):
        simulate(config, tmp_path / "runs")

    assert not list(tmp_path.glob("runs/*")), "nothing was begun, so nothing is left behind"


def test_the_command_line_says_so_in_a_line(tmp_path: Path, data: Path) -> None:
    base = save_family("roberta", tmp_path / "roberta")
    (tmp_path / "run.toml").write_text(
        f"""
        run = {{ name = "x", rounds = 1 }}
        model = {{ base = "{base}", labels = ["praise", "blame"], max_length = 64 }}
        train = {{ steps = 1, sampling_rate = 0.5, learning_rate = 0.1 }}
        privacy = {{ enabled = false }}
        data = {{ source = "{data}", clients = 2 }}
        """
    )

    done = CliRunner().invoke(app, ["simulate", str(tmp_path / "run.toml"), "--out", str(tmp_path / "runs")])

    assert done.exit_code == 1
    assert isinstance(done.exception, ModelError), "which the program prints as one line"
    assert "reads texts of at most 61 tokens" in str(done.exception)
    assert not list(tmp_path.glob("runs/*"))
