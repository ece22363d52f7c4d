"""The resident model against PEFT's own files and plain linear algebra."""

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.base_folder import base_digest, resolve_base
from fedloom.client.models.load import load_model
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError
from fedloom.core.schema import LORA, Array, Role

Build = Callable[[AdapterSection], AdapterModel]
KINDS = {
    "lora": AdapterSection(rank=4, alpha=8),
    "all-linear": AdapterSection(rank=2, targets=("query", "key", "value", "dense")),
    "bias": AdapterSection(kind="bias"),
    "head": AdapterSection(kind="head"),
}


def random_values(model: AdapterModel, seed: int = 3) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {s.name: rng.normal(0, 0.3, s.shape).astype(np.float32) for s in model.schema.tensors}


def saved(model: AdapterModel, folder: Path) -> dict[str, Array]:
    """What PEFT writes into adapter_model.safetensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no model card for a base model in a local folder
        model.model.save_pretrained(str(folder), safe_serialization=True)
    return dict(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("kind", ["lora", "all-linear"])
def test_schema_names_are_the_keys_peft_saves(kind: str, build_model: Build, tmp_path: Path) -> None:
    model = build_model(KINDS[kind])

    files = saved(model, tmp_path)

    assert {spec.name: spec.shape for spec in model.schema.tensors} == {k: v.shape for k, v in files.items()}
    for name, value in model.read(model.schema).items():
        np.testing.assert_array_equal(value, files[name])


@pytest.mark.parametrize("kind", ["bias", "head"])
def test_other_kinds_are_saved_beside_an_idle_pair(kind: str, build_model: Build, tmp_path: Path) -> None:
    model = build_model(KINDS[kind])

    files = saved(model, tmp_path)

    carrier = {name for name in files if ".lora_" in name}
    # With bias="all" PEFT also saves its two working copies of the head's bias, which it ignores on loading.
    copies = {name for name in files if ".modules_to_save." in name or ".original_module." in name}
    assert {spec.name: spec.shape for spec in model.schema.tensors} == {
        name: value.shape for name, value in files.items() if name not in carrier | copies
    }
    assert all(not files[name].any() for name in carrier if ".lora_B." in name)
    for slot in model.slots.values():
        np.testing.assert_array_equal(files[slot.spec.name], slot.parameter.detach().numpy())


@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        ("lora", {Role.LORA_A, Role.LORA_B, Role.HEAD}),
        ("bias", {Role.BIAS, Role.HEAD}),
        ("head", {Role.HEAD}),
    ],
)
def test_each_kind_has_its_roles(kind: str, roles: set[str], build_model: Build) -> None:
    assert build_model(KINDS[kind]).schema.roles == roles


def test_every_encoder_bias_is_tuned_and_counts_from_the_base(tiny_base: Path, build_model: Build) -> None:
    model = build_model(KINDS["bias"])
    base = load_file(tiny_base / "model.safetensors")
    expected = {f"bert.{name}" for name in base if name.endswith(".bias")}

    biases = model.schema.select([Role.BIAS])
    model.load(biases.zeros())

    assert {f"{spec.module}.bias" for spec in biases.tensors} == expected
    for spec in biases.tensors:
        parameter = model.slots[spec.name].parameter
        stored = base[f"{spec.module}.bias".removeprefix("bert.")]
        np.testing.assert_array_equal(parameter.detach().numpy(), stored)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_can_be_read_back(kind: str, build_model: Build) -> None:
    model = build_model(KINDS[kind])
    values = random_values(model)

    model.load(values)

    # A bias travels as a change: adding it to the base's value and subtracting it again rounds once each way.
    exact = kind != "bias"
    for name, value in model.read(model.schema).items():
        np.testing.assert_allclose(value, values[name], rtol=0, atol=0 if exact else 1e-6)


def test_what_is_read_does_not_follow_the_model(tiny_model: AdapterModel) -> None:
    before = tiny_model.read(tiny_model.schema)
    copies = {name: value.copy() for name, value in before.items()}

    tiny_model.load(random_values(tiny_model))

    for name, value in before.items():
        np.testing.assert_array_equal(value, copies[name])


def test_a_lower_rank_is_padded_with_zeros(tiny_model: AdapterModel) -> None:
    small = tiny_model.schema.with_rank(2).select(LORA)
    ones = {spec.name: np.ones(spec.shape, np.float32) for spec in small.tensors}

    tiny_model.load(ones, rank=2)

    whole = tiny_model.read(tiny_model.schema)
    for pair in tiny_model.schema.pairs:
        assert whole[pair.a][:2].all()
        assert not whole[pair.a][2:].any()
        assert whole[pair.b][:, :2].all()
        assert not whole[pair.b][:, 2:].any()
    for name, value in tiny_model.read(small).items():
        np.testing.assert_array_equal(value, ones[name])


def test_the_adapter_adds_scale_times_b_a(tiny_model: AdapterModel) -> None:
    values = random_values(tiny_model)
    tiny_model.load(values)
    pair = tiny_model.schema.pairs[0]
    layer = tiny_model.model.get_submodule(f"base_model.model.{pair.module}")
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        got = layer(x).numpy()

    weight, bias = (getattr(layer.base_layer, name).detach().numpy() for name in ("weight", "bias"))
    assert tiny_model.schema.scale == 8 / 4
    np.testing.assert_allclose(got, x.numpy() @ (weight + 2.0 * values[pair.b] @ values[pair.a]).T + bias, atol=1e-5)


def test_a_base_correction_equals_w0_plus_scale_b_a(tiny_model: AdapterModel, tiny_base: Path) -> None:
    schema = tiny_model.schema.with_base(3).select([Role.BASE_A, Role.BASE_B])
    base = load_file(tiny_base / "model.safetensors")
    assert not tiny_model.corrections

    for seed in (0, 1):  # a second correction replaces the first, it does not add to it
        rng = np.random.default_rng(seed)
        values = {s.name: rng.normal(0, 0.1, s.shape).astype(np.float32) for s in schema.tensors}
        tiny_model.load(values)

        for pair in tiny_model.schema.pairs:
            layer = tiny_model.model.get_submodule(f"base_model.model.{pair.module}").base_layer
            correction = values[f"{pair.module}.base_B"] @ values[f"{pair.module}.base_A"]
            stored = base[f"{pair.module}.weight".removeprefix("bert.")]
            expected = stored + 2.0 * correction
            np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=0, atol=1e-6)
    assert tiny_model.corrections.keys() == values.keys()

    tiny_model.show(tiny_model.read(tiny_model.schema))  # a result without one
    for pair in tiny_model.schema.pairs:
        layer = tiny_model.model.get_submodule(f"base_model.model.{pair.module}").base_layer
        np.testing.assert_array_equal(
            layer.weight.detach().numpy(), base[f"{pair.module}.weight".removeprefix("bert.")]
        )


def test_reset_puts_only_the_given_roles_back(model_section: ModelSection) -> None:
    model = load_model(model_section, KINDS["lora"])
    initial, values = model.read(model.schema), random_values(model)
    model.load(values)

    model.reset([Role.HEAD])

    for spec in model.schema.tensors:
        expected = initial if spec.role == Role.HEAD else values
        np.testing.assert_array_equal(model.read(model.schema)[spec.name], expected[spec.name])


def test_trainable_is_exactly_the_roles_in_wire_order(tiny_model: AdapterModel) -> None:
    parameters = tiny_model.trainable([Role.LORA_B, Role.HEAD])

    expected = [s.name for s in tiny_model.schema.tensors if s.role in (Role.LORA_B, Role.HEAD)]
    assert [id(p) for p in parameters] == [id(tiny_model.slots[name].parameter) for name in expected]
    assert {id(p) for p in tiny_model.model.parameters() if p.requires_grad} == {id(p) for p in parameters}


def test_an_examples_scores_do_not_depend_on_its_batch(tiny_model: AdapterModel, rows: Rows) -> None:
    encoded, pad = encode(rows, tiny_model.tokenizer, 16), tiny_model.tokenizer.pad_token_id
    with torch.no_grad():
        together = tiny_model.logits(collate(encoded, np.arange(10), pad))
        alone = torch.cat([tiny_model.logits(collate(encoded, np.array([i]), pad)) for i in range(10)])

    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert not tiny_model.model.training


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def test_a_pinned_digest_is_checked(model_section: ModelSection, tiny_base: Path) -> None:
    found = base_digest(tiny_base)

    load_model(model_section.model_copy(update={"digest": found}), KINDS["lora"])

    with pytest.raises(ModelError, match=f"has digest {found}; the run pins sha256:{'0' * 64}"):
        load_model(model_section.model_copy(update={"digest": "sha256:" + "0" * 64}), KINDS["lora"])


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_digest_changes_with_one_byte(copy: Path, tiny_base: Path, file: str) -> None:
    assert base_digest(copy) == base_digest(tiny_base)
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 1

    (copy / file).write_bytes(content)

    assert base_digest(copy) != base_digest(tiny_base)


def test_the_digest_changes_with_a_files_name(copy: Path, tiny_base: Path) -> None:
    (copy / "model.safetensors").rename(copy / "other.safetensors")

    assert base_digest(copy) != base_digest(tiny_base)


def test_only_safetensors_are_read(copy: Path, model_section: ModelSection) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")

    with pytest.raises(ModelError, match=r"has no \*\.safetensors; other weight formats are not read"):
        load_model(model_section.model_copy(update={"base": str(copy)}), KINDS["lora"])


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json; give a folder saved by save_pretrained"):
        resolve_base(str(tmp_path))


def test_a_hub_id_is_the_folder_in_the_cache(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_section: ModelSection
) -> None:
    hub = tmp_path / "hub"
    snapshot = hub / "models--acme--tiny" / "snapshots" / "0a1b"
    shutil.copytree(copy, snapshot)
    (hub / "models--acme--tiny" / "refs").mkdir()
    (hub / "models--acme--tiny" / "refs" / "main").write_text("0a1b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))

    assert resolve_base("acme/tiny") == snapshot
    pinned = {"base": "acme/tiny", "digest": base_digest(copy)}
    assert load_model(model_section.model_copy(update=pinned), KINDS["lora"]).schema


def test_a_hub_id_that_is_not_in_the_cache_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", lambda *host, **_: asked.append(host))

    with pytest.raises(ModelError, match="'acme/tiny' is neither a local folder nor in this machine's hub cache"):
        resolve_base("acme/tiny")

    assert not asked


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoTokenizer"])
def test_code_that_lies_with_a_model_is_not_run_whatever_the_terminal_says(
    copy: Path, model_section: ModelSection, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    auto = {"auto_map": {kind: "own.Own" if kind == "AutoConfig" else ["own.Own", None]}}
    for name, change in (("config.json", {"model_type": "own"}), ("tokenizer_config.json", {"tokenizer_class": "Own"})):
        mine = auto if (kind == "AutoConfig") == (name == "config.json") else {}
        (copy / name).write_text(json.dumps({**json.loads((copy / name).read_text()), **change, **mine}))
    (copy / "own.py").write_text(f"open({str(copy / 'ran')!r}, 'w').close()\nclass Own: model_type = 'own'\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    with suppress(ModelError):
        load_model(model_section.model_copy(update={"base": str(copy)}), KINDS["lora"])

    assert not (copy / "ran").exists()


def test_a_model_that_needs_its_own_code_is_refused(copy: Path, model_section: ModelSection) -> None:
    config = json.loads((copy / "config.json").read_text())
    auto = {"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.Model"}
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto}))
    (copy / "own.py").write_text("")

    with pytest.raises(ModelError, match="brings code of its own, which is never run"):
        load_model(model_section.model_copy(update={"base": str(copy)}), KINDS["lora"])


@pytest.mark.parametrize("content", [b"", b"\xff" * 64], ids=["empty", "garbage"])
def test_damaged_weights_are_refused(copy: Path, model_section: ModelSection, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)

    with pytest.raises(ModelError, match="cannot be loaded for TextClassification"):
        load_model(model_section.model_copy(update={"base": str(copy)}), KINDS["lora"])


@pytest.mark.parametrize("kind", ["lora", "bias"])
def test_an_unknown_target_lists_what_there_is(model_section: ModelSection, kind: str) -> None:
    adapter = AdapterSection.model_validate({"kind": kind, "targets": ["query", "q_proj"]})

    with pytest.raises(ModelError, match=r"targets q_proj: BertFor\w+ has no such .*it has dense, key, q"):
        load_model(model_section, adapter)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_attention_is_torchs_own(build_task: Callable[..., AdapterModel], architecture: str) -> None:
    """It keeps no table of every pair of tokens for the backward pass."""
    model = build_task(architecture, "text-classification", labels=("a", "b"))

    assert model.model.config._attn_implementation == "sdpa"
