"""A card loads what it describes as it is printed, says what is promised, and names no machine."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.facts import facts
from fedloom.client.models.exports.merged_model import save_merged
from fedloom.client.models.exports.onnx_graph import save_onnx
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.core.config.run import AdapterSection, ModelSection, Spec
from fedloom.core.model_card import Form, Purpose, held_out_facts, model_card
from fedloom.core.privacy.spends import run_statement
from tests.conftest import TARGETS, make_model

Build = Callable[..., AdapterModel]
IDS = torch.tensor([[5, 9, 30, 7, 12], [8, 40, 3, 21, 6]])
FORM = Form("peft", ("peft", "lora"), "An adapter.", 'load("BASE", "THIS FOLDER")')


def printed(folder: Path, base: Path | str = "") -> dict[str, Any]:
    """What the card's code leaves, with its two names filled in."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    exec(code.replace("BASE", str(base)).replace("THIS FOLDER", str(folder)), names)
    return names


@pytest.mark.parametrize(
    ("architecture", "task"),
    [("bert", "text-classification"), ("bert", "token-classification"), ("llama", "causal-lm"), ("gpt2", "causal-lm")],
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_and_a_merged_model_load_as_printed(
    build_task: Build, small_bases: dict[str, Path], tmp_path: Path, architecture: str, task: str
) -> None:
    model = build_task(architecture, task)
    with torch.inference_mode():
        expected = model.model(input_ids=IDS).logits
    save_adapter(model, tmp_path / "peft", {"task": task})
    save_merged(model, tmp_path / "merged", {"task": task})

    for folder in ("peft", "merged"):
        loaded = printed(tmp_path / folder, small_bases[architecture])
        with torch.inference_mode():
            found = loaded["model"].eval()(input_ids=IDS).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert loaded["tokenizer"]("a film")["input_ids"] == model.tokenizer("a film")["input_ids"]


@pytest.mark.filterwarnings("ignore")
def test_a_task_of_one_output_loads_as_printed(small_bases: dict[str, Path], tmp_path: Path) -> None:
    """Without the number of outputs transformers would make two."""
    section = ModelSection.model_validate({"base": str(small_bases["bert"]), "task": "regression", "max_length": 24})
    model = make_model(section, AdapterSection(rank=2, alpha=4, targets=TARGETS["bert"]))
    with torch.inference_mode():
        expected = model.model(input_ids=IDS).logits
    assert expected.shape == (2, 1)

    save_adapter(model, tmp_path / "peft", {"task": "regression", "labels": []})

    assert "num_labels=1)" in (tmp_path / "peft" / "README.md").read_text()
    with torch.inference_mode():
        found = printed(tmp_path / "peft", small_bases["bert"])["model"].eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
def test_models_of_images_load_as_printed(vision_bases: dict[str, Path], tmp_path: Path) -> None:
    task, labels = "image-classification", ("a", "b", "c")
    section = ModelSection.model_validate({"base": str(vision_bases["vit"]), "task": task, "labels": labels})
    model = make_model(section, AdapterSection(rank=2, alpha=4, targets=("q_proj", "v_proj")))
    noise = np.random.default_rng(0).integers(0, 255, (28, 28, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    pixels = model.tokenizer.pixels((tmp_path / "image.png").read_bytes(), "image")
    values = torch.from_numpy(model.tokenizer.normalised(pixels[None]))
    with torch.inference_mode():
        expected = model.model(pixel_values=values).logits
    save_adapter(model, tmp_path / "peft", {})
    save_merged(model, tmp_path / "merged", {}, keep=True)
    save_onnx(model, tmp_path / "onnx", {})

    for folder in ("peft", "merged"):
        with torch.inference_mode():
            found = printed(tmp_path / folder, vision_bases["vit"])["model"].eval()(pixel_values=values).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    card = tmp_path / "onnx" / "README.md"
    card.write_text(card.read_text().replace('"IMAGE"', repr(str(tmp_path / "image.png"))))
    np.testing.assert_allclose(printed(tmp_path / "onnx")["logits"], expected, atol=1e-4)


def test_a_graph_loads_as_printed(tiny_model: AdapterModel, tmp_path: Path) -> None:
    rows = tiny_model.tokenizer(["a text", "another"], padding=True, return_token_type_ids=False, return_tensors="pt")
    with torch.inference_mode():
        expected = tiny_model.model(**rows).logits
    save_onnx(tiny_model, tmp_path / "onnx", {})

    np.testing.assert_allclose(printed(tmp_path / "onnx")["logits"], expected, atol=1e-4)


def test_a_hub_reads_the_front_matter(tiny_model: AdapterModel, spec: Spec, tmp_path: Path) -> None:
    named = spec.model_copy(update={"model": spec.model.model_copy(update={"base": "clinic/bert-base"})})
    save_adapter(tiny_model, tmp_path / "peft", facts(named, run_statement(named, 2)))
    save_merged(tiny_model, tmp_path / "merged", facts(spec, None))

    private, plain = (ModelCard.load(tmp_path / name / "README.md") for name in ("peft", "merged"))

    assert (private.data.base_model, private.data.library_name) == ("clinic/bert-base", "peft")
    assert private.data.pipeline_tag == plain.data.pipeline_tag == "text-classification"
    assert set(private.data.tags) == {"fedloom", "federated-learning", "peft", "lora", "differential-privacy"}
    assert (plain.data.base_model, plain.data.library_name) == (None, "transformers")
    assert set(plain.data.tags) == {"fedloom", "federated-learning"}
    assert 'from_pretrained("clinic/bert-base", num_labels=2)' in private.text


def test_the_card_says_what_the_run_was_and_what_is_promised(
    tiny_model: AdapterModel, spec: Spec, tmp_path: Path
) -> None:
    stated = run_statement(spec, 2)
    known = {**facts(spec, stated), **held_out_facts(0.875, 0.25, {"rmse": 1.5})}
    save_adapter(tiny_model, tmp_path / "peft", known)

    card = (tmp_path / "peft" / "README.md").read_text()

    for line in (
        "- Task: text-classification\n",
        "- Columns of a row: text and label\n",
        "- Texts are cut at 16 tokens\n",
        "- Labels, in the order of the model's outputs: `negative`, `positive`\n",
        "- Rounds: 2\n",
        "- Accuracy on the coordinator's held-out rows: 0.8750\n",
        "- Loss on the coordinator's held-out rows: 0.2500\n",
        "- rmse on the coordinator's held-out rows: 1.5000\n",
    ):
        assert line in card
    assert "Protected is one example of one client's data (add or remove one), over this run, at epsilon" in card
    (epsilon,) = re.findall(r"at epsilon ([\d.]+) and delta 1e-05", card)
    assert stated.epsilon <= float(epsilon) < stated.epsilon + 1e-3, "no more is promised than holds"
    assert "Mechanism: DP-SGD on every client" in card
    assert "at norm 0.7 (" in card
    assert f"Accountant: {stated.accountant}." in card
    base = Path(spec.model.base)
    assert str(base.parent) not in card, "a folder of this machine is nobody's business"
    assert f"Base model: `{base.name}`" in card


@pytest.mark.parametrize(
    "privacy",
    [
        None,
        {},
        {"epsilon": 1.0, "delta": 1e-5},
        {"epsilon": "low", "delta": 0, "unit": "", "adjacency": "", "accountant": ""},
    ],
)
def test_without_a_whole_statement_nothing_is_promised(privacy: Any) -> None:
    for known in ({"run": "demo", "privacy": privacy}, {"run": "demo"}):
        card = model_card(known, FORM)

        assert "Trained without differential privacy" in card
        assert "epsilon" not in card
        assert "differential-privacy" not in card
    assert "No guarantee of differential privacy holds" in model_card({"privacy": privacy, "merged": {}}, FORM)


def test_a_guarantee_of_whole_clients_is_told_beside_the_others() -> None:
    user = {"epsilon": 3.00001, "delta": 1e-3, "unit": "one client", "adjacency": "zero out one client"}
    card = model_card({"user_privacy": {**user, "mechanism": "tree noise", "accountant": "exact"}}, FORM)

    assert "Trained without differential privacy" in card
    assert (
        "Protected as well is one client (zero out one client), at epsilon 3.001 and delta 0.001: tree noise." in card
    )


def test_names_that_others_chose_stay_names() -> None:
    known = {"run": "demo", "labels": ["a`b", "c\n# d"], "base": "/data/of/somebody/bert"}
    card = model_card(known, FORM, Purpose("t: [", "text", None, "Read"))

    assert "`a'b`, `c # d`" in card
    assert "/data/of" not in card
    assert "pipeline_tag" not in card
    read: Any = ModelCard(card).data
    assert read.library_name == "peft"
