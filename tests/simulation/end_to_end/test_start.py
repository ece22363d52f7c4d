"""A run may go on from an earlier adapter, head included, and says so where it cannot."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.server.prepared_schema import with_prepared
from fedloom.server.storage.local import Store
from fedloom.simulation.simulate import Result, simulate
from fedloom.strategies.start import stored_start
from tests.families import save_family

FAMILIES = ("bert", "gpt2", "modernbert", "headed")
"""A head and a pooler that the checkpoint lacks; transposed layers; a new norm, which starts at one; a trained head."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, count in {"train": 60, "test": 30}.items():
        rows = [
            {"text": f"film {number % 7} {('great', 'awful')[number % 2]}", "label": number % 2}
            for number in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def base_of(family: str, folder: Path) -> Path:
    if family != "headed":
        return save_family(family, folder)
    save_family("bert", folder)
    settings = AutoConfig.from_pretrained(folder)
    BertForSequenceClassification(settings).save_pretrained(folder)
    return folder


def run_of(base: Path, data: Path, **changes: Any) -> RunConfig:
    tables: dict[str, Any] = {
        "run": {"name": "first", "rounds": 2, "seed": 5},
        "model": {"base": str(base), "labels": ["praise", "blame"], "max_length": 32},
        "adapter": {"rank": 2, "alpha": 4, "targets": "auto"},
        "train": {"steps": 3, "sampling_rate": 0.4, "learning_rate": 0.05, "optimizer": "adam"},
        "privacy": {"enabled": False},
        "data": {"source": str(data), "clients": 2},
        "engine": {"threads": 1},
    }
    for section, values in changes.items():
        tables[section] = {**tables.get(section, {}), **values}
    return RunConfig.model_validate(tables)


def more(base: Path, data: Path, earlier_adapter: Path, **changes: Any) -> RunConfig:
    return run_of(
        base,
        data,
        **{"run": {"name": "more", "rounds": 1, "seed": 6}, "start": {"adapter": str(earlier_adapter)}, **changes},
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "bias", "head"])
def test_a_run_begins_where_an_earlier_one_ended(tmp_path: Path, data: Path, family: str, kind: str) -> None:
    if (family, kind) == ("modernbert", "bias"):
        pytest.skip("has no biases")
    base, adapter = (
        base_of(family, tmp_path / family),
        {"adapter": {"rank": 2, "alpha": 4, "targets": "auto", "kind": kind}},
    )
    first = simulate(run_of(base, data, **adapter), tmp_path / "runs")

    second = simulate(more(base, data, first.folder / "adapter", **adapter), tmp_path / "runs")

    assert second.start.loss == pytest.approx(first.final.loss, rel=1e-5)
    assert second.final.loss != second.start.loss
    assert second.agreement == 1.0
    digest = hashlib.sha256((first.folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    facts = json.loads((second.folder / "adapter" / "fedloom.json").read_text())
    assert facts["start"] == {"adapter": "adapter", "digest": f"sha256:{digest}"}


@pytest.mark.parametrize("strategy", [{"name": "fedsvd"}, {"name": "ffa", "options": {"orthonormal": True}}])
def test_strategies_that_choose_coordinates_keep_the_model_they_are_given(
    tmp_path: Path, data: Path, strategy: dict[str, Any]
) -> None:
    base = base_of("bert", tmp_path / "bert")
    first = simulate(run_of(base, data), tmp_path / "runs")
    still = {"train": {"learning_rate": 1e-9}, "strategy": strategy}

    second = simulate(more(base, data, first.folder / "adapter", **still), tmp_path / "runs")

    assert second.final.loss == pytest.approx(first.final.loss, rel=1e-4)


def written(tmp_path: Path, base: Path, data: Path, start: Path) -> Path:
    run = tmp_path / "run.toml"
    run.write_text(
        f"""
        run = {{ name = "served", rounds = 1 }}
        model = {{ base = "{base}", labels = ["praise", "blame"], max_length = 32 }}
        adapter = {{ rank = 2, alpha = 4, targets = "auto" }}
        train = {{ steps = 1, sampling_rate = 0.5, learning_rate = 0.1 }}
        privacy = {{ enabled = false }}
        start = {{ adapter = "{start}" }}
        """
    )
    return run


def test_a_coordinator_without_torch_begins_from_what_prepare_wrote(tmp_path: Path, data: Path) -> None:
    base = base_of("headed", tmp_path / "headed")
    first: Result = simulate(run_of(base, data), tmp_path / "runs")
    run = written(tmp_path, base, data, first.folder / "adapter")

    prepared = CliRunner().invoke(app, ["prepare", str(run)])

    assert prepared.exit_code == 0, prepared.output
    file = tmp_path / "run.start.safetensors"
    assert file.name in prepared.output
    document = json.loads((tmp_path / "run.schema.json").read_text())
    config, schema = with_prepared(more(base, data, file), document, run)
    values = stored_start(config, schema)
    with Store(first.folder / "state", durable=False) as store:
        last = store.events()[-1]
    exported = CliRunner().invoke(
        app,
        ["export", str(first.folder / "run.toml"), "--state", str(first.folder / "state"), "--format", "safetensors"],
    )
    assert exported.exit_code == 0, (exported.output, last)
    kept = load_file(first.folder / "adapter.safetensors")
    assert kept.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_allclose(value, kept[name], atol=1e-6)
    # A folder cannot be read without the base model, and the error says what to do.
    with pytest.raises(ConfigError, match="fedloom prepare"):
        stored_start(more(base, data, first.folder / "adapter"), schema)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Path]:
    """A base model and the adapter of a run on it."""
    folder = tmp_path_factory.mktemp("earlier")
    base = base_of("bert", folder / "bert")
    return base, simulate(run_of(base, data), folder / "runs").folder / "adapter"


def edited(tmp_path: Path, adapter: Path, **settings: Any) -> Path:
    copy = tmp_path / "edited"
    copy.mkdir()
    for path in adapter.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    for name, values in settings.items():
        path = copy / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": {"adapter": "nowhere"}}, "nowhere cannot be read"),
        ({"start": {"digest": "sha256:" + "0" * 64}}, "start.digest pins sha256:0000"),
        ({"adapter": {"rank": 4, "alpha": 8}}, "does not fit this run.*set adapter.rank"),
        ({"adapter": {"alpha": 8}}, "has scale 2 .*, and the run's is 4; set adapter.alpha = 4"),
        ({"adapter": {"targets": ["query"]}}, "has, and this run does not train, .*set .adapter."),
        ({"adapter": {"targets": "all-linear"}}, "lacks .*set .adapter."),
        ({"model": {"labels": ["blame", "praise"]}}, "trained for the labels .*set model.labels"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_the_remedy(
    tmp_path: Path, data: Path, earlier: tuple[Path, Path], changes: dict[str, Any], message: str
) -> None:
    base, adapter = earlier
    config = more(base, data, adapter)
    tables = config.model_dump(exclude_none=True)
    for section, values in changes.items():
        tables[section].update(values)

    with pytest.raises(ConfigError, match=message):
        simulate(RunConfig.model_validate(tables), tmp_path / "runs")

    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter_config": {"peft_type": "IA3"}}, "of kind IA3; only LORA"),
        ({"adapter_config": {"use_dora": True}}, "use_dora = true"),
        ({"adapter_config": {"use_rslora": True}}, "has scale 2.82843"),
        ({"fedloom": {"base_digest": "sha256:" + "1" * 64}}, "trained on base model sha256:1111"),
    ],
)
def test_an_adapter_of_another_kind_or_base_is_refused(
    tmp_path: Path, data: Path, earlier: tuple[Path, Path], settings: dict[str, Any], message: str
) -> None:
    base, adapter = earlier

    with pytest.raises(ConfigError, match=message):
        simulate(more(base, data, edited(tmp_path, adapter, **settings)), tmp_path / "runs")


