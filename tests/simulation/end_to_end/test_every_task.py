"""Every task: two private rounds in one process and over gRPC, and a result that reloads to equal answers."""

import json
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from fedloom.client.doctor.plan import plan_memory
from fedloom.client.models.load import load_model
from fedloom.client.policy import ComputePolicy
from fedloom.client.tasks.api import task_named
from fedloom.client.training.gradients import batch_loss
from fedloom.client.training.microbatch import example_bytes
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ModelError
from fedloom.core.registry import entries
from fedloom.core.schema import Tensors
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.storage.local import Store
from fedloom.simulation.federation import build, completed
from fedloom.simulation.in_process.engine import run_inprocess, standing_clock
from fedloom.simulation.simulate import simulate
from fedloom.strategies.start import starting_adapter
from tests.conftest import byte_tokenizer
from tests.families import save_family
from tests.support.engines import entropy_of, largest_difference, over_sockets

WORDS = ("good", "bad", "film", "plot", "actor", "very", "great", "sad")
NAMES = ("low", "middle", "high")
TEACHER = np.random.default_rng(3).normal(0, 1, (len(WORDS), 32))
"""A vector for each word, as long as those of the tiny models."""


@dataclass(frozen=True)
class Case:
    """A task on a tiny model of the right family."""

    family: str
    targets: tuple[str, ...]
    model: dict[str, Any] = field(default_factory=dict)
    figures: frozenset[str] = frozenset()
    """What the evaluation says beside accuracy and loss."""


QUERIES, PROJECTIONS = ("query", "value"), ("q_proj", "v_proj")
FROZEN = {"head": "frozen"}
CASES = {
    "multi-label": Case("bert", QUERIES, {"labels": NAMES}, frozenset({"f1_micro", "f1_macro", "auroc"})),
    "regression": Case("bert", QUERIES, figures=frozenset({"rmse", "r2"})),
    "ordinal": Case("distilbert", ("q_lin", "v_lin"), {"labels": NAMES}, frozenset({"mae", "kappa"})),
    "question-answering": Case("bert", QUERIES, figures=frozenset({"exact_match", "f1"})),
    "seq2seq": Case("t5", ("q", "v"), FROZEN, frozenset({"rouge_l", "exact_match"})),
    "sentence-embedding": Case("bert", QUERIES, FROZEN, frozenset({"spearman"})),
    "embedding-regression": Case("bert", QUERIES, FROZEN, frozenset({"cosine"})),
    "dpo": Case("llama", PROJECTIONS, FROZEN, frozenset({"margin"})),
    "orpo": Case("qwen2", PROJECTIONS, FROZEN),
    "kto": Case("gpt2", ("c_attn",), FROZEN),
    "reward": Case("llama", PROJECTIONS),
    "speech-recognition": Case("whisper", PROJECTIONS, FROZEN, frozenset({"wer", "cer"})),
    "audio-classification": Case("whisper", PROJECTIONS, {"labels": NAMES}, frozenset({"f1_macro", "mcc", "ece"})),
    "audio-classification/spectrograms": Case("ast", PROJECTIONS, {"labels": NAMES}),
    "audio-classification/waves": Case("wav2vec2", PROJECTIONS, {"labels": NAMES, "audio_seconds": 1}),
    "image-text": Case("llava", PROJECTIONS, FROZEN, frozenset({"rouge1", "rouge2"})),
}
"""By task, and where a task has several by what the model reads."""


def rows(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Made-up rows whose label can be learned from their words."""
    rng = np.random.default_rng(seed)
    made: list[dict[str, Any]] = []
    for _ in range(count):
        words = [WORDS[each] for each in rng.integers(0, len(WORDS), 6)]
        text, good = " ".join(words), words.count("good") + words.count("great")
        pair = {"prompt": f"{text}: ", "chosen": "good film", "rejected": "bad plot"}
        kinds: dict[str, dict[str, Any]] = {
            "multi-label": {"text": text, "label": [NAMES[each] for each in range(3) if WORDS[each] in words]},
            "regression": {"text": text, "label": float(good)},
            "ordinal": {"text": text, "label": NAMES[min(2, good)]},
            "question-answering": {"question": "Which?", "text": text, "answer": words[2]},
            "seq2seq": {"prompt": text, "completion": " ".join(words[:2])},
            "sentence-embedding": {"text": text, "second": words[0], "label": min(2, good) - 1.0},
            "embedding-regression": {"text": text, "vector": TEACHER[[*map(WORDS.index, words)]].mean(0).tolist()},
            "dpo": pair,
            "orpo": pair,
            "reward": pair,
            "image-text": {"prompt": "film:", "completion": f" {words[0]}"},
            "speech-recognition": {"text": " ".join(words[:2])},
            "audio-classification": {"label": NAMES[min(2, good)]},
            "kto": {"prompt": f"{text}: ", "completion": "good film", "label": good > 1},
        }
        made.append(kinds[task])
    return made


def llava(folder: Path) -> Path:
    """A tiny random model of pictures of 28 by 28 pixels and texts about them."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sees = CLIPVisionConfig(image_size=28, patch_size=14, **size)
    size |= {"initializer_range": 0.2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
    place = tokenizer.convert_tokens_to_ids("<image>")
    reads = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **size)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=sees, text_config=reads, image_token_id=place, vision_feature_layer=-1)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    given = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(image_processor=pictures, tokenizer=tokenizer, image_token="<image>", **given).save_pretrained(
        folder
    )
    return folder


