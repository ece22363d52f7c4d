"""Simulations from Python: what they leave is what the same run file leaves, and callbacks may end them."""

import csv
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from transformers import AutoTokenizer

import fedloom.api as fl
from fedloom.client.data.rows import Rows, digest
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.core.errors import ConfigError, DataError, ModelError
from fedloom.core.privacy.accounting import Spend, epsilon
from fedloom.core.runtime.memory import peak_bytes
from fedloom.server.build import build_strategy, calibrated
from fedloom.simulation.in_memory import rows_of
from fedloom.strategies.api import State, Traits
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.transforms.coded_broadcast import CodedBroadcast
from tests.api.conftest import same, tensors

Make = Callable[..., fl.Run]
Go = Callable[..., fl.Result]


def test_memory_and_files_give_the_same_adapter_bit_for_bit(
    tiny_run: Make, go: Go, data: dict[str, Any], tmp_path: Path
) -> None:
    """Any mix of sources, too."""
    files: dict[str, Any] = {"clinic-a": tmp_path / "a.csv", "clinic-b": str(tmp_path / "b.jsonl")}
    with files["clinic-a"].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        writer.writerows([row["label"], row["text"]] for row in data["clinic-a"])
    Path(files["clinic-b"]).write_text("".join(json.dumps(row) + "\n" for row in data["clinic-b"]))

    first, second = go(tiny_run()), go(tiny_run(), files)
    third = go(tiny_run(), {"clinic-a": iter(data["clinic-a"]), "clinic-b": files["clinic-b"]})

    assert same(first.folder / "adapter", second.folder / "adapter")
    assert same(first.folder / "adapter", third.folder / "adapter")
    assert first.score == second.score
    assert not same(first.folder / "adapter", go(tiny_run(seed=4)).folder / "adapter")


def test_a_result_is_what_the_run_folder_holds(tiny_run: Make, go: Go) -> None:
    result = go(tiny_run())
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((result.folder / "summary.json").read_text())

    assert result.metrics.index.tolist() == [0, 1, 2]
    for column in ("accuracy", "loss", "bytes_up", "bytes_down", "clients"):
        assert result.metrics[column].tolist() == [line[column] for line in lines]
    assert result.accuracy == summary["accuracy"] == result.metrics["accuracy"].iloc[-1]
    assert summary["metrics_start"].keys() == summary["metrics"].keys()
    assert summary["loss_start"] == result.metrics["loss"].iloc[0]
    assert 0 < summary["cpu_seconds"] <= sum(os.times()[:4])
    # The kernel counts each processor's pages apart, so that a peak read later may be a little lower.
    assert summary["peak_bytes"] <= 1.05 * peak_bytes()
    assert summary["peak_bytes"] > sum(each.nbytes for each in tensors(result.folder / "adapter").values())
    assert result.privacy == {}
    assert "epsilon" not in result.metrics
    assert fl.load(result.folder / "run.toml").config.train == result.run.config.train
    assert "2 rounds, accuracy" in repr(result)
    assert len(result.plot().axes) == 2


def test_the_adapter_and_the_merged_model_answer_alike(tiny_run: Make, go: Go) -> None:
    result = go(tiny_run())
    inputs = {"input_ids": torch.tensor([[101, 2204, 3185, 102]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}

    with torch.inference_mode():
        ours, merged = result.adapter(**inputs).logits, result.merged()(**inputs).logits
        with result.adapter.disable_adapter():
            plain = result.adapter(**inputs).logits

    np.testing.assert_allclose(ours, merged, rtol=1e-4, atol=1e-5)
    assert not np.allclose(ours, plain, atol=1e-3)
    assert not any("lora" in name for name, _ in result.merged().named_modules())


def test_a_result_is_exported_for_other_programs(tiny_run: Make, go: Go, tmp_path: Path) -> None:
    result = go(tiny_run())

    folder = result.export("onnx", tmp_path / "onnx")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = tokenizer(["great film", "sad"], padding=True, return_token_type_ids=False, return_tensors="pt")
    session = InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in rows.items()})
    with torch.no_grad():
        np.testing.assert_allclose(found, result.adapter(**rows).logits.numpy(), atol=1e-4)
    ours, theirs = (json.loads((each / "fedloom.json").read_text()) for each in (folder, result.folder / "adapter"))
    assert ours == theirs
    with pytest.raises(ModelError, match="this is a BertForSequenceClassification"):
        result.export("gguf", tmp_path / "gguf")
    with pytest.raises(ConfigError, match="format is 'pt'; give onnx or gguf"):
        result.export("pt", tmp_path / "pt")  # type: ignore[arg-type]  # what a caller may try