def test_values_that_cannot_be_trained_on_or_sent_are_refused(
    tmp_path: Path, data: Path, earlier: tuple[Path, Path]
) -> None:
    base, adapter = earlier
    copy = edited(tmp_path, adapter)
    tensors = load_file(copy / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    for value, message in ((np.nan, "NaN or Inf"), (1e6, 'wire.broadcast = "fp32"')):
        tensors[name] = np.full_like(tensors[name], value)
        save_file(tensors, copy / "adapter_model.safetensors")
        with pytest.raises(ConfigError, match=message):
            simulate(more(base, data, copy, wire={"broadcast": "fp16"}), tmp_path / "runs")


def test_an_adapter_without_a_head_goes_on_with_a_new_one(
    tmp_path: Path, data: Path, earlier: tuple[Path, Path]
) -> None:
    base, adapter = earlier
    copy = edited(tmp_path, adapter)
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file({name: each for name, each in tensors.items() if ".lora_" in name}, copy / "adapter_model.safetensors")

    result = simulate(more(base, data, copy), tmp_path / "runs")

    assert result.agreement == 1.0


@pytest.mark.filterwarnings("ignore")  # what transformers and peft say about each other
def test_an_adapter_that_peft_alone_has_trained_is_gone_on_from(tmp_path: Path, data: Path) -> None:
    """With a head of its own, dropout that fedloom does not use, and no fedloom.json."""
    base = base_of("headed", tmp_path / "headed")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], lora_dropout=0.1, task_type="SEQ_CLS")
    model = get_peft_model(plain, settings)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], 1e-2)

    def loss(name: str) -> torch.Tensor:
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt", return_token_type_ids=False)
        found: torch.Tensor = model(**batch, labels=torch.tensor([row["label"] for row in rows])).loss
        return found

    for _ in range(5):
        model.train()
        optimizer.zero_grad()
        torch.autograd.backward(loss("train"))
        optimizer.step()
    model.eval().save_pretrained(str(tmp_path / "peft"))
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert all(np.abs(value).max() > 0 for name, value in saved.items() if "lora_B" in name)
    assert not (tmp_path / "peft" / "fedloom.json").exists()

    result = simulate(more(base, data, tmp_path / "peft", adapter={"targets": ["query", "value"]}), tmp_path / "runs")

    with torch.no_grad():
        assert result.start.loss == pytest.approx(float(loss("test")), rel=1e-5)
    assert result.final.loss != result.start.loss
    assert result.agreement == 1.0


