"""A model of speech that is cut down to the length of its recordings."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import fedloom.api as fl
from fedloom.client.data.media.audio import keep_positions
from fedloom.client.eval.held_out import HeldOut
from fedloom.client.models.load import Base, load_base
from fedloom.client.tasks.api import task_named
from fedloom.core.config.run import ModelSection, RunConfig, Spec
from fedloom.core.errors import ConfigError, ModelError
from fedloom.simulation.simulate import simulate
from tests.families import save_family

TABLE = "model.encoder.embed_positions.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Whisper that reads two seconds, with positions that no formula gives."""
    folder = save_family("whisper", tmp_path_factory.mktemp("bases") / "whisper")
    config = json.loads((folder / "config.json").read_text())
    config["max_source_positions"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    WhisperFeatureExtractor(feature_size=8, chunk_length=2).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights[TABLE] = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(base: Path, seconds: int | None) -> Base:
    return load_base(base, task_named("speech-recognition", max_length=16, audio_seconds=seconds))


def tone(seconds: float = 0.7) -> bytes:
    file = io.BytesIO()
    wave = 0.3 * np.sin(np.arange(int(16_000 * seconds)) / 9)
    soundfile.write(file, wave, 16_000, format="WAV")
    return file.getvalue()


def scores(model: Any, reader: Any) -> torch.Tensor:
    features = torch.from_numpy(reader.inputs([reader.prepared(tone(), "here")])["input_features"])
    with torch.no_grad():
        logits: torch.Tensor = model(input_features=features, decoder_input_ids=torch.tensor([[1, 5, 9]])).logits
    return logits


def test_all_that_the_model_reads_changes_nothing(base: Path) -> None:
    whole, asked = loaded(base, None), loaded(base, 2)

    assert asked.model.config.to_dict() == whole.model.config.to_dict()
    assert asked.reader.extractor.to_dict() == whole.reader.extractor.to_dict()
    assert torch.equal(scores(asked.model, asked.reader), scores(whole.model, whole.reader))


def test_a_short_window_is_the_model_that_transformers_builds_of_fewer_positions(base: Path) -> None:
    short = loaded(base, 1)

    config = WhisperConfig.from_pretrained(base, max_source_positions=50)
    theirs = WhisperForConditionalGeneration(config).eval()
    weights = load_file(base / "model.safetensors")
    weights[TABLE] = weights[TABLE][:50]
    theirs.load_state_dict(weights | {"proj_out.weight": weights["model.decoder.embed_tokens.weight"]})
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    (wave, _rate) = soundfile.read(io.BytesIO(tone()), dtype="float32")
    features = extractor(wave, sampling_rate=16_000, return_tensors="pt")["input_features"]
    assert features.shape == (1, 8, 100)
    with torch.no_grad():
        expected = theirs(input_features=features, decoder_input_ids=torch.tensor([[1, 5, 9]])).logits
    torch.testing.assert_close(scores(short.model, short.reader), expected, rtol=1e-4, atol=1e-4)
    assert short.reader.extractor.to_dict() == extractor.to_dict()
    assert len(short.reader.prepared(tone(1.5), "here")) == 16_000
    assert not torch.allclose(scores(short.model, short.reader), scores(*loaded(base, None)[:2]), atol=1e-3)


def test_more_than_the_model_reads_is_refused(base: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.audio_seconds = 3, and the model in .* reads 2; set no more"):
        loaded(base, 3)


@pytest.mark.parametrize("seconds", [0, -1, 1.5, 3601, "five"])
def test_what_is_no_number_of_seconds_is_refused(base: Path, seconds: Any) -> None:
    with pytest.raises(ConfigError, match="audio_seconds"):
        ModelSection(base=str(base), task="speech-recognition", head="frozen", audio_seconds=seconds)


@pytest.mark.parametrize("task", ["text-classification", "image-classification", "image-text"])
def test_a_task_that_does_not_hear_is_refused(task: str) -> None:
    with pytest.raises(ConfigError, match=f"audio_seconds is for recordings, not {task}"):
        ModelSection(base="b", task=task, labels=("a", "b"), audio_seconds=5)


def test_a_model_without_such_a_table_is_refused() -> None:
    size = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    bart = BartForConditionalGeneration(
        BartConfig(**size, vocab_size=9, encoder_attention_heads=1, decoder_attention_heads=1)
    )
    with pytest.raises(ModelError, match=r"has no table of positions.*remove model\.audio_seconds"):
        keep_positions(bart, SimpleNamespace(nb_max_frames=100))


@pytest.mark.parametrize("frames", [0, 99, 202])
def test_frames_that_are_no_positions_are_refused(base: Path, frames: int) -> None:
    with pytest.raises(ModelError, match=f"{frames} frames .* no whole number of positions up to 100, of 2 frames"):
        keep_positions(loaded(base, None).model, SimpleNamespace(nb_max_frames=frames))


def test_a_run_without_it_is_told_as_before(base: Path) -> None:
    section = {"base": str(base), "task": "speech-recognition", "head": "frozen"}
    train = {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1}
    tables: dict[str, Any] = {"run": {"name": "a", "rounds": 1}, "model": section, "train": train}

    assert "audio_seconds" not in Spec.model_validate(tables).model_dump()["model"]
    told = Spec.model_validate({**tables, "model": {**section, "audio_seconds": 1}})
    assert Spec.model_validate(told.model_dump(mode="json")).model.audio_seconds == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "ssf"], ids=["adapter", "merged model"])
def test_a_run_ends_in_a_result_that_reads_as_long(base: Path, tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, count in {"train": 12, "test": 4}.items():
        rows = [{"audio": f"{name}-{at}.wav", "text": "ten past nine"[: 4 + at % 4]} for at in range(count)]
        for at, row in enumerate(rows):
            (data / row["audio"]).write_bytes(tone(0.3 + 0.1 * at))
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter: dict[str, Any] = {"kind": kind, "targets": ["encoder_attn.q_proj", "fc1"]}
    section = {"base": str(base), "task": "speech-recognition", "head": "frozen", "max_length": 16, "audio_seconds": 1}
    config = RunConfig.model_validate(
        {
            "run": {"name": "short", "rounds": 1},
            "model": section,
            "adapter": adapter,
            "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1, "microbatch": 8},
            "privacy": {"epsilon": 20.0, "delta": 1e-2},
            "data": {"source": str(data), "clients": 2},
            "engine": {"threads": 1, "device": "cpu"},
        }
    )

    result = simulate(config, tmp_path / "runs")

    assert result.agreement == 1.0
    exported = tmp_path / "runs" / "short" / ("adapter" if kind == "lora" else "merged")
    assert json.loads((exported / "fedloom.json").read_text())["audio_seconds"] == 1
    assert "Recordings are brought to 1 seconds" in (exported / "README.md").read_text()
    again = fl.load_adapter(exported, base)
    assert again.config.max_source_positions == 50
    if kind == "ssf":
        assert WhisperFeatureExtractor.from_pretrained(exported).n_samples == 16_000
        assert WhisperForConditionalGeneration.from_pretrained(exported).config.max_source_positions == 50
    longer = config.model_copy(update={"model": config.model.model_copy(update={"audio_seconds": None})})
    with pytest.raises(ModelError, match="was trained with audio_seconds 1, the run file has None"):
        HeldOut.load(longer, str(data)).exported(exported)
