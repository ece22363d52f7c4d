"""`fedloom bench gpu`: all of it runs on a CPU with tiny models, and says so in one sentence where there is no GPU."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.client.benchmarks import gpu
from fedloom.client.benchmarks.gpu import CASES, TINY, bench_gpu, clipped_sum_error
from fedloom.client.benchmarks.random_models import SIZES
from fedloom.client.privacy.dp_sgd.grad_sample import Tape
from fedloom.core.errors import ConfigError

CPU = torch.device("cpu")


def test_the_whole_script_runs_with_tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_REPEATS", 1)

    done = CliRunner().invoke(app, ["bench", "gpu", "--tiny", "--minutes", "5", "--json"])

    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["exactness"].keys() == {"encoder tiny", "decoder tiny"}
    assert max(found["exactness"].values()) < 1e-4
    assert [case["case"] for case in found["cases"]] == [case.name for case in TINY]
    for case in found["cases"]:
        if case.get("skipped") == "bitsandbytes is not installed":
            continue
        assert not [key for key in case if key == "skipped" or key.endswith("_failed")], case
        assert case["ratio_ours"] > 0
        assert 0 < case["noise_share"] < 1
        assert case["ours_tokens_s"] == pytest.approx(1e3 * case["batch"] * case["length"] / case["ours_ms"])
        assert case["trained"] < case["parameters"]
    assert "decoder tiny, bfloat16, 4bit, recomputed" in done.stdout
    assert {"machine", "versions", "device"} <= found.keys()
    one_pass = found["one_pass"]
    assert one_pass["clients"] == 4
    for name in ("private", "open"):
        assert min(one_pass[f"{name}_{key}"] for key in ("in_turn_ms", "one_pass_ms", "speed_up")) > 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ConfigError, match=r"torch .* sees .* CUDA devices here"):
        bench_gpu(minutes=1)


def test_what_has_no_time_or_no_room_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "random_model", full)
    case = TINY[0]
    assert gpu._measured(case, CPU, float("inf"))["skipped"] == "it does not fit into the memory"
    assert gpu._measured(case, CPU, 0.0)["skipped"] == "no time was left"


def test_a_clip_that_lets_more_through_shows_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = Tape.norms
    monkeypatch.setattr(Tape, "norms", lambda tape: 0.99 * norms(tape))

    assert clipped_sum_error("encoder tiny", CPU) > 1e-3


def test_the_models_have_the_sizes_that_they_are_named_for() -> None:

    millions = {}
    for size in {case.size for case in CASES}:
        kind = AutoModelForSequenceClassification if size.startswith("encoder") else AutoModelForCausalLM
        with torch.device("meta"):
            model = kind.from_config(SIZES[size]())
        millions[size] = sum(each.numel() for each in model.parameters()) / 1e6

    assert 350 < millions["encoder 0.4B"] < 360  # RoBERTa-large has 355
    assert 1230 < millions["decoder 1B"] < 1240  # Llama 3.2 1B has 1,236
    assert 8025 < millions["decoder 8B"] < 8035  # Llama 3.1 8B has 8,030
