"""`fedloom inspect` and `fedloom merge` on a run folder that has kept its rounds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.client.eval.held_out import HeldOut
from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.spends import run_statement
from fedloom.server.storage.kept import kept_rounds
from fedloom.simulation.simulate import simulate
from fedloom.strategies.diagnostics.intruders import intruder_dimensions
from fedloom.strategies.merging.peft_folder import read_folder

PREFIX = "base_model.model."


def invoke(*words: str | Path) -> str:
    done = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [
        {"text": f"film {number % 7} {('awful', 'great')[number % 2]}", "label": number % 2} for number in range(60)
    ]
    for name in ("rows", "train", "test"):
        path.with_stem(name).write_text("".join(json.dumps(each) + "\n" for each in texts))
    return path


@pytest.fixture(scope="module")
def play(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs two clients for three rounds on the tiny model; gives the run folder."""

    def run(**changes: dict[str, Any]) -> Path:
        tables: dict[str, Any] = {
            "run": {"name": "trial", "rounds": 3, "seed": 5},
            "model": {"base": str(tiny_base), "labels": ["negative", "positive"], "max_length": 16},
            "adapter": {"rank": 2, "alpha": 4, "targets": ["query", "value"]},
            "train": {"steps": 2, "sampling_rate": 0.3, "learning_rate": 0.5},
            "privacy": {"noise_multiplier": 1.0, "clip_norm": 0.5},
            "strategy": {"name": "fedavg", "weighting": "examples"},
            "rounds": {"keep": 2},
            "data": {"source": str(rows.parent), "clients": 2},
            "engine": {"threads": 1},
        }
        for name, section in changes.items():
            tables[name] = {**tables[name], **section}
        return simulate(RunConfig.model_validate(tables), tmp_path_factory.mktemp("runs")).folder

    return run


@pytest.fixture(scope="module")
def folder(play: Callable[..., Path]) -> Path:
    """A private run with FedAvg, of which two rounds are kept."""
    return play()


def test_the_rounds_of_a_run_are_told_by_layer_and_by_client(folder: Path) -> None:
    document = json.loads(invoke("inspect", folder, "--json"))

    assert [each["round"] for each in document["rounds"]] == [2, 3]
    assert document["unknown"] == {"rounds": None, "updates": None, "noise_share": None}
    kept = list(kept_rounds(folder / "state", load_run(folder / "run.toml")))[-1]
    last = document["rounds"][-1]
    assert [each["client"] for each in last["clients"]] == [each.client for each in kept.updates]
    values = [{name: each.value(name) for name in each.delta} for each in kept.updates]
    parts = np.array([each.weight for each in kept.updates]) / sum(each.weight for each in kept.updates)
    for layer in last["layers"]:
        if layer["averaging_error"] is None:
            continue
        (pair,) = [each for each in kept.before.schema.pairs if each.module == layer["module"]]
        products = sum(p * each[pair.b] @ each[pair.a] for p, each in zip(parts, values, strict=True))
        b, a = (sum(p * each[name] for p, each in zip(parts, values, strict=True)) for name in (pair.b, pair.a))
        assert layer["averaging_error"] == pytest.approx(2 * np.linalg.norm(products - b @ a), rel=1e-6)
        assert layer["averaging_error"] > 0
    assert {each["module"] for each in document["layers"]} < {each["module"] for each in last["layers"]}
    # Two steps of one example or so each: nearly all of an update is noise.
    assert 0.5 < last["noise_share"] < 1.5
    assert all(0.5 < each["noise_share"] < 1.5 for each in last["clients"])
    assert last["cosine"] < 1
    text = invoke("inspect", folder)
    assert "round  clients  change  averaging error  noise" in text
    assert "round 3 by layer and by client" in text
    assert "not private" not in text


def test_what_is_not_known_is_said(play: Callable[..., Path]) -> None:
    plain = play(
        rounds={"keep": 1},
        privacy={"enabled": False, "noise_multiplier": None},
        strategy={"name": "ffa", "weighting": "uniform"},
    )
    text = invoke("inspect", plain)
    assert "noise share none: the run is not private" in text
    assert "what is said of single clients has no noise" in text
    last = json.loads(invoke("inspect", plain, "--json"))["rounds"][-1]
    assert last["averaging_error"] == 0.0
    assert {each["noise_share"] for each in last["layers"]} == {None}

    shutil.rmtree(plain / "state" / "blobs")
    (plain / "state" / "blobs").mkdir()
    text = invoke("inspect", plain)
    assert "rounds not kept: `rounds.keep = 1` in the run file keeps those of the last round" in text
    assert "noise share" not in text
    assert "rounds not kept" not in invoke("inspect", plain / "adapter")  # no run folder


def test_intruders_are_counted_against_the_base_model(folder: Path, tiny_base: Path) -> None:
    layers = json.loads(invoke("inspect", folder, "--intruders", "--json"))["layers"]

    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    products = read_folder(folder / "adapter").adapter.products
    for layer in layers:
        weight = base.get_submodule(layer["module"]).weight.detach().double().numpy()
        assert layer["intruders"] == intruder_dimensions(weight, products[PREFIX + layer["module"]])
    assert "intruders" in invoke("inspect", folder, "--intruders").splitlines()[0]

    (folder / "adapter" / "fedloom.json").rename(folder / "facts")
    try:
        with pytest.raises(ConfigError, match=r"fedloom.json is missing; leave out --intruders"):
            invoke("inspect", folder, "--intruders")
    finally:
        (folder / "facts").rename(folder / "adapter" / "fedloom.json")


