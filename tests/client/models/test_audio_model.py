"""Recordings and their classes: what a model of sounds reads, its head, its frozen blocks, and its export."""

import io
import json
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    SeamlessM4TFeatureExtractor,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.eval.score import evaluate
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.loading import load_exported, predict
from fedloom.client.models.exports.merged_model import save_merged
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.models.load import load_model
from fedloom.client.policy import ComputePolicy
from fedloom.client.privacy.dp_sgd.probe import probe
from fedloom.client.training.activations import kept_activations
from fedloom.client.training.gradients import batch_loss
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError
from fedloom.core.schema import Role
from tests.families import SOUNDS, SPEECH, save_family

TASK, LABELS = "audio-classification", ("cough", "bark", "speech")
FAMILIES = (*SPEECH, *SOUNDS)
RATE = 16_000
WAVES = ("wav2vec2", "hubert")
LENGTHS = (1600, 3200, 5360, 20_000)
"""Samples of the recordings: some shorter and some longer than what is read."""


def wave(number: int) -> npt.NDArray[np.int16]:
    rng = np.random.default_rng(number)
    tone = np.sin(2 * np.pi * (300 + 400 * number) * np.arange(LENGTHS[number]) / RATE)
    return np.asarray(np.round(8000 * tone + 500 * rng.standard_normal(LENGTHS[number])), np.int16)


def file(samples: npt.NDArray[np.int16], rate: int = RATE, form: str = "WAV") -> bytes:
    made = io.BytesIO()
    soundfile.write(made, samples, rate, format=form)
    return made.getvalue()


def rows_of(*waves: bytes) -> Rows:
    audio = waves or tuple(file(wave(number)) for number in range(len(LENGTHS)))
    texts, count = tuple(f"recording {number}" for number in range(len(audio))), len(audio)
    return Rows(texts, np.arange(count) % 3, ("",) * count, LABELS, TASK, audio=audio)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_family(family, folder / family) for family in FAMILIES}


def section_of(base: Path, seconds: int | None = None) -> ModelSection:
    more = {} if seconds is None else {"audio_seconds": seconds}
    return ModelSection.model_validate({"base": str(base), "task": TASK, "labels": LABELS, **more})


@pytest.fixture(params=FAMILIES)
def section(request: pytest.FixtureRequest, bases: dict[str, Path]) -> ModelSection:
    return section_of(bases[request.param], 1 if request.param in WAVES else None)


@pytest.fixture
def model(section: ModelSection) -> AdapterModel:
    """Pairs on the attention's projections and a head, at random values."""
    loaded = load_model(section, AdapterSection(rank=2, alpha=4))
    rng = np.random.default_rng(1)
    loaded.load({s.name: rng.normal(0, 0.3, s.shape).astype(np.float32) for s in loaded.schema.tensors})
    return loaded


def as_documented(base: str, number: int) -> dict[str, torch.Tensor]:
    """What transformers' own extractor makes of one recording, cut and filled up as its model's page says."""
    extractor = AutoFeatureExtractor.from_pretrained(base)
    samples = wave(number).astype(np.float32) / 32767
    more = {}
    if Path(base).name in WAVES:
        more = {"padding": "max_length", "max_length": RATE, "truncation": True}
    found = extractor(samples, sampling_rate=RATE, return_tensors="pt", **more)
    name = "input_features" if Path(base).name == "whisper" else "input_values"
    return {name: found[name]}


