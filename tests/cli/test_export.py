"""`fedloom export` gives what the coordinator holds, as an adapter that PEFT loads."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedloom.api import load_adapter
from fedloom.cli.main import app
from fedloom.client.models.base_folder import base_digest
from fedloom.client.models.exports.result import save_final
from fedloom.client.models.load import load_model
from fedloom.core.config.run import Spec, load_run
from fedloom.core.errors import ModelError
from fedloom.core.privacy.accounting import Spend, statement
from fedloom.core.schema import Schema
from fedloom.server.build import build_strategy, calibrated
from fedloom.server.coordinator import Coordinator
from fedloom.server.monitoring.recorders.api import JsonLines, RoundRecord
from fedloom.server.rounds.state import RoundOpened, RunCreated
from fedloom.server.storage.local import Store
from fedloom.strategies.start import starting_adapter
from tests.support.preloaded import fedloom


def test_a_state_directory_becomes_a_peft_adapter(tmp_path: Path, tiny_base: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text(
        f"""
        run = {{ name = "tiny", rounds = 3, seed = 4 }}
        model = {{ base = "{tiny_base}", labels = ["no", "yes"] }}
        adapter = {{ rank = 4, alpha = 8 }}
        train = {{ steps = 1, sampling_rate = 0.5, learning_rate = 0.1 }}
        privacy = {{ noise_multiplier = 2.0 }}
        """
    )
    assert fedloom("prepare", run).returncode == 0
    prepared = json.loads(run.with_suffix(".schema.json").read_text())
    schema = Schema.from_json(json.dumps(prepared["schema"], separators=(",", ":")))
    config = calibrated(load_run(run))
    config = config.model_copy(update={"model": config.model.model_copy(update={"digest": prepared["digest"]})})
    with Store(tmp_path / "state") as store:
        Coordinator(config, schema, build_strategy(config), store, starting=starting_adapter(schema, 4))
        (created,) = store.events()
        assert isinstance(created, RunCreated)
        store.append(RoundOpened(0, 0, created.state, ("a", "b"), 60.0))

    done = fedloom("export", run, "--state", tmp_path / "state", "--out", tmp_path / "adapter")

    assert done.returncode == 0, done.stderr
    assert "adapter after 0 of 3 rounds" in done.stdout
    saved, expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), starting_adapter(schema, 4)
    assert saved.keys() == expected.keys()
    assert all(np.array_equal(saved[name], expected[name]) for name in saved)
    known = json.loads((tmp_path / "adapter" / "fedloom.json").read_text())
    assert known["base_digest"] == prepared["digest"]
    # Of three rounds one was opened, and it is what may have been spent.
    spent = json.loads(json.dumps(statement([Spend(0.5, 2.0, 1)], 1e-5).document()))
    assert spent.items() <= known["privacy"].items()
    assert (known["privacy"]["rounds"], known["privacy"]["clip_norm"]) == (1, 1.0)

    # A client has the base in another folder, knows of the run what it was told, and writes the same files.
    shutil.copytree(tiny_base, tmp_path / "elsewhere")
    told = Spec.from_json(config.spec.model_dump_json())
    at_client = told.model.model_copy(update={"base": str(tmp_path / "elsewhere")})
    save_final(load_model(at_client, told.adapter), told, expected, tmp_path / "client", 1)
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / each).iterdir()} for each in ("adapter", "client")
    )
    assert ours == theirs
    assert {"adapter_config.json", "adapter_model.safetensors", "fedloom.json", "README.md"} == ours.keys()

    # The same state as a file of tensors, without torch, and as a whole model.
    code = "import sys; from fedloom.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    words = ["export", str(run), "--state", str(tmp_path / "state"), "--format", "safetensors", "--json"]
    without = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert without.returncode == 0, without.stderr
    path = tmp_path / "adapter.safetensors"
    assert json.loads(without.stdout) == {"path": str(path), "format": "safetensors", "rounds": 0, "of": 3}
    tensors = load_file(path)
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name], expected[name]) for name in tensors)
    with safe_open(path, "numpy") as file:
        about = file.metadata()
    assert Schema.from_json(about["schema"]) == schema
    assert json.loads(about["fedloom"])["privacy"]["epsilon"] == known["privacy"]["epsilon"]
    merged = fedloom("export", run, "--state", tmp_path / "state", "--format", "merged")
    assert merged.returncode == 0, merged.stderr
    assert f"model after 0 of 3 rounds in {tmp_path / 'merged'}" in merged.stdout
    assert json.loads((tmp_path / "merged" / "fedloom.json").read_text()) == known


def test_a_kind_that_cannot_be_merged_becomes_a_folder_that_fedloom_loads(tmp_path: Path, tiny_base: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text(
        f"""
        run = {{ name = "tiny", rounds = 3, seed = 4 }}
        model = {{ base = "{tiny_base}", labels = ["no", "yes"] }}
        adapter = {{ kind = "bottleneck", size = 4 }}
        train = {{ steps = 1, sampling_rate = 0.5, learning_rate = 0.1 }}
        privacy = {{ enabled = false }}
        """
    )
    config = load_run(run)
    pinned = config.model.model_copy(update={"digest": base_digest(tiny_base)})
    config = config.model_copy(update={"model": pinned})
    schema = load_model(config.model, config.adapter).schema
    with Store(tmp_path / "state") as store:
        Coordinator(config, schema, build_strategy(config), store, starting=starting_adapter(schema, 4))

    words = ["export", str(run), "--state", str(tmp_path / "state"), "--json"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)

    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"path": str(tmp_path / "adapter"), "format": "fedloom", "rounds": 0, "of": 3}
    known = json.loads((tmp_path / "adapter" / "fedloom.json").read_text())
    assert known["base_digest"] == config.model.digest
    loaded = load_adapter(tmp_path / "adapter")
    assert len([name for name, _ in loaded.named_parameters() if name.endswith("adapter_down")]) == 4
    with pytest.raises(ModelError, match="export with format fedloom or safetensors"):
        CliRunner().invoke(app, [*words, "--format", "peft"], catch_exceptions=False)


def started(tmp_path: Path, base: Path, model: str) -> list[str]:
    """The state directory of a run at its start, and the words that export it."""
    run = tmp_path / "run.toml"
    run.write_text(
        f"""
        run = {{ name = "tiny", rounds = 3, seed = 4 }}
        model = {{ base = "{base}", {model} }}
        adapter = {{ rank = 4, alpha = 8, targets = "auto" }}
        train = {{ steps = 1, sampling_rate = 0.5, learning_rate = 0.1 }}
        privacy = {{ enabled = false }}
        """
    )
    config = load_run(run)
    config = config.model_copy(update={"model": config.model.model_copy(update={"digest": base_digest(base)})})
    schema = load_model(config.model, config.adapter).schema
    with Store(tmp_path / "state") as store:
        Coordinator(config, schema, build_strategy(config), store, starting=starting_adapter(schema, 4))
    return ["export", str(run), "--state", str(tmp_path / "state")]


def test_onnx_and_gguf_have_folders_of_their_own(tmp_path: Path, tiny_base: Path, small_bases: dict[str, Path]) -> None:
    (tmp_path / "classifier").mkdir()
    (tmp_path / "writer").mkdir()
    classifier = started(tmp_path / "classifier", tiny_base, 'labels = ["no", "yes"]')
    writer = started(tmp_path / "writer", small_bases["llama"], 'task = "causal-lm", head = "frozen", max_length = 24')

    done = CliRunner().invoke(app, [*classifier, "--format", "onnx"], catch_exceptions=False)
    assert done.output == f"ONNX graph after 0 of 3 rounds in {tmp_path / 'classifier' / 'onnx'}\n"
    assert {"model.onnx", "tokenizer.json", "fedloom.json", "README.md"} <= names(tmp_path / "classifier" / "onnx")
    for weights, size in (("f32", 4), ("f16", 2)):
        words = [*writer, "--format", "gguf", "--weights", weights, "--json"]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        folder = tmp_path / "writer" / "gguf"
        assert json.loads(done.stdout) == {"path": str(folder), "format": "gguf", "rounds": 0, "of": 3}
        assert names(folder) == {"model.gguf", "adapter.gguf", "fedloom.json", "README.md"}
        (matrix,) = [each for each in GGUFReader(folder / "model.gguf").tensors if each.name == "output.weight"]
        assert matrix.data.dtype.itemsize == size

    with pytest.raises(ModelError, match="this is a BertForSequenceClassification"):
        CliRunner().invoke(app, [*classifier, "--format", "gguf"], catch_exceptions=False)
    with pytest.raises(ModelError, match="CausalLM generates texts"):
        CliRunner().invoke(app, [*writer, "--format", "onnx"], catch_exceptions=False)


def names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def test_scores_of_the_exported_round_are_on_the_card(tmp_path: Path, tiny_base: Path) -> None:
    words = started(tmp_path, tiny_base, 'labels = ["no", "yes"]')
    record = RoundRecord(0, 0, 0.5, 0.75, None, None, 0, 0, 0.0, metrics={"f1": 0.25})
    recorder = JsonLines(tmp_path)
    recorder.record(replace(record, round=1, accuracy=0.9))  # of another round
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert "held-out" not in (tmp_path / "adapter" / "README.md").read_text()

    recorder.record(record)
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0

    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "- Accuracy on the coordinator's held-out rows: 0.5000\n" in card
    assert "- f1 on the coordinator's held-out rows: 0.2500\n" in card
    known = json.loads((tmp_path / "adapter" / "fedloom.json").read_text())
    assert (known["held_out_accuracy"], known["held_out_loss"], known["held_out_metrics"]) == (0.5, 0.75, {"f1": 0.25})


def test_a_missing_state_directory_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_bytes((Path(__file__).parents[2] / "examples" / "sentiment.toml").read_bytes())

    done = fedloom("export", run, "--state", tmp_path / "nowhere", "--set", "privacy.enabled=false")

    assert done.returncode == 2
    assert "nowhere does not exist" in done.stderr
    assert not (tmp_path / "nowhere").exists()
