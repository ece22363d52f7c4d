"""Pictures: what a vision model reads, its per-example gradients against a naive loop, and its export."""

import io
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from fedloom.client.data.media.images import ImageProcessor, noise_picture, picture_settings
from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import Encoded, collate, encode, microbatches
from fedloom.client.eval.score import evaluate
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.loading import load_exported, predict
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.models.load import load_model
from fedloom.client.policy import Policy
from fedloom.client.privacy.auditing.audit import _through_the_model
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import AdapterSection, ModelSection, Spec
from fedloom.core.errors import DataError, ModelError
from fedloom.core.schema import Role
from fedloom.proto.messages import Assignment

LABELS = ("cat", "dog", "owl")
TARGETS = {"vit": ("q_proj", "v_proj"), "dinov2": ("q_proj", "v_proj")}


def rows_of(count: int = 6) -> Rows:
    images = tuple(noise_picture(number) for number in range(count))
    texts = tuple(f"picture {number}" for number in range(count))
    return Rows(texts, np.arange(count) % 3, ("",) * count, LABELS, "image-classification", images=images)


@pytest.fixture(params=sorted(TARGETS))
def section(request: pytest.FixtureRequest, vision_bases: dict[str, Path]) -> ModelSection:
    return ModelSection(base=str(vision_bases[request.param]), task="image-classification", labels=LABELS)


@pytest.fixture
def model(section: ModelSection) -> AdapterModel:
    """Pairs on the attention's projections and a head, at random values."""
    loaded = load_model(section, AdapterSection(rank=2, alpha=4, targets=("q_proj", "v_proj")))
    rng = np.random.default_rng(1)
    loaded.load({s.name: rng.normal(0, 0.3, s.shape).astype(np.float32) for s in loaded.schema.tensors})
    return loaded


def test_gradients_equal_a_naive_loop_over_the_pictures(model: AdapterModel) -> None:
    parameters = model.trainable(model.schema.roles)
    batch = collate(encode(rows_of(), model.tokenizer, 64), np.arange(6), 0)

    def loss(part: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model.logits(part), part["labels"], reduction="sum")

    naive = []
    for row in range(6):
        found = torch.autograd.grad(loss({name: value[row : row + 1] for name, value in batch.items()}), parameters)
        naive.append(torch.cat([each.reshape(-1) for each in found]))
    with recording(model.model, parameters) as tape:
        tape.begin(6)
        torch.autograd.backward(loss(batch))
        tape.finish()
        taped = tape.flat.clone()

    torch.testing.assert_close(taped, torch.stack(naive), rtol=1e-3, atol=1e-5)
    assert {Role.HEAD, Role.LORA_A, Role.LORA_B} <= model.schema.roles
    assert all(float(each.norm()) > 1e-2 for each in naive)


def spec_of(section: ModelSection) -> Spec:
    return Spec.model_validate(
        {
            "run": {"name": "pictures", "rounds": 2},
            "model": section.model_dump(),
            "adapter": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
            "train": {"steps": 2, "sampling_rate": 0.5, "learning_rate": 0.5, "microbatch": 2},
            "privacy": {"noise_multiplier": 1.0, "epsilon": 50, "clip_norm": 0.7},
        }
    )


def test_a_private_round_is_probed_charged_and_trained(
    model: AdapterModel, section: ModelSection, policy: Policy, tmp_path: Path
) -> None:
    start = model.read(model.schema)
    with Ledger(tmp_path / "ledger", "sha256:" + "0" * 64) as ledger:
        trainer = Trainer(model, rows_of(), spec_of(section), policy, ledger)
        assert model.probed
        order = Assignment(0, model.schema.roles, model.schema.roles, broadcast_digest="", broadcast_bytes=0)
        moved = trainer.train("pictures", order, start).delta
        assert len(ledger.charges()) == 1

    assert all(np.isfinite(value).all() for value in moved.values())
    assert any(np.abs(value).max() > 0 for value in moved.values())


def test_a_model_of_pictures_that_mixes_a_batch_is_refused(
    model: AdapterModel, section: ModelSection, policy: Policy, tmp_path: Path
) -> None:
    class Mixing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0, keepdim=True)

    head = model.model.get_submodule("base_model.model.classifier.modules_to_save.default")
    model.model.get_submodule("base_model.model.classifier").register_forward_hook(
        lambda _module, _inputs, output: Mixing()(output)
    )
    assert isinstance(head, nn.Linear)

    with (
        Ledger(tmp_path / "ledger", "sha256:" + "0" * 64) as ledger,
        pytest.raises(ModelError, match="sensitivity probe"),
    ):
        Trainer(model, rows_of(), spec_of(section), policy, ledger)


def test_the_audit_takes_a_run_on_pictures(model: AdapterModel, section: ModelSection) -> None:
    assert _through_the_model(model, spec_of(section), Seeded(1), 1e-3, 0.99).verdict == "consistent"