def test_scores_and_loss_are_transformers_own_of_each_recording_alone(
    model: AdapterModel, section: ModelSection, tmp_path: Path
) -> None:
    encoded = encode(rows_of(), model.tokenizer, 64)
    batch = collate(encoded, np.arange(4), 0)
    with torch.no_grad():
        ours = model.logits(batch)
    save_adapter(model, tmp_path / "adapter", {"run": "x", "task": TASK, "labels": list(LABELS)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers and peft say about each other
        plain = AutoModelForAudioClassification.from_pretrained(section.base, num_labels=3)
        theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()

    loss = model.task.loss(ours, batch["labels"])

    for number in range(4):
        labels = batch["labels"][number : number + 1]
        with torch.no_grad():
            alone = theirs(**as_documented(section.base, number), labels=labels)
        torch.testing.assert_close(ours[number : number + 1], alone.logits, rtol=1e-4, atol=1e-4)
        assert float(loss[number]) == pytest.approx(float(alone.loss), rel=1e-3, abs=1e-4)
    score = evaluate(model, encoded, 3)
    assert score.accuracy == pytest.approx(float((ours.argmax(1) == batch["labels"]).float().mean()))
    assert score.loss == pytest.approx(float(F.cross_entropy(ours, batch["labels"])), rel=1e-4)
    assert {"f1_macro", "mcc", "auroc", "ece"} <= set(score.metrics)


def test_a_merged_model_answers_alike_and_says_how_recordings_are_read(
    model: AdapterModel, section: ModelSection, tmp_path: Path
) -> None:
    encoded = encode(rows_of(), model.tokenizer, 64)
    with torch.no_grad():
        ours = model.logits(collate(encoded, np.arange(4), 0))

    save_merged(model, tmp_path / "merged", {"run": "x", "task": TASK, "labels": list(LABELS)}, keep=True)

    again = AutoModelForAudioClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        theirs = torch.cat([again(**as_documented(section.base, number)).logits for number in range(4)])
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "merged").sampling_rate == RATE
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert 'pipeline_tag: "audio-classification"' in card
    assert "AutoFeatureExtractor" in card
    assert "Recordings are brought to" in card


def test_what_stands_on_the_encoder_is_the_head(model: AdapterModel, section: ModelSection) -> None:
    heads = {slot.spec.module.partition(".")[0] for slot in model.slots.values() if slot.spec.role == Role.HEAD}

    assert heads == ({"classifier"} if Path(section.base).name == "ast" else {"projector", "classifier"})
    pairs = {pair.module for pair in model.schema.pairs}
    assert pairs
    assert all(each.rpartition(".")[2] in ("q_proj", "v_proj") for each in pairs)
    assert not any("decoder" in each for each in pairs)


def test_a_checkpoint_with_a_head_goes_on_from_it(section: ModelSection, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: n for n, name in enumerate(LABELS)}}
        AutoModelForAudioClassification.from_pretrained(section.base, **names).save_pretrained(tmp_path)
    AutoFeatureExtractor.from_pretrained(section.base).save_pretrained(tmp_path)
    given = section.model_dump() | {"base": str(tmp_path)}

    model = load_model(ModelSection.model_validate(given), AdapterSection(rank=2, alpha=4))

    modules = ("classifier",) if Path(section.base).name == "ast" else ("classifier", "projector")
    assert model.head.modules == modules
    assert not model.head.new
    with pytest.raises(ModelError, match="has a head that was trained for the labels"):
        load_model(ModelSection.model_validate(given | {"labels": ("a", "b", "c")}), AdapterSection(rank=2, alpha=4))


def test_in_half_precision_a_private_run_may_begin(section: ModelSection) -> None:
    half = load_model(section, AdapterSection(rank=2, alpha=4), ComputePolicy(device="cpu", dtype="bfloat16"))

    probe(half, lambda batch: batch_loss(half, batch), 64)

    assert half.model.dtype == torch.bfloat16
    assert half.probed


@pytest.mark.parametrize("kind", ["head", "lora"])
def test_frozen_blocks_are_computed_once_and_give_equal_scores(section: ModelSection, kind: str) -> None:
    given = {"kind": kind, "targets": "all-linear"} if kind == "head" else {"layers": [1], "rank": 2}
    model = load_model(section, AdapterSection.model_validate(given))
    encoded = encode(rows_of(), model.tokenizer, 64)
    batch = collate(encoded, np.arange(4), 0)
    kept = kept_activations(model, f"{section.base} {kind}", ComputePolicy(device="cpu"))
    with torch.no_grad():
        whole = model.logits(batch)

    assert kept is not None
    for _ in range(2):  # computed, and then read
        with torch.no_grad(), kept.skipping(encoded, np.arange(4), batch):
            torch.testing.assert_close(model.logits(batch), whole, rtol=1e-5, atol=1e-5)
    assert all(encoded.digest(row) in kept._file for row in range(4))


def test_a_recording_is_read_alike_whatever_its_rate_channels_and_form(bases: dict[str, Path]) -> None:
    reader = load_model(section_of(bases["ast"]), AdapterSection(rank=2, alpha=4)).tokenizer
    slow = np.round(8000 * np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)).astype(np.int16)
    fast = np.round(8000 * np.sin(2 * np.pi * 440 * np.arange(8000) / RATE)).astype(np.int16)
    stereo = np.stack([fast + np.int16(100), fast - np.int16(100)], axis=1)

    same = [reader.prepared(each, "x") for each in (file(fast), file(fast, form="FLAC"), file(stereo))]
    near = reader.prepared(file(slow, 8000), "x").astype(float)

    assert all(np.abs(each.astype(int) - fast[: len(each)]).max() <= 1 for each in same)
    assert len(near) == len(same[0]) == reader.length
    assert np.abs(near[200:-200] - fast[200 : reader.length - 200]).max() < 80, "1 % of the tone, but for its ends"


