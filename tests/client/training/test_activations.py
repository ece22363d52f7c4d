"""Frozen blocks are computed once for each example, and training does not notice."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedloom.client.data.media.audio import noise_recording
from fedloom.client.data.rows import Rows, digest
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.load import load_model
from fedloom.client.policy import ComputePolicy, Policy
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training import activations
from fedloom.client.training.activations import EncryptedFile, kept_activations
from fedloom.client.training.frozen_prefix import frozen_prefix
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import AdapterSection, ModelSection, Spec
from fedloom.core.schema import Array
from tests.client.rounds import assignment, changed, start
from tests.conftest import TARGETS
from tests.families import save_family

BASE = "sha256:" + "1" * 64
LABELS = ("negative", "positive")

Load = Callable[..., AdapterModel]


@pytest.fixture(autouse=True)
def _no_file_of_another_test() -> None:
    activations._file.cache_clear()


def section(base: Path) -> ModelSection:
    return ModelSection(base=str(base), labels=LABELS, max_length=24, digest=None)


@pytest.fixture
def load(small_bases: dict[str, Path]) -> Load:
    """Makes a model with pairs in its second and last block only, and a head."""

    def make(architecture: str, **adapter: Any) -> AdapterModel:
        values = adapter or {"rank": 2, "alpha": 4, "targets": TARGETS[architecture], "layers": [-1]}
        return load_model(section(small_bases[architecture]), AdapterSection.model_validate(values))

    return make


@contextmanager
def computed(model: AdapterModel) -> Iterator[list[int]]:
    """The number of rows of every pass through the first block."""
    found: list[int] = []
    blocks = next(each for each in model.model.modules() if isinstance(each, nn.ModuleList) and len(each) == 2)
    layer = next(each for each in blocks[0].modules() if not list(each.children()))

    def count(_layer: nn.Module, inputs: tuple[torch.Tensor, ...], _result: Any) -> None:
        found.append(len(inputs[0]))

    handle = layer.register_forward_hook(count)
    try:
        yield found
    finally:
        handle.remove()


def two_rounds(model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, folder: Path) -> list[Array]:
    """What a client sends in two rounds of one seed."""
    sent: list[Array] = []
    with Ledger(folder, digest(rows)) as ledger:
        trainer = Trainer(model, rows, spec, policy, ledger, entropy_for=lambda round: Seeded(5, round))
        with computed(model) as passes:
            for round in range(2):
                sent += trainer.train(
                    "run", assignment(frozenset(model.schema.roles), round=round), start(model)
                ).delta.values()
    return [*sent, np.array(passes)]


@pytest.mark.parametrize("private", [True, False], ids=["private", "open"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_training_is_the_same_and_computes_frozen_blocks_once(
    architecture: str,
    private: bool,
    load: Load,
    small_bases: dict[str, Path],
    rows: Rows,
    spec: Spec,
    policy: Policy,
    tmp_path: Path,
) -> None:
    model = load(architecture)
    pinned = section(small_bases[architecture]).model_copy(update={"digest": BASE})
    spec = changed(spec.model_copy(update={"model": pinned}), privacy={"enabled": private})
    off = policy.model_copy(update={"compute": ComputePolicy(activation_cache_mib=0)})

    *expected, every = two_rounds(model, rows, spec, off, tmp_path / "off")
    *found, once = two_rounds(model, rows, spec, policy, tmp_path / "on")
    *_, again = two_rounds(model, rows, spec, policy, tmp_path / "again")

    whole, apart = (
        np.concatenate([each.ravel() for each in part])
        for part in (expected, [one - other for one, other in zip(found, expected, strict=True)])
    )
    assert np.linalg.norm(whole) > 0
    assert np.linalg.norm(apart) <= 1e-5 * np.linalg.norm(whole)
    assert 0 < once.sum() <= len(rows) < every.sum()  # no example twice, whichever are in a batch together
    assert len(again) == 0  # another trainer of this process finds all that it needs


def test_a_head_alone_needs_no_block(load: Load) -> None:
    prefix = frozen_prefix(load("bert", kind="head"))

    assert prefix is not None
    assert len(prefix.blocks) == 2


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_an_adapter_in_every_block_has_no_frozen_prefix(architecture: str, build_task: Any) -> None:
    assert frozen_prefix(build_task(architecture, "text-classification", labels=LABELS)) is None


@pytest.mark.parametrize("family", ["distilbert", "electra", "roberta", "modernbert", "deberta", "qwen2", "albert"])
def test_a_family_gives_equal_scores_or_has_no_frozen_prefix(family: str, tmp_path: Path) -> None:
    base = save_family(family, tmp_path)
    model = load_model(section(base), AdapterSection(kind="head", targets="all-linear"))

    prefix = frozen_prefix(model)

    assert (prefix is not None) == (family != "albert")


def test_a_model_that_reads_padding_has_no_frozen_prefix(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("bert", kind="head")
    encoder = model.model.get_base_model().bert
    monkeypatch.setattr(encoder.pooler, "forward", lambda hidden: hidden.mean(1))

    assert frozen_prefix(model) is None


def test_pictures_are_kept_too(vision_bases: dict[str, Path]) -> None:
    pictures = ModelSection(base=str(vision_bases["dinov2"]), task="image-classification", labels=LABELS, image_size=28)

    prefix = frozen_prefix(load_model(pictures, AdapterSection(kind="head", targets="all-linear")))

    assert prefix is not None
    assert prefix.width == 32


@pytest.mark.parametrize("targets", [("encoder_attn.v_proj", "fc2"), ("q_proj",)], ids=["decoder", "last of both"])
def test_recordings_are_kept_whatever_is_written_of_them(
    targets: tuple[str, ...], spec: Spec, policy: Policy, tmp_path: Path
) -> None:
    """The decoder has as many blocks as the encoder; what they give depends on the transcript and is not kept."""
    told = ModelSection(
        base=str(save_family("whisper", tmp_path / "base")), task="speech-recognition", head="frozen", digest=BASE
    )
    adapter = AdapterSection.model_validate({"rank": 2, "targets": targets, "layers": [-1]})
    model = load_model(told.model_copy(update={"digest": None}), adapter)
    texts = ("ten past nine", "quiet", "nobody knew", "a long walk", "ten", "a")
    audio = tuple(noise_recording(at % 3) for at in range(6))  # one recording, and two transcripts of it
    rows = Rows(texts, np.zeros(6, int), ("",) * 6, (), told.task, audio=audio, parts=tuple((each,) for each in texts))
    spec = changed(spec.model_copy(update={"model": told, "adapter": adapter}), privacy={"enabled": False})
    off = policy.model_copy(update={"compute": ComputePolicy(activation_cache_mib=0)})

    prefix = frozen_prefix(model)
    *expected, every = two_rounds(model, rows, spec, off, tmp_path / "off")
    *found, once = two_rounds(model, rows, spec, policy, tmp_path / "on")

    assert prefix is not None
    encoder = list(model.model.get_base_model().model.encoder.layers)
    assert prefix.blocks == encoder[:1]
    assert all(np.allclose(one, other, rtol=0, atol=1e-5) for one, other in zip(found, expected, strict=True))
    assert any(np.abs(each).max() > 1e-3 for each in expected)
    assert 0 < once.sum() <= 6 < every.sum()


@pytest.mark.parametrize(("base", "mib"), [(None, 64), (BASE, 0)], ids=["unknown base", "no room"])
def test_nothing_is_kept(base: str | None, mib: int, load: Load) -> None:
    assert kept_activations(load("bert"), base, ComputePolicy(activation_cache_mib=mib)) is None


def test_a_full_file_leaves_the_model_as_it_is(
    load: Load, small_bases: dict[str, Path], rows: Rows, spec: Spec, policy: Policy, tmp_path: Path
) -> None:
    model = load("bert")
    pinned = section(small_bases["bert"]).model_copy(update={"digest": BASE})
    spec = spec.model_copy(update={"model": pinned})
    off = policy.model_copy(update={"compute": ComputePolicy(activation_cache_mib=0)})
    *expected, every = two_rounds(model, rows, spec, off, tmp_path / "off")
    what = (BASE, 1, "torch.float32", "none", "cpu")
    activations._file(what, ComputePolicy().activation_cache_mib << 20)._most = 2000

    *found, passes = two_rounds(model, rows, spec, policy, tmp_path / "on")

    assert len(passes) >= len(every)
    assert all(np.allclose(one, other, rtol=0, atol=1e-6) for one, other in zip(found, expected, strict=True))


def test_the_file_gives_back_what_it_was_given_and_no_one_else_can_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file, secret = EncryptedFile(most=1000), b"a private activation, thirty-nine bytes"

    assert file.write(b"one", secret)
    assert file.write(b"two", secret)
    assert not file.write(b"three", bytes(1000))

    assert (file.read(b"one"), file.read(b"two")) == (secret, secret)
    assert b"three" not in file
    raw = os.pread(file._file.fileno(), 1000, 0)
    assert secret[:8] not in raw
    assert raw[: len(secret)] != raw[48 : 48 + len(secret)]  # no two values are turned by the same key stream
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_the_keeping_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    file = EncryptedFile(most=1000)
    monkeypatch.setattr(os, "pwrite", full)

    assert not file.write(b"one", b"value")
    assert b"one" not in file
