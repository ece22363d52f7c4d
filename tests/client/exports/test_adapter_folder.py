"""Fedloom's own folder of an adapter: tensors and options, which `fl.load_adapter` puts on the base model."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file

import fedloom.api as fl
from fedloom.client.adapters.api import Traits
from fedloom.client.adapters.bottleneck.houlsby import Bottleneck
from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.base_folder import base_digest
from fedloom.client.models.exports.adapter_folder import save_folder
from fedloom.client.models.exports.merged_model import save_merged
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.models.exports.result import save_result
from fedloom.client.models.load import load_model
from fedloom.client.models.start import start_of
from fedloom.client.policy import ComputePolicy
from fedloom.core.config.run import AdapterSection, ModelSection, RunConfig
from fedloom.core.errors import ConfigError, ModelError
from tests.conftest import make_model

ADAPTERS = {
    "bottleneck": AdapterSection.model_validate({"kind": "bottleneck", "size": 6, "after": ["output.dense"]}),
    "compacter": AdapterSection.model_validate({"kind": "compacter", "size": 8}),
    "lora": AdapterSection(rank=2),
    "miss": AdapterSection(kind="miss", rank=4),
}


def told(section: ModelSection) -> dict[str, Any]:
    about = {"base": section.base, "base_digest": base_digest(Path(section.base))}
    return {"run": "demo", "task": section.task, "labels": list(section.labels), **about}


def scores(model: Any, reader: AdapterModel, rows: Rows) -> torch.Tensor:
    batch = collate(encode(rows, reader.tokenizer, 16), np.arange(8), reader.tokenizer.pad_token_id)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


@pytest.fixture
def model(model_section: ModelSection) -> AdapterModel:
    return make_model(model_section, ADAPTERS["bottleneck"])


@pytest.fixture
def folder(model: AdapterModel, model_section: ModelSection, tmp_path: Path) -> Path:
    """The export of a bottleneck adapter."""
    save_folder(model, tmp_path / "adapter", told(model_section))
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", ADAPTERS)
def test_whatever_a_run_leaves_is_put_on_its_base_model(
    model_section: ModelSection, rows: Rows, tmp_path: Path, kind: str
) -> None:
    model = make_model(model_section, ADAPTERS[kind])
    save_result(model, tmp_path / "result", told(model_section))

    loaded = fl.load_adapter(tmp_path / "result")

    torch.testing.assert_close(scores(loaded, model, rows), scores(model.model, model, rows), rtol=1e-4, atol=1e-5)
    assert not loaded.training
    assert isinstance(loaded, PeftModel) == (kind == "lora")
    assert scores(loaded, model, rows).std(0).min() > 1e-2


def test_the_folder_has_tensors_options_and_facts(
    folder: Path, model: AdapterModel, model_section: ModelSection
) -> None:
    assert {each.name for each in folder.iterdir()} == {
        "README.md",
        "adapter.json",
        "adapter.safetensors",
        "fedloom.json",
    }
    assert json.loads((folder / "adapter.json").read_text()) == {
        "kind": "bottleneck",
        "size": 6,
        "after": ["output.dense"],
    }
    assert json.loads((folder / "fedloom.json").read_text()) == told(model_section)
    tensors = load_file(folder / "adapter.safetensors")
    assert tensors.keys() == model.slots.keys()
    assert all(np.array_equal(tensors[name], value) for name, value in model.read(model.schema).items())
    assert "fl.load_adapter" in (folder / "README.md").read_text()


def test_the_loaded_model_has_no_more_layers_than_it_needs(folder: Path, model_section: ModelSection) -> None:
    loaded = fl.load_adapter(folder, base=model_section.base)

    names = [name for name, _ in loaded.named_parameters()]
    assert not [name for name in names if "lora_" in name or "modules_to_save" in name]
    assert len([name for name in names if "adapter_" in name]) == 4 * 4
    assert type(loaded).__name__ == "BertForSequenceClassification"


def test_another_base_model_is_refused(folder: Path, small_bases: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"was trained on base model sha256:.*give the base model that it was"):
        fl.load_adapter(folder, base=small_bases["gpt2"])


def test_tensors_of_another_adapter_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    name = next(iter(tensors))
    for spoilt in ({**tensors, name: tensors[name][:1]}, {key: tensors[key] for key in tensors if key != name}):
        save_file(spoilt, folder / "adapter.safetensors")
        with pytest.raises(ModelError, match=r"adapter\.safetensors is not this adapter on .*export it again"):
            fl.load_adapter(folder)
    (folder / "adapter.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=r"adapter\.safetensors is not this adapter"):
        fl.load_adapter(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "os:system"}, "no such adapter"),
        ({"kind": "bottleneck", "size": 0}, "size"),
        ({"kind": "bottleneck", "width": 3}, "width"),
    ],
)
def test_only_an_installed_kind_with_its_own_options_is_loaded(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    (folder / "adapter.json").write_text(json.dumps(options))

    with pytest.raises(ConfigError, match=message):
        fl.load_adapter(folder)


def test_a_folder_without_its_facts_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "fedloom.json").write_text(json.dumps({"run": "demo"}))
    with pytest.raises(ConfigError, match=r"fedloom\.json lacks base; give a folder that a run"):
        fl.load_adapter(folder)
    with pytest.raises(ConfigError, match=r"fedloom\.json cannot be read"):
        fl.load_adapter(tmp_path / "nothing")


def test_other_formats_say_which_one_it_has(model: AdapterModel, tiny_model: AdapterModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not know the adapter kind Bottleneck; export with format fedloom or"):
        save_adapter(model, tmp_path / "peft", {})
    with pytest.raises(ModelError, match="cannot be folded into the base model's weights; export with format fedloom"):
        save_merged(model, tmp_path / "merged", {})
    with pytest.raises(ModelError, match="only fedloom can load, and LoRA is none; export with format peft or"):
        save_folder(tiny_model, tmp_path / "own", {})
    assert not list(tmp_path.iterdir())


class Unlisted(Bottleneck):
    """A kind that is installed nowhere."""

    traits: ClassVar[Traits] = Traits(peft=False, merges=False)


def test_a_kind_that_nobody_could_find_is_not_exported(model: AdapterModel, tmp_path: Path) -> None:
    model.adapter = Unlisted(size=6)

    with pytest.raises(ConfigError, match="Unlisted is not installed, and its export would name it"):
        save_folder(model, tmp_path / "adapter", {})
    assert not list(tmp_path.iterdir())


def test_a_model_of_half_precision_exports_what_it_trained(small_bases: dict[str, Path], tmp_path: Path) -> None:
    section = ModelSection(base=str(small_bases["llama"]), labels=("no", "yes"), max_length=16)
    whole = make_model(section, ADAPTERS["compacter"])
    half = load_model(section, ADAPTERS["compacter"], ComputePolicy(device="cpu", dtype="bfloat16"))
    half.load(whole.read(whole.schema))

    save_folder(half, tmp_path / "adapter", told(section))

    kept = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert all(np.array_equal(kept[name], value) for name, value in whole.read(whole.schema).items())


def test_another_run_goes_on_from_the_folder(folder: Path, model: AdapterModel, model_section: ModelSection) -> None:
    config = RunConfig.model_validate(
        {
            "run": {"name": "on", "rounds": 1},
            "model": model_section.model_dump(exclude_none=True),
            "adapter": ADAPTERS["bottleneck"].model_dump(),
            "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1},
            "privacy": {"enabled": False},
            "start": {"adapter": str(folder)},
        }
    )

    found = start_of(config, load_model(model_section, ADAPTERS["bottleneck"]))

    assert all(np.array_equal(found[name], value) for name, value in model.read(model.schema).items())


def test_a_result_that_cannot_be_merged_says_so(folder: Path) -> None:
    result = fl.Result(run=cast(Any, None), simulated=cast(Any, SimpleNamespace(exported=folder)))

    with pytest.raises(ModelError, match="cannot be merged; use `adapter`, the model with its layers"):
        result.merged()


def test_an_earlier_export_is_replaced_whole(folder: Path, model: AdapterModel, model_section: ModelSection) -> None:
    (folder / "stranger").write_text("")
    with pytest.raises(ConfigError, match="holds stranger"):
        save_folder(model, folder, told(model_section))
    (folder / "stranger").unlink()
    shutil.copy(folder / "adapter.json", folder / "README.md")

    save_folder(model, folder, told(model_section))

    assert "\n# demo\n" in (folder / "README.md").read_text()