def spoken(text: str) -> npt.NDArray[np.float64]:
    """A tone for each word, half a second in all at 8,000 samples a second."""
    pitches = np.array([200.0 + 300.0 * (*WORDS, *NAMES).index(word) for word in text.split()])
    return np.asarray(0.5 * np.sin(2 * np.pi * np.repeat(pitches, 4000 // len(pitches)) * np.arange(4000) / 8000))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    families = {case.family for case in CASES.values()} - {"llava"}
    found = {family: save_family(family, folder / family) for family in families}
    return found | {"llava": llava(folder / "llava")}


@pytest.fixture(params=CASES)
def config(request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path: Path) -> RunConfig:
    """Two clients, two private rounds."""
    case, task, folder = CASES[request.param], request.param.partition("/")[0], tmp_path / "data"
    folder.mkdir()
    for seed, (name, count) in enumerate({"train": 24, "test": 9}.items()):
        found = rows(task, count, seed)
        for number, each in enumerate(found if task_named(task).traits.audio else []):
            said = each.get("text") or each["label"]
            each["audio"] = f"{name}-{number}.wav"
            soundfile.write(folder / each["audio"], spoken(said), 8000)
        for number, each in enumerate(found if task == "image-text" else []):
            each["image"] = f"{name}-{number}.png"
            Image.new("RGB", (30, 28), (30 * WORDS.index(each["completion"].strip()), 90, 20)).save(
                folder / each["image"]
            )
        lines = [json.dumps(each) + "\n" for each in found]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return RunConfig.model_validate(
        {
            "run": {"name": "tasks", "rounds": 2, "seed": 5},
            "model": {"base": str(bases[case.family]), "task": task, "max_length": 48, **case.model},
            "adapter": {"rank": 2, "alpha": 4, "targets": case.targets},
            "train": {"steps": 2, "sampling_rate": 0.5, "learning_rate": 0.2, "microbatch": 8},
            "privacy": {"epsilon": 20.0, "delta": 1e-2},
            "rounds": {"min_clients": 2},
            "data": {"source": str(folder), "clients": 2},
            "evaluation": {"generate": 3 if task_named(task).traits.writes else 0},
            "engine": {"threads": 1, "device": "cpu"},
        }
    )


def test_every_task_that_comes_with_fedloom_is_run_somewhere() -> None:
    elsewhere = {"text-classification", "token-classification", "causal-lm", "instruct", "image-classification"}
    assert {name for name, entry in entries("tasks").items() if entry.ours} == {
        each.partition("/")[0] for each in CASES
    } | elsewhere


def test_two_private_rounds_end_in_a_result_that_reloads_to_equal_answers(config: RunConfig, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers and peft say about each other
        result = simulate(config, tmp_path / "runs")

    assert [record.round for record in result.records] == [0, 1, 2]
    assert result.agreement == 1.0
    assert all(0 < spent <= 20.0 for spent in result.epsilon.values())
    assert CASES[config.model.task].figures <= set(result.final.metrics)
    assert np.isfinite([result.final.accuracy, result.final.loss, *result.final.metrics.values()]).all()


def test_memory_is_planned_as_training_takes_it(config: RunConfig) -> None:
    compute = ComputePolicy(device="cpu")
    if config.model.task == "image-text":  # whose model looks for its pictures' places, which have no values yet
        with pytest.raises(ModelError, match="known only once it is loaded"):
            plan_memory(config.spec, compute)
        return

    planned = plan_memory(config.spec, compute)

    model = load_model(config.model, config.adapter, compute)
    activations = next(part.bytes for part in planned.parts if part.name.startswith("activations"))
    measured = example_bytes(model, partial(batch_loss, model), config.spec)
    assert activations / planned.microbatch == pytest.approx(measured, rel=0.15)


def ended(config: RunConfig, folder: Path, *, sockets: bool = False, one_pass: bool = False) -> Tensors:
    """The adapter that a run ends with, whose noise is known."""
    engine = config.engine.model_copy(update={"one_pass": one_pass})
    ready = completed(config.model_copy(update={"engine": engine}))
    federation = build(ready, folder / "run")
    schema, clock = federation.model.schema, None if sockets else standing_clock
    starting, strategy = starting_adapter(schema, ready.run.seed), build_strategy(ready)
    with Store(folder / "state", durable=False) as store:
        coordinator = Coordinator(ready, schema, strategy, store, starting=starting, clock=clock, expect=2)
        if sockets:
            over_sockets(federation, coordinator)
        else:
            seams = {name: (lambda r, name=name: entropy_of(name, r)) for name in federation.clients}
            for _ in run_inprocess(federation, coordinator, entropy=seams):  # type: ignore[arg-type]
                pass
        assert coordinator.finished
        return coordinator.result()


def test_clients_in_turn_in_one_pass_and_over_sockets_end_alike(config: RunConfig, tmp_path: Path) -> None:
    in_turn = ended(config, tmp_path / "turns")

    assert largest_difference(in_turn, ended(config, tmp_path / "sockets", sockets=True)) < 1e-5
    assert largest_difference(in_turn, ended(config, tmp_path / "pass", one_pass=True)) < 1e-5


def test_a_task_is_learned(config: RunConfig, tmp_path: Path) -> None:
    tables = config.model_dump()
    tables["privacy"]["enabled"] = False
    tables["run"]["rounds"] = 6
    tables["train"] |= {"optimizer": "adam", "learning_rate": 0.02, "head_learning_rate": 0.02, "steps": 6}

    data = Path(tables["data"]["source"])
    (data / "test.jsonl").write_text((data / "train.jsonl").read_text())

    result = simulate(RunConfig.model_validate(tables), tmp_path / "runs")

    assert result.final.loss < 0.98 * result.start.loss
    assert task_named(config.model.task).traits.model
