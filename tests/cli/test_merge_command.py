"""`fedloom merge`: what PEFT makes of the result, what a run that goes on from it does, and what is refused."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.base_folder import base_digest
from fedloom.client.models.exports.loading import load_exported
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.models.load import load_model
from fedloom.client.models.start import start_of
from fedloom.core.config.run import AdapterSection, ModelSection, RunConfig
from fedloom.core.errors import ConfigError, ModelError, SchemaError
from fedloom.core.privacy.accounting import Spend, epsilon, statement
from fedloom.strategies.start import starting_adapter

Build = Callable[[AdapterSection], AdapterModel]
FACTS: dict[str, Any] = {
    "base": "tiny",
    "base_digest": "sha256:" + "0" * 64,
    "task": "text-classification",
    "labels": ["negative", "positive"],
}
TOKENS = torch.tensor([[101, 2204, 2143, 102], [101, 6659, 5436, 102]])


def invoke(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["merge", *map(str, words)], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def saved(model: AdapterModel, folder: Path, seed: int, **facts: Any) -> Path:
    """A PEFT adapter of random values."""
    draw = np.random.default_rng(seed)
    model.load({s.name: draw.normal(0, 0.3, s.shape).astype(np.float32) for s in model.schema.tensors})
    save_adapter(model, folder, {**FACTS, "run": folder.name, "privacy": None, **facts})
    return folder


@pytest.fixture
def pair(build_model: Build, tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of one base model, of other ranks and scales."""
    one = saved(build_model(AdapterSection(rank=3, alpha=6)), tmp_path / "one", 1)
    return one, saved(build_model(AdapterSection(rank=2, alpha=8)), tmp_path / "two", 2)


def added_up(base: Any, folders: tuple[Path, ...], parts: tuple[float, ...]) -> Any:
    """The base model with the mean of the dense changes in its weights, and of the heads in the place of its own."""
    for module in {name.partition(".lora_")[0] for name in load_file(folders[0] / "adapter_model.safetensors")}:
        for folder, part in zip(folders, parts, strict=True):
            tensors = load_file(folder / "adapter_model.safetensors")
            settings = json.loads((folder / "adapter_config.json").read_text())
            if f"{module}.lora_A.weight" in tensors:
                b, a = (torch.from_numpy(tensors[f"{module}.lora_{side}.weight"]) for side in "BA")
                change = part * settings["lora_alpha"] / settings["r"] * (b @ a)
                weight = base.get_submodule(module.removeprefix("base_model.model.")).weight
                weight.data += change.T if settings["fan_in_fan_out"] else change
            else:
                value = base.get_parameter(module.removeprefix("base_model.model."))
                value.data = part * torch.from_numpy(tensors[module]) + (value.data if folder != folders[0] else 0)
    return base.eval()


def test_peft_loads_the_mean_of_the_models(pair: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    document = json.loads(invoke(*pair, "--out", tmp_path / "merged", "--weights", "1,3", "--json"))

    assert (document["rank"], document["alpha"]) == (5, 10.0)
    assert document["relative_error"] < 1e-7

    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    with torch.no_grad():
        expected = added_up(base, pair, (0.25, 0.75))(TOKENS).logits
        merged, one = (load_exported(tiny_base, each, 2)(TOKENS).logits for each in (tmp_path / "merged", pair[0]))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert (one - expected).abs().max() > 1e-2


def test_transposed_layers_are_merged_too(
    build_task: Callable[..., AdapterModel], small_bases: dict[str, Path], tmp_path: Path
) -> None:
    model = build_task("gpt2", "causal-lm")
    folders = (saved(model, tmp_path / "one", 1), saved(model, tmp_path / "two", 2))
    invoke(*folders, "--out", tmp_path / "merged")

    tokens = torch.tensor([[5, 9, 40, 41]])
    base = AutoModelForCausalLM.from_pretrained(small_bases["gpt2"])
    with torch.no_grad():
        merged = load_exported(small_bases["gpt2"], tmp_path / "merged", 0, "causal-lm")
        expected = added_up(base, folders, (0.5, 0.5))(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "bias", "head"])