def test_a_picture_is_drawn(folder: Path, tmp_path: Path) -> None:
    text = invoke("inspect", folder, "--against", f"{folder}@2", "--plot", tmp_path / "all.png")

    assert f"plot     {tmp_path / 'all.png'}" in text
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"cannot write .*all.films.*give a file such as adapter.png"):
        invoke("inspect", folder / "adapter", "--plot", tmp_path / "all.films")


def test_a_round_of_a_run_is_an_adapter(folder: Path, tmp_path: Path) -> None:
    last = json.loads(invoke("inspect", f"{folder}@3", "--against", folder, "--json"))
    assert [each["cosine"] for each in last["layers"]] == pytest.approx([1.0] * 4)
    earlier = json.loads(invoke("inspect", f"{folder}@2", "--against", folder, "--json"))
    assert max(each["cosine"] for each in earlier["layers"]) < 1 - 1e-6

    invoke("merge", f"{folder}@2", folder, "--out", tmp_path / "soup")

    merged, final = (read_folder(each).adapter for each in (tmp_path / "soup", folder / "adapter"))
    config = load_run(folder / "run.toml")
    before = next(each for each in kept_rounds(folder / "state", config) if each.number == 2).after
    assert {PREFIX + pair.module for pair in before.schema.pairs} == merged.products.keys()
    for pair in before.schema.pairs:
        module, product = PREFIX + pair.module, merged.products[PREFIX + pair.module]
        dense = 2.0 * before.adapter[pair.b].astype(float) @ before.adapter[pair.a]
        np.testing.assert_allclose(product.dense(), (dense + final.products[module].dense()) / 2, atol=1e-6)
    # Both rest on the same steps: what the later one says holds for both, and nothing is charged twice.
    known = json.loads((tmp_path / "soup" / "fedloom.json").read_text())
    assert known["privacy"]["epsilon"] == pytest.approx(run_statement(config, 3).epsilon, rel=1e-3)
    assert [each["adapter"] for each in known["merged"]["adapters"]] == ["trial@2", "trial"]


def test_a_round_that_is_not_there_is_refused_and_a_checkpoint_is_one(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has not kept round 1 \(it has 2, 3\); set rounds.keep"):
        invoke("merge", f"{folder}@1", folder, "--out", tmp_path / "soup")
    with pytest.raises(ConfigError, match=r"nowhere has not kept round 1 \(it has none\)"):
        invoke("inspect", tmp_path / "nowhere@1")

    shutil.copytree(folder, tmp_path / "going-on", ignore=shutil.ignore_patterns("adapter"))
    document = json.loads(invoke("inspect", tmp_path / "going-on", "--json"))
    assert (document["adapter"], len(document["rounds"])) == (f"{tmp_path / 'going-on'}@3", 2)

    shutil.copytree(folder / "adapter", tmp_path / "run" / "checkpoints" / "round-1")
    assert json.loads(invoke("inspect", tmp_path / "run@1", "--json"))["adapter"].endswith("run@1")


def test_atlas_learns_coefficients_whose_loss_is_that_of_the_adapter(folder: Path, rows: Path, tmp_path: Path) -> None:
    words = ("merge", f"{folder}@2", folder, "--method", "atlas", "--run", folder / "run.toml", "--rows", rows)
    document = json.loads(
        invoke(*words, "--out", tmp_path / "learned", "--steps", "10", "--learning-rate", "0.2", "--json")
    )

    told = document["rows"]
    assert told["loss"] < told["loss_before"]
    assert (document["rank"], told["examples"]) == (4, 60)
    assert document["relative_error"] < 1e-6
    held_out = HeldOut.load(load_run(folder / "run.toml"), str(rows), "train")
    assert held_out.score_exported(tmp_path / "learned").loss == pytest.approx(told["loss"], abs=1e-5)
    invoke("merge", f"{folder}@2", folder, "--out", tmp_path / "soup")
    assert held_out.score_exported(tmp_path / "soup").loss == pytest.approx(told["loss_before"], abs=1e-5)
    tensors = [load_file(each / "adapter_model.safetensors") for each in (tmp_path / "learned", tmp_path / "soup")]
    assert len({tuple(each) for each in document["coefficients"].values()}) == 4  # a layer has its own
    assert all(np.isfinite(each).all() for each in tensors[0].values())

    text = invoke(*words, "--out", tmp_path / "again", "--steps", "1")
    assert "no privacy statement covers these rows" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "atlas"), "rows that are not private as --rows"),
        (("--method", "atlas", "--weights", "1,2"), "atlas finds out by rows what each adapter counts"),
        (("--method", "atlas", "--run", "RUN", "--rows", "ROWS", "--steps", "0"), "at least one step"),
        (("--method", "atlas", "--score-on", "ROWS"), "atlas takes no --score-on; leave it out, or take greedy-soup"),
        (("--rows", "ROWS"), "soup takes no --rows; leave it out, or take atlas"),
    ],
)
def test_options_that_do_nothing_are_refused(
    options: tuple[str, ...], said: str, folder: Path, rows: Path, tmp_path: Path
) -> None:
    known = {"RUN": folder / "run.toml", "ROWS": rows}
    words = [known.get(each, each) for each in options]

    with pytest.raises(ConfigError, match=said):
        invoke("merge", folder, folder, "--out", tmp_path / "merged", *words)