def test_a_private_run_charges_the_ledgers_in_its_folder(tiny_run: Make, go: Go, data: dict[str, Any]) -> None:
    train = fl.Train(steps=2, sampling_rate=0.5, learning_rate=0.5)
    privacy = fl.DP(epsilon=20, delta=1e-5, noise_multiplier=1.5)

    result = go(tiny_run(train=train, privacy=privacy))

    cost = epsilon([Spend(0.5, 1.5, 4)], 1e-5)
    assert result.epsilon == pytest.approx({"clinic-a": cost, "clinic-b": cost}, abs=1e-3)
    assert result.metrics["epsilon"].iloc[-1] == pytest.approx(cost, abs=1e-3)
    assert np.isnan(result.metrics["epsilon"].iloc[0])
    for name, stated in result.privacy.items():
        assert stated.rounds == 2
        rows = rows_of(data[name], name, result.run.config.model)
        with Ledger(result.folder / "clients" / name / "ledger", digest(rows)) as ledger:
            assert ledger.statement(1e-5, covers="").epsilon == stated.epsilon
    assert len(result.plot().axes) == 3


def test_a_callback_ends_the_run_with_what_is_committed(tiny_run: Make, go: Go) -> None:
    seen: list[fl.SoFar] = []

    def stop(so_far: fl.SoFar) -> None:
        seen.append(so_far)
        if so_far.round == 2:
            raise fl.StopRun

    stopped, short = go(tiny_run(rounds=5), callbacks=[stop]), go(tiny_run(rounds=2))

    assert [each.round for each in seen] == [1, 2]
    assert [each.accuracy for each in seen] == stopped.metrics["accuracy"].tolist()[1:]
    assert seen[1].metrics["loss"].equals(stopped.metrics["loss"])
    assert stopped.metrics.index.tolist() == [0, 1, 2]
    assert same(stopped.folder / "adapter", short.folder / "adapter"), "a run of two rounds"


def test_rounds_after_a_stop_cost_no_privacy(tiny_run: Make, go: Go) -> None:
    def stop(_so_far: fl.SoFar) -> None:
        raise fl.StopRun

    train = fl.Train(steps=2, sampling_rate=0.5, learning_rate=0.5)

    result = go(tiny_run(rounds=4, train=train, privacy=fl.DP(epsilon=20, noise_multiplier=1.5)), callbacks=[stop])

    assert [stated.rounds for stated in result.privacy.values()] == [1, 1]
    assert max(result.epsilon.values()) == pytest.approx(epsilon([Spend(0.5, 1.5, 2)], 1e-5), abs=1e-3)
    assert json.loads((result.folder / "adapter" / "fedloom.json").read_text())["privacy"]["rounds"] == 1


def test_checkpoints_are_the_adapters_of_their_rounds(tiny_run: Make, go: Go) -> None:
    result, one = go(tiny_run(rounds=4), callbacks=[fl.Checkpoint(every=2)]), go(tiny_run(rounds=2))
    kept = result.folder / "checkpoints"

    assert sorted(path.name for path in kept.iterdir()) == ["round-2", "round-4"]
    assert same(kept / "round-2", one.folder / "adapter")
    assert same(kept / "round-4", result.folder / "adapter")
    assert json.loads((kept / "round-2" / "fedloom.json").read_text())["rounds"] == 2
    with pytest.raises(ConfigError, match="Checkpoint every is 0"):
        fl.Checkpoint(every=0)


def test_an_error_in_a_callback_is_the_callers(tiny_run: Make, go: Go) -> None:
    def fail(_so_far: fl.SoFar) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        go(tiny_run(), callbacks=[fail])


@dataclass(frozen=True)
class Mine(FedAvg):
    """FedAvg under another name, which no package brings."""


@dataclass(frozen=True)
class Stubborn(FedAvg):
    """Keeps what it began with."""

    def commit(self, state: State, acc: Any) -> State:
        return replace(state, round=state.round + 1)