def test_a_run_goes_on_from_a_merged_adapter(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    section = ModelSection(base=str(tiny_base), labels=("negative", "positive"), max_length=16)
    adapter = AdapterSection(kind=kind, **({"rank": 2, "alpha": 6} if kind == "lora" else {}))
    model = load_model(section, adapter)
    folders = [saved(model, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    document = json.loads(invoke(*folders, "--out", tmp_path / "merged", "--json"))
    wider = {"rank": document["rank"], "alpha": document["alpha"]} if kind == "lora" else {}
    config = RunConfig.model_validate(
        {
            "run": {"name": "more", "rounds": 1},
            "model": section.model_dump(),
            "adapter": {"kind": kind, **wider},
            "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1},
            "privacy": {"enabled": False},
            "start": {"adapter": str(tmp_path / "merged")},
        }
    )

    begun = load_model(section, config.adapter)
    begun.load(start_of(config, begun))

    with torch.no_grad():
        merged = load_exported(tiny_base, tmp_path / "merged", 2)
        torch.testing.assert_close(begun.model(TOKENS).logits, merged(TOKENS).logits, rtol=0, atol=1e-5)
        begun.load(starting_adapter(begun.schema, 0))
        assert (begun.model(TOKENS).logits - merged(TOKENS).logits).abs().max() > 1e-2


def test_what_is_told_beside_the_weights(build_model: Build, tmp_path: Path) -> None:
    model, spends = build_model(AdapterSection(rank=2, alpha=4)), (Spend(0.1, 2.0, 30), Spend(0.2, 1.5, 10))
    stated = [statement([spend], delta).document() for spend, delta in zip(spends, (1e-6, 1e-5), strict=True)]
    folders = [saved(model, tmp_path / str(seed), seed, privacy=each) for seed, each in enumerate(stated)]
    open_run = saved(model, tmp_path / "open", 5)

    text = invoke(*folders, "--out", tmp_path / "merged", "--method", "task-arithmetic", "--scaling", "0.7")

    known = json.loads((tmp_path / "merged" / "fedloom.json").read_text())
    assert {key: known[key] for key in FACTS} == FACTS
    assert known["merged"]["options"] == {"scaling": 0.7}
    assert [each["privacy"] for each in known["merged"]["adapters"]] == json.loads(json.dumps(stated))
    # An example may be in the data of both: what both runs did to it is composed.
    assert known["privacy"]["epsilon"] == pytest.approx(epsilon(spends, 1e-5, 1e-4))
    assert known["privacy"]["epsilon"] > max(each["epsilon"] for each in stated[1:])
    assert "for an example in all of them" in text
    # Also of weight 0: a greedy soup has looked at what it leaves out.
    invoke(*folders, open_run, "--out", tmp_path / "other", "--weights", "1,1,0")
    assert json.loads((tmp_path / "other" / "fedloom.json").read_text())["privacy"] is None


def test_a_rank_loses_what_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert "0.00% of the energy" in invoke(*pair, "--out", tmp_path / "all", "--rank", "exact")
    document = json.loads(invoke(*pair, "--out", tmp_path / "cut", "--rank", "2", "--json"))
    whole, cut = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("all", "cut"))
    squares = []
    for layer in document["layers"]:
        change, kept = (
            2.0 * each[f"{layer['module']}.lora_B.weight"] @ each[f"{layer['module']}.lora_A.weight"]
            for each in (whole, cut)
        )
        squares.append((np.sum((change - kept) ** 2), np.sum(change**2)))
        assert layer["relative_error"] == pytest.approx(np.sqrt(squares[-1][0] / squares[-1][1]), rel=1e-3)
    assert document["energy_lost"] == pytest.approx(
        sum(lost for lost, _ in squares) / sum(total for _, total in squares), rel=1e-3
    )
    part = json.loads(invoke(*pair, "--out", tmp_path / "most", "--energy", "0.9", "--json"))
    assert 2 < part["rank"] < 5
    assert part["energy_lost"] <= 0.1


def test_equal_adapters_give_equal_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    options = ["--method", "dare", "--density", "0.5", "--seed", "7", "--rank", "4"]
    for each in ("a", "b"):
        invoke(*pair, "--out", tmp_path / each / "merged", *options)

    one, two = ({path.name: path.read_bytes() for path in (tmp_path / each / "merged").iterdir()} for each in "ab")
    assert one == two
    assert one.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", "fedloom.json"}


def edit(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("fedloom.json", {"base_digest": "sha256:" + "1" * 64}, "one was trained with base model 'sha256:0.*: *1"),
        ("fedloom.json", {"labels": ["positive", "negative"]}, "labels .* in the same order"),
        ("fedloom.json", {"task": "causal-lm"}, "task 'text-classification', and .*two with 'causal-lm'"),
        ("adapter_config.json", {"bias": "all"}, "bias 'none'"),
        ("adapter_config.json", {"use_dora": True}, "two has use_dora = true"),
        ("adapter_config.json", {"init_lora_weights": "pissa"}, 'two has init_lora_weights = "pissa"'),
        ("adapter_config.json", {"peft_type": "IA3"}, "kind IA3"),
        ("adapter_config.json", {"r": 0}, "cannot be read"),
    ],
)
def test_adapters_that_do_not_belong_together_are_refused(
    file: str, values: dict[str, Any], said: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    edit(pair[1], file, **values)

    with pytest.raises(ConfigError, match=said):
        invoke(*pair, "--out", tmp_path / "merged")

    assert not (tmp_path / "merged").exists()


def test_adapters_without_facts_are_told_apart_by_their_base_models_names(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (pair[1] / "fedloom.json").unlink()
    edit(pair[1], "adapter_config.json", base_model_name_or_path="tiny")
    invoke(*pair, "--out", tmp_path / "merged")
    edit(pair[1], "adapter_config.json", base_model_name_or_path="other")
    with pytest.raises(ConfigError, match=r"base model 'tiny', and .*two with 'other'"):
        invoke(*pair, "--out", tmp_path / "merged")


def test_biases_are_merged_by_their_mean_only(build_model: Build, tmp_path: Path) -> None:
    folder = saved(build_model(AdapterSection(kind="bias")), tmp_path / "biases", 1)

    with pytest.raises(ConfigError, match="TaskArithmetic needs their changes; merge them with the method soup"):
        invoke(folder, folder, "--out", tmp_path / "merged", "--method", "task-arithmetic")


def tamper(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_tensors_that_make_no_adapter_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pair
    names = sorted(load_file(two / "adapter_model.safetensors"))
    factor = next(each for each in names if each.endswith("lora_A.weight"))
    head = next(each for each in names if each.endswith("classifier.bias"))
    content = (two / "adapter_model.safetensors").read_bytes()

    def refused(change: Callable[[dict[str, Any]], Any], said: str, kind: type[Exception] = ConfigError) -> None:
        tamper(two, change)
        with pytest.raises(kind, match=said):
            invoke(one, two, "--out", tmp_path / "merged")
        (two / "adapter_model.safetensors").write_bytes(content)

    refused(lambda tensors: tensors.pop(factor), "no pair of matrices")
    refused(lambda tensors: tensors[factor].fill(np.nan), "NaN or Inf in")
    refused(
        lambda tensors: tensors.update({head: np.zeros(3, np.float32)}), r"\(2,\) and adapter 2 \(3,\)", SchemaError
    )
    refused(lambda tensors: tensors.update({"m.lora_magnitude_vector": np.ones(2)}), "only pairs on linear layers")
    (two / "adapter_model.safetensors").write_bytes(content[:100])
    with pytest.raises(ConfigError, match="cannot be read"):
        invoke(one, two, "--out", tmp_path / "merged")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--weights", "1"], "one finite number for each adapter"),
        (["--weights", "1,x"], "with commas between them"),
        (
            ["--weights", "1e39,-1e39", "--method", "task-arithmetic"],
            "is beyond float32 after merging; lower the weights",
        ),
        (["--rank", "full"], 'an integer from 1 up, or "exact"'),
        (["--rank", "exact", "--energy", "0.9"], "leave one of them out"),
        (["--density", "0.5"], "soup takes no density"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: list[str], said: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        invoke(*pair, "--out", tmp_path / "merged", *options)


def test_a_folder_of_other_things_is_left_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("years of work")

    with pytest.raises(ConfigError, match=r"holds chapter-1\.tex"):
        invoke(*pair, "--out", tmp_path / "thesis")
    with pytest.raises(ConfigError, match="holds no PEFT adapter"):
        invoke(tmp_path / "thesis", "--out", tmp_path / "merged")

    assert [each.name for each in (tmp_path / "thesis").iterdir()] == ["chapter-1.tex"]


@pytest.fixture
def scored(tmp_path: Path, tiny_base: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run file and held-out rows."""
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(
        f"""
        run = {{ name = "tiny", rounds = 1 }}
        model = {{ base = "{tiny_base}", labels = ["negative", "positive"], max_length = 16 }}
        adapter = {{ rank = 2, alpha = 4 }}
        train = {{ steps = 1, sampling_rate = 0.5, learning_rate = 0.3 }}
        """
    )
    with Path("held_out.csv").open("w", newline="") as file:
        names = (rows.label_names[each] for each in rows.labels)
        csv.writer(file).writerows([("text", "label"), *zip(rows.texts, names, strict=True)])
    return tmp_path


def accuracy(adapter: Path) -> float:
    words = ["evaluate", "run.toml", "--adapter", str(adapter), "--data", "held_out.csv", "--json"]
    return float(json.loads(CliRunner().invoke(app, words).stdout)["now"]["accuracy"])


@pytest.mark.slow
def test_a_greedy_soup_leaves_out_what_harms_it(build_model: Build, tiny_base: Path, scored: Path) -> None:
    model, digest = build_model(AdapterSection(rank=2, alpha=4)), base_digest(tiny_base)
    folders = [saved(model, scored / str(seed), seed, base_digest=digest) for seed in range(3)]
    options = ["--method", "greedy-soup", "--run", "run.toml", "--score-on", "held_out.csv"]

    document = json.loads(invoke(*folders, "--out", scored / "soup", *options, "--json"))

    assert document["scores"] == [accuracy(folder) for folder in folders]
    assert document["score"] == accuracy(scored / "soup") >= max(document["scores"])
    taken = [each["weight"] for each in document["adapters"]]
    assert set(taken) == {0.0, 1.0}
    invoke(*(folder for folder, weight in zip(folders, taken, strict=True) if weight), "--out", scored / "plain")
    assert accuracy(scored / "plain") == document["score"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "greedy-soup"], "give the run file that they were trained with as --run"),
        (["--method", "greedy-soup", "--run", "run.toml"], r"run\.toml has no \[data\] section"),
        (["--method", "greedy-soup", "--weights", "1,2"], "leave out --weights, or take soup"),
        (["--score-on", "held_out.csv"], "soup takes no --score-on; leave it out, or take greedy-soup"),
    ],
)
def test_a_score_needs_rows_and_somebody_who_uses_it(
    options: list[str], said: str, pair: tuple[Path, Path], scored: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        invoke(*pair, "--out", scored / "merged", *options)


def test_adapters_of_another_base_model_are_not_scored(pair: tuple[Path, Path], scored: Path) -> None:
    with pytest.raises(ModelError, match="trained with base_digest 'sha256:000"):
        invoke(*pair, "--out", "merged", "--method", "greedy-soup", "--run", "run.toml", "--score-on", "held_out.csv")


def test_merging_loads_no_torch(pair: tuple[Path, Path], tmp_path: Path) -> None:
    code = "import sys; from fedloom.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "merge", *map(str, pair), "--out", str(tmp_path / "merged")]

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()
