"""The result as an ONNX graph: a whole model that onnxruntime runs, without torch and transformers."""

import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from fedloom.client.data.media.images import ImageProcessor
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.card import write_card
from fedloom.client.models.exports.merged_model import merge
from fedloom.client.tasks.api import Task
from fedloom.core.errors import ConfigError, ModelError
from fedloom.core.model_card import Form
from fedloom.core.runtime.export_folder import replace_export

__all__ = ["GRAPH", "save_onnx", "write_onnx"]

GRAPH = "model.onnx"
"""What the graph is called in its folder."""

_OPSET = 20
_MOST_BYTES = 2**31 - 2**26
"""What one protobuf message can hold, with room for the graph: larger weights lie in a file of their own."""
_TOLERANCE = 1e-4
_TRACED, _OTHERS = (2, 7), ((1, 3), (3, 13))
"""Batch and length that the graph is traced with, and others that it must be right for too."""

_WHAT = "A whole model, trained with fedloom, as an ONNX graph."

_TEXTS = """import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
session = onnxruntime.InferenceSession("THIS FOLDER/model.onnx")
rows = tokenizer(["a text", "another"], padding=True, return_token_type_ids=False, return_tensors="np")
(logits,) = session.run(None, dict(rows))"""

_IMAGES = """import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("THIS FOLDER/model.onnx")
image = Image.open("IMAGE").convert("RGB").resize(({side}, {side}), {resample})
pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255
pixels = (pixels - np.float32({mean}).reshape(3, 1, 1)) / np.float32({deviation}).reshape(3, 1, 1)
(logits,) = session.run(None, {{"pixel_values": pixels}})"""

_CROPPED = (
    "Images that are not square are scaled until their shorter side has {resized} pixels, and the middle is cut out."
)

Inputs = Mapping[str, torch.Tensor]


def save_onnx(model: AdapterModel, folder: Path, facts: dict[str, Any]) -> None:
    """Write a model with its adapter by `write_onnx`; it is used up.

    Raises:
        ModelError: As by `merge` or `write_onnx`.
        ConfigError: As by `write_onnx`.
    """
    _check(model.task)
    write_onnx(merge(model), model.tokenizer, model.task, folder, facts)


def write_onnx(plain: PreTrainedModel, reader: Any, task: Task, folder: Path, facts: dict[str, Any]) -> None:
    """Write a merged model as model.onnx, with its tokenizer, a card, and `facts` as fedloom.json.

    The graph takes int64 input_ids and attention_mask, shape (batch, length), or float32 pixel_values, shape
    (batch, 3, side, side), and gives float32 logits, shape (batch, outputs) or (batch, length, outputs). Batch and
    length are free. Before anything is written, onnxruntime must give torch's scores for other sizes than the traced
    ones, within 1e-4.

    Args:
        plain: On the CPU in float32, see `merge`; it is left as it was.
        reader: Its tokenizer, or its `ImageProcessor`.
        task: What it was trained for.
        folder: Where to, see `replace_export`.
        facts: See `facts`.

    Raises:
        ModelError: The task generates texts, torch cannot export the model, or the graph gives other scores.
        ConfigError: A package is missing, or the folder holds other files or cannot be written.
    """
    _check(task)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / GRAPH
        _export(plain.eval(), reader, made)
        _compare(plain, reader, made)

        def write(draft: Path) -> None:
            for each in sorted(made.parent.iterdir()):
                shutil.copyfile(each, draft / each.name)
            reader.save_pretrained(str(draft))
            write_card(draft, _form(reader), task, facts)

        replace_export(folder, write)


def _check(task: Task) -> None:
    """Refuse what cannot be, before a model is merged for it."""
    if task.traits.generates or task.traits.audio:
        does, other = ("generates texts", "gguf or merged") if task.traits.generates else ("reads recordings", "merged")
        raise ModelError(
            f"format onnx is for models that give a score to texts, tokens or images, and {type(task).__name__} "
            f"{does}; export with format {other}"
        )
    for name in ("onnx", "onnxruntime", "onnxscript"):  # torch's exporter is written in the last
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"format onnx needs {name}; pip install 'fedloom[onnx]'") from error


def _export(plain: PreTrainedModel, reader: Any, path: Path) -> None:
    """Trace the model with made-up rows and write the graph."""
    inputs = _made_up(plain, reader, *_TRACED)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    free = {0: batch} if isinstance(reader, ImageProcessor) else {0: batch, 1: length}
    size = sum(each.nbytes for each in plain.parameters())
    try:
        with _quiet():
            torch.onnx.export(
                _Logits(plain, tuple(inputs)),
                tuple(inputs.values()),
                path,
                input_names=list(inputs),
                output_names=["logits"],
                dynamic_shapes=((free,) * len(inputs),),
                opset_version=_OPSET,
                external_data=size > _MOST_BYTES,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # whatever torch's exporter makes of another's model
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"torch cannot export {type(plain).__name__} to ONNX: {first}; export with format merged"
        ) from error


def _compare(plain: PreTrainedModel, reader: Any, path: Path) -> None:
    """Refuse a graph whose scores are not the model's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch, length in _OTHERS:
        inputs = _made_up(plain, reader, batch, length)
        with torch.inference_mode():
            expected = plain(**inputs).logits.numpy()
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            raise ModelError(
                f"the ONNX graph of {type(plain).__name__} gives other scores than the model for {batch} rows of "
                f"length {length}, so it is not written; export with format merged"
            )


def _made_up(plain: PreTrainedModel, reader: Any, batch: int, length: int) -> Inputs:
    """Rows that nobody wrote; the first of several texts is padded to half its length."""
    draw = torch.Generator().manual_seed(batch)
    if isinstance(reader, ImageProcessor):
        return {"pixel_values": torch.rand(batch, 3, reader.side, reader.side, generator=draw)}
    ids = torch.randint(len(reader), (batch, length), generator=draw)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, length // 2 :] = 0
        ids[0, length // 2 :] = reader.pad_token_id
    return {"input_ids": ids, "attention_mask": mask}


class _Logits(nn.Module):
    """A model that takes its inputs by position and gives its scores alone, as a graph does."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """The scores."""
        logits: torch.Tensor = self.model(**dict(zip(self.names, values, strict=True))).logits
        return logits


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's warnings are about packages of its own and names of axes."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _form(reader: Any) -> Form:
    if not isinstance(reader, ImageProcessor):
        return Form("onnx", ("onnx",), _WHAT, _TEXTS)
    of = {"mean": list(reader.mean), "deviation": list(reader.deviation)}
    loading = _IMAGES.format(side=reader.side, resample=reader.resample, **of)
    return Form(
        "onnx", ("onnx",), _WHAT, loading, notes=_CROPPED.format(resized=reader.resized) if reader.resized else ""
    )