@pytest.mark.parametrize(
    "adapter",
    [{"kind": "lora", "dora": True}, {"kind": "lora", "rslora": True}, {"kind": "layernorm"}, {"kind": "lora-sb"}],
    ids=["dora", "rslora", "layernorm", "lora-sb"],
)
def test_kinds_that_count_from_the_base_model_go_on_from_their_results(
    tmp_path: Path, data: Path, earlier: tuple[Path, Path], adapter: dict[str, Any]
) -> None:
    """What PEFT's file has is a value, and the run's tensor its change from the base model's own."""
    base, _ = earlier
    first = simulate(run_of(base, data, adapter=adapter), tmp_path / "runs")

    second = simulate(more(base, data, first.exported, adapter=adapter), tmp_path / "runs")

    assert second.start.loss == pytest.approx(first.final.loss, rel=1e-5)
    assert second.final.loss != second.start.loss


def test_magnitudes_do_not_begin_from_an_adapter_without_them(
    tmp_path: Path, data: Path, earlier: tuple[Path, Path]
) -> None:
    base, adapter = earlier

    with pytest.raises(ConfigError, match=r"use_dora = false, and the run has not; set adapter\.dora to the same"):
        simulate(more(base, data, adapter, adapter={"dora": True}), tmp_path / "runs")