def test_evaluation_and_the_export_agree_with_plain_hugging_face(
    model: AdapterModel, section: ModelSection, tmp_path: Path
) -> None:
    encoded = encode(rows_of(), model.tokenizer, 64)
    save_adapter(model, tmp_path / "adapter", {"run": "x", "task": "image-classification", "labels": list(LABELS)})

    batch = collate(encoded, np.arange(6), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers and peft say about each other
        plain = AutoModelForImageClassification.from_pretrained(section.base, num_labels=3)
        theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        ours, other = model.logits(batch), theirs(pixel_values=batch["pixel_values"]).logits
    torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-4)
    score = evaluate(model, encoded, 4)
    assert score.accuracy == pytest.approx(float((ours.argmax(1) == batch["labels"]).float().mean()))
    assert score.loss == pytest.approx(float(F.cross_entropy(ours, batch["labels"])), rel=1e-4)
    reloaded = load_exported(Path(section.base), tmp_path / "adapter", 3, "image-classification")
    np.testing.assert_array_equal(predict(reloaded, model.task, encoded, 0), ours.argmax(1).numpy())


def test_a_batch_of_pictures(model: AdapterModel) -> None:
    encoded = encode(rows_of(5), model.tokenizer, 64)
    side = model.tokenizer.side

    batch = collate(encoded, np.array([4, 0]), 0)
    empty = collate(encoded, np.array([], np.int64), 0)

    assert batch["pixel_values"].shape == (2, 3, side, side)
    assert batch["labels"].tolist() == [1, 0]
    assert empty["pixel_values"].shape == (0, 3, side, side)
    assert [part.tolist() for part in microbatches(np.arange(5), encoded, 2)] == [[0, 1], [2, 3], [4]]
    assert len(encoded) == 5


def png(array: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_pixels_are_cut_from_the_middle_and_normalised() -> None:
    wide = np.zeros((10, 30, 3))
    wide[:, 10:20] = (255, 0, 51)
    cut = ImageProcessor(8, 8, (0.5, 0.5, 0.2), (0.5, 0.5, 0.1), 0).pixels(png(wide), "x")
    squeezed = ImageProcessor(8, 0, (0.5,) * 3, (0.5,) * 3, 0)

    assert cut.shape == (3, 8, 8)
    assert [int(channel[4, 4]) for channel in cut] == [255, 0, 51]
    assert np.ptp(cut, axis=(1, 2)).max() == 0, "the middle alone has one colour"
    values = ImageProcessor(8, 8, (0.5, 0.5, 0.2), (0.5, 0.5, 0.1), 0).normalised(cut[None])
    np.testing.assert_allclose(values[0, :, 4, 4], [1.0, -1.0, 0.0], atol=1e-6)
    assert squeezed.pixels(png(wide), "x")[0].tolist()[0][0] == 0, "both edges are still there"


def test_grey_turned_and_damaged_pictures() -> None:
    settings = ImageProcessor(4, 0, (0.5,) * 3, (0.5,) * 3, 0)
    assert settings.pixels(png(np.full((4, 4), 9)), "x").tolist() == np.full((3, 4, 4), 9).tolist()
    file = io.BytesIO()
    half = Image.fromarray(np.repeat([[0, 200]], 2, 0).astype(np.uint8)).convert("RGB").resize((4, 4), 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    half.save(file, "TIFF", exif=exif)
    turned = settings.pixels(file.getvalue(), "x")[0]
    assert (turned[0, 0], turned[3, 0]) == (0, 200)
    with pytest.raises(DataError, match="cannot be read as a picture"):
        settings.pixels(b"GIF89a" + bytes(20), "x")


def test_the_settings_are_the_base_models_own(vision_bases: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(vision_bases["dinov2"], tmp_path / "base"))
    assert picture_settings(folder, None) == ImageProcessor(28, 0, (0.5,) * 3, (0.5,) * 3, 2)
    asked = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True}
    asked |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(asked))

    assert picture_settings(folder, None) == ImageProcessor(28, 32, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), 3)
    assert picture_settings(folder, 14) == ImageProcessor(14, 16, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), 3)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    with pytest.raises(ModelError, match="give it a preprocessor_config"):
        picture_settings(folder, None)


def test_a_size_that_the_model_cannot_read_is_refused(vision_bases: dict[str, Path]) -> None:
    def load(base: str) -> AdapterModel:
        section = ModelSection(base=str(vision_bases[base]), task="image-classification", labels=LABELS, image_size=56)
        return load_model(section, AdapterSection(rank=2, targets=TARGETS[base]))

    assert load("dinov2").tokenizer.side == 56
    with pytest.raises(ModelError, match=r"cannot read colour pictures of 56 by 56 pixels; remove model\.image_size"):
        load("vit")


def test_rows_of_pictures_need_one_each() -> None:
    with pytest.raises(DataError, match="1 images for 2 texts"):
        Rows(("a", "b"), np.array([0, 1]), ("", ""), LABELS, "image-classification", images=(noise_picture(0),))


def test_encoded_pictures_have_no_tokens() -> None:
    assert Encoded((), np.zeros(3, np.int64)).targets == ()