@dataclass(frozen=True)
class Unweighted(FedAvg):
    """Counts every client once."""

    traits: ClassVar[Traits] = Traits(unweighted=True)


def test_a_local_strategy_works_without_being_packaged(tiny_run: Make, go: Go) -> None:
    theirs, ours, none = go(tiny_run()), go(tiny_run(strategy=Mine())), go(tiny_run(strategy=Stubborn()))

    assert same(ours.folder / "adapter", theirs.folder / "adapter")
    assert fl.load(ours.folder / "run.toml").config.strategy.name == "Mine"
    moved, kept = tensors(theirs.folder / "adapter"), tensors(none.folder / "adapter")
    assert [name for name in kept if "lora_B" in name and kept[name].any()] == []
    assert any(moved[name].any() for name in moved if "lora_B" in name)


def test_a_local_strategy_is_told_whether_the_head_is_trained(tiny_run: Make) -> None:
    run = tiny_run(strategy=Mine())

    frozen = run.replace({"model.head": "frozen"})
    for each, told in ((run, True), (frozen, False)):
        assert build_strategy(each.config, run.local_strategy) == CodedBroadcast(Mine(train_head=told), "auto")


def test_a_local_strategy_that_takes_no_weights_gets_none(tiny_run: Make) -> None:
    run = tiny_run(strategy=Unweighted(), privacy=fl.DP(noise_multiplier=1.0))

    assert calibrated(run.config, run.local_strategy).strategy.weighting == "uniform"
    assert calibrated(run.config, Mine()).strategy.weighting == "examples"


def test_without_a_test_set_a_tenth_is_held_out_by_content(
    tiny_run: Make, go: Go, listed: list[dict[str, Any]]
) -> None:
    data = {"clinic-a": listed[:20] * 2, "clinic-b": listed[20:]}

    result = go(tiny_run(), data, test=None)

    held = json.loads((result.folder / "summary.json").read_text())["held_out_examples"]
    assert 0 < held < 20
    with pytest.raises(DataError, match="have too few rows to hold some out for scores; give `test`"):
        go(tiny_run(), {"clinic-a": listed[:1], "clinic-b": listed[:1]}, test=None)


def test_a_folder_is_a_test_set_and_a_file_all_of_one(
    tiny_run: Make, go: Go, listed: list[dict[str, Any]], tmp_path: Path
) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed[30:]))

    by_folder, by_file = go(tiny_run(), test=tmp_path), go(tiny_run(), test=tmp_path / "test.jsonl")

    assert by_folder.score == by_file.score == go(tiny_run()).score


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clinic a": []}, r"name: String should match pattern .* \(received 'clinic a'\)"),
        ({"a": [{"text": "x", "label": "negative"}]}, "the number of clients = 1 is below rounds.min_clients = 2"),
        ([{"text": "x"}], "data is a list; give rows by client"),
        ({"a": "nowhere.csv", "b": []}, "data source 'nowhere.csv' does not exist"),
    ],
)
def test_data_that_make_no_federation_are_refused(given: Any, message: str, tiny_run: Make, go: Go) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        go(tiny_run(), given)


def test_data_of_the_run_file_are_taken_where_none_are_given(tiny_run: Make, tmp_path: Path, rows: Rows) -> None:
    (tmp_path / "data").mkdir()
    for name, part in (("train", range(30)), ("test", range(30, 40))):
        lines = [f"{rows.texts[i]}\t{rows.label_names[rows.labels[i]]}\n" for i in part]
        (tmp_path / "data" / f"{name}.tsv").write_text("text\tlabel\n" + "".join(lines))
    run = tiny_run(data=fl.Data(source=str(tmp_path / "data"), clients=3))

    result = fl.simulate(run, out=tmp_path / "runs", progress=False)

    assert result.metrics["clients"].tolist() == [0, 3, 3]
    with pytest.raises(ConfigError, match="test and form are for data that are given"):
        fl.simulate(run, test="x.csv")


def test_tables_say_what_is_missing_without_pandas(tiny_run: Make, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    result = go(tiny_run(rounds=1))
    monkeypatch.setitem(sys.modules, "pandas", None)

    with pytest.raises(ConfigError, match=r"tables need pandas, .* pip install 'fedloom\[notebook\]'"):
        _ = result.metrics