def test_what_is_kept_of_a_short_recording_is_not_taken_for_that_of_another_length(bases: dict[str, Path]) -> None:
    """The results of frozen blocks are kept by it, and these differ in how much silence they have."""
    one, two = (
        encode(rows_of(), load_model(section_of(bases["wav2vec2"], seconds), AdapterSection(rank=2)).tokenizer, 64)
        for seconds in (1, 2)
    )

    np.testing.assert_array_equal(one.media[0], two.media[0])
    assert one.digest(0) != two.digest(0)


def test_a_recording_shorter_than_a_frame_is_read(section: ModelSection, model: AdapterModel) -> None:
    encoded = encode(rows_of(file(np.ones(3, np.int16))), model.tokenizer, 64)

    with torch.no_grad():
        assert torch.isfinite(model.logits(collate(encoded, np.arange(1), 0))).all()


@pytest.mark.parametrize(
    ("family", "seconds", "message"),
    [
        ("whisper", 2, "model.audio_seconds = 2, and the model in .* reads 1; set no more"),
        ("ast", 1, "reads 0.335 s and no other length; remove model.audio_seconds"),
        ("wav2vec2", None, "recordings of any length, and all need the same; set model.audio_seconds"),
    ],
)
def test_a_length_that_does_not_go_with_the_model_is_refused(
    family: str, seconds: int | None, message: str, bases: dict[str, Path]
) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(section_of(bases[family], seconds), AdapterSection(rank=2, alpha=4))


def test_whisper_is_cut_down_to_the_seconds_that_are_asked_for(tmp_path: Path) -> None:
    """As transformers' own encoder of so many positions, whose table is the beginning of the whole one."""
    base = save_family("whisper", tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.from_pretrained(base)
        config.max_source_positions = 150
        torch.manual_seed(1)
        WhisperForConditionalGeneration(config).save_pretrained(base)
    WhisperFeatureExtractor(feature_size=8, chunk_length=3).save_pretrained(base)
    model = load_model(section_of(base, 1), AdapterSection(rank=2, alpha=4))
    rng = np.random.default_rng(1)
    model.load({s.name: rng.normal(0, 0.3, s.shape).astype(np.float32) for s in model.schema.tensors})
    encoded = encode(rows_of(), model.tokenizer, 64)
    batch = collate(encoded, np.arange(4), 0)
    with torch.no_grad():
        ours = model.logits(batch)
    save_adapter(model, tmp_path / "adapter", {"run": "x", "task": TASK, "labels": list(LABELS)})

    assert batch["input_features"].shape == (4, 8, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = AutoModelForAudioClassification.from_pretrained(base, num_labels=3).state_dict()
        table = "encoder.embed_positions.weight"
        config = AutoConfig.from_pretrained(base, num_labels=3, max_source_positions=50)
        plain = AutoModelForAudioClassification.from_config(config)
        plain.load_state_dict(whole | {table: whole[table][:50]})
        theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    waves = [wave(number).astype(np.float32) / 32767 for number in range(4)]
    with torch.no_grad():
        alone = [theirs(**extractor(each, sampling_rate=RATE, return_tensors="pt")).logits for each in waves]
    torch.testing.assert_close(ours, torch.cat(alone), rtol=1e-4, atol=1e-4)
    again = load_exported(base, tmp_path / "adapter", 3, TASK, audio_seconds=1)
    np.testing.assert_array_equal(predict(again, model.task, encoded, 0), ours.argmax(1).numpy())


def test_an_extractor_of_another_kind_is_refused(tmp_path: Path) -> None:
    base = save_family("ast", tmp_path)
    SeamlessM4TFeatureExtractor().save_pretrained(base)

    with pytest.raises(ModelError, match="SeamlessM4TFeatureExtractor is none of Whisper, of AST or of waves"):
        load_model(section_of(base), AdapterSection(rank=2, alpha=4))


def test_a_model_that_cannot_read_what_its_extractor_makes_is_refused(tmp_path: Path) -> None:
    base = save_family("ast", tmp_path)
    settings = json.loads((base / "preprocessor_config.json").read_text())
    (base / "preprocessor_config.json").write_text(json.dumps(settings | {"max_length": 64}))

    with pytest.raises(ModelError, match=r"cannot read recordings of 0\.655 s as its preprocessor_config\.json makes"):
        load_model(section_of(base), AdapterSection(rank=2, alpha=4))


def test_a_model_of_texts_is_refused(small_bases: dict[str, Path]) -> None:
    assert AutoConfig.from_pretrained(small_bases["bert"]).model_type == "bert"
    with pytest.raises(ModelError, match="does not say how recordings are read"):
        load_model(section_of(small_bases["bert"]), AdapterSection(rank=2, alpha=4))
