"""Whole private federations on the other tasks, whose adapters plain Hugging Face code loads."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.client.data.load import load_rows
from fedloom.client.data.rows import digest
from fedloom.client.data.tokens import collate, encode
from fedloom.client.eval.score import Score, evaluate
from fedloom.client.models.load import load_model
from fedloom.core.config.run import RunConfig
from fedloom.simulation import personal
from fedloom.simulation.callbacks import SoFar, StopRun
from fedloom.simulation.federation import build, completed, write_client
from fedloom.simulation.simulate import Watcher, simulate

WORDS = ("good", "bad", "film", "plot", "actor", "very", "great", "sad")


def documents(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    sentences = [[WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(2, 9))] for _ in range(count)]
    if task == "token-classification":
        return [
            {"tokens": each, "tags": ["A" if word in ("film", "plot") else "O" for word in each]} for each in sentences
        ]
    return [
        {"text": " ".join(each)} if i % 2 else {"prompt": f"{each[0]} ", "completion": " ".join(each[1:])}
        for i, each in enumerate(sentences)
    ]


CASES: dict[str, tuple[str, list[str], Any, dict[str, Any]]] = {
    "causal-lm": ("llama", ["q_proj", "v_proj"], AutoModelForCausalLM, {"head": "frozen"}),
    "token-classification": ("bert", ["query", "value"], AutoModelForTokenClassification, {"labels": ["O", "A"]}),
}


@pytest.fixture(params=CASES)
def config(request: pytest.FixtureRequest, small_bases: dict[str, Path], tmp_path: Path) -> RunConfig:
    """Two clients, two private rounds."""
    architecture, targets, _, section = CASES[request.param]
    folder = tmp_path / "data"
    folder.mkdir()
    for seed, (name, count) in enumerate({"train": 24, "test": 8}.items()):
        lines = [json.dumps(each) + "\n" for each in documents(request.param, count, seed)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    model = {"base": str(small_bases[architecture]), "task": request.param, "max_length": 24, **section}
    return RunConfig.model_validate(
        {
            "run": {"name": "tasks", "rounds": 2, "seed": 5},
            "model": model,
            "adapter": {"rank": 2, "alpha": 4, "targets": targets},
            "train": {"steps": 2, "sampling_rate": 0.5, "learning_rate": 0.2, "microbatch": 4},
            "privacy": {"epsilon": 20.0, "delta": 1e-2},
            "strategy": {"name": "fedavg"},
            "rounds": {"min_clients": 2},
            "data": {"source": str(folder), "clients": 2},
            "engine": {"threads": 1},
        }
    )


def test_a_private_federation_ends_in_an_adapter_that_hugging_face_loads(config: RunConfig, tmp_path: Path) -> None:
    result = simulate(config, tmp_path / "runs")

    assert [record.round for record in result.records] == [0, 1, 2]
    assert result.agreement == 1.0
    assert all(0 < spent <= 20.0 for spent in result.epsilon.values())
    assert len(result.epsilon) == 2
    adapter = result.folder / "adapter"
    facts = json.loads((adapter / "fedloom.json").read_text())
    assert (facts["task"], facts["labels"]) == (config.model.task, list(config.model.labels))

    # What somebody who evaluates the folder or the state is told, with the run file's own data.
    for words in (["--adapter", str(adapter)], ["--state", str(result.folder / "state")]):
        done = CliRunner().invoke(app, ["evaluate", str(result.folder / "run.toml"), *words, "--json"])
        scores = json.loads(done.stdout)
        for moment, score in (("start", result.start), ("now", result.final)):
            assert scores[moment]["accuracy"] == score.accuracy
            assert scores[moment]["loss"] == pytest.approx(score.loss, rel=1e-4)
            if config.model.task == "causal-lm":
                assert scores[moment]["perplexity"] == pytest.approx(np.exp(score.loss), rel=1e-3)
            else:
                assert "perplexity" not in scores[moment]

    # The run's own model with the saved values, against what a user of the adapter gets.
    model = load_model(config.model, config.adapter)
    model.load(load_file(adapter / "adapter_model.safetensors"))
    assert config.data is not None
    rows = load_rows(config.data.source, config.model.labels, "test", config.model.task)
    batch = collate(encode(rows, model.tokenizer, 24), np.arange(8), model.tokenizer.pad_token_id)
    kind = CASES[config.model.task][2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers and peft say about each other
        arguments = {"num_labels": len(config.model.labels)} if config.model.labels else {}
        plain = kind.from_pretrained(config.model.base, **arguments).eval()
        untrained = plain(batch["input_ids"], batch["attention_mask"]).logits.detach()
        theirs = PeftModel.from_pretrained(plain, str(adapter)).eval()
    with torch.no_grad():
        ours = model.logits(batch)
        other = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-4)
    assert float((ours - untrained).abs().max()) > 1e-2


def test_a_client_process_reads_the_data_that_is_written_for_it(config: RunConfig, tmp_path: Path) -> None:
    federation = build(completed(config), tmp_path / "run")
    (name, rows), *_ = federation.clients.items()

    policy = write_client(federation.policies[name], rows, tmp_path / name)

    again = load_rows(str(policy.parent / "train.jsonl"), config.model.labels, "train", config.model.task)
    assert digest(again) == digest(rows)
    assert (again.texts, again.words, again.prompts) == (rows.texts, rows.words, rows.prompts)
    assert all(np.array_equal(one, two) for one, two in zip(again.tags, rows.tags, strict=True))


@pytest.mark.parametrize(("every", "stop", "scored"), [(1, 2, 2), (2, 2, 1), (2, 1, 1), (1, 1, 1)])
def test_an_adapter_is_scored_once(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, stop: int, scored: int
) -> None:
    tables = config.model_dump()
    tables["privacy"]["enabled"] = False
    tables["evaluation"]["every"] = every
    taken = list[Score]()

    def counted(*given: Any, **named: Any) -> Score:
        taken.append(evaluate(*given, **named))
        return taken[-1]

    monkeypatch.setattr(personal, "evaluate", counted)

    def after_round(so_far: SoFar) -> None:
        if so_far.records[-1].round == stop:
            raise StopRun

    result = simulate(RunConfig.model_validate(tables), tmp_path / "runs", Watcher(after_round=after_round))

    assert len(taken) == scored  # after each scored round; and at the end, unless that was one
    assert result.final == taken[-1]
    assert result.final.loss == result.records[-1].loss or (every, stop) == (2, 1)


def test_without_privacy_the_held_out_loss_falls(config: RunConfig, tmp_path: Path) -> None:
    tables = config.model_dump()
    tables["privacy"]["enabled"] = False
    tables["run"]["rounds"] = 6
    tables["train"] |= {"optimizer": "adam", "learning_rate": 0.02, "steps": 6}

    result = simulate(RunConfig.model_validate(tables), tmp_path / "runs")

    assert result.final.loss < 0.9 * result.start.loss
