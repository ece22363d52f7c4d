"""A sentence encoder whose classifier's head reads the mean of the tokens."""

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from fedloom.client.models.base_folder import DIGESTED
from fedloom.client.models.loading_context import LOCAL_ONLY, quiet
from fedloom.core.errors import ModelError

__all__ = ["FAMILIES", "mean_pooled"]

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")
"""Kinds of model whose blocks and heads are laid out as BERT's."""

_WEIGHT = 20.0
"""Weight of the tokens' mean over what each token brings itself."""


def mean_pooled(source: Path, folder: Path, blocks: int | None = None) -> None:
    """Write the first blocks of an encoder and one that gives every token the mean of all.

    Sentence encoders are trained through the mean of their tokens, but a BERT classifier's head reads the first token
    alone. In a block whose queries and keys are zero each token attends to all alike, and with the identity for values
    that is their mean: the head then reads what the encoder was trained for, and the model is an ordinary BERT.
    Training with privacy needs it: gradients that reach the adapters through the first token are small beside noise.

    Args:
        source: Folder of the encoder, see `resolve_base`.
        folder: The new folder.
        blocks: How many of its blocks are kept; None keeps all.

    Raises:
        ModelError: It is another kind of model, cannot be loaded, or has fewer blocks.
    """
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            config = AutoConfig.from_pretrained(source, **LOCAL_ONLY)
            _check(source, config, blocks)
            model, report = AutoModel.from_pretrained(
                source, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **LOCAL_ONLY
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{source} cannot be loaded as an encoder: {error}") from error
        if lacking := sorted(name for name in report["missing_keys"] if not name.startswith("pooler.")):
            raise ModelError(
                f"{source} lacks {lacking[0]} and {len(lacking) - 1} more weights of its encoder; save the whole model"
            )
        layers = model.encoder.layer
        del layers[blocks or len(layers) :]
        layers.append(_averaging(layers[0]))
        model.config.num_hidden_layers = len(layers)
        with torch.no_grad():
            # A coordinate of what comes here has variance 1: half of it is where tanh is nearly straight.
            model.pooler.dense.weight.copy_(torch.eye(model.config.hidden_size) / 2)
            model.pooler.dense.bias.zero_()
        model.save_pretrained(folder)
    for path in sorted({path for pattern in DIGESTED for path in source.glob(pattern)}):
        if not (folder / path.name).exists() and ".safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)
    usual = (folder / "config.json").stat().st_mode
    for path in folder.iterdir():
        path.chmod(usual)  # safetensors writes for its owner alone, and others are to have this model


def _check(source: Path, config: Any, blocks: int | None) -> None:
    if config.model_type not in FAMILIES:
        raise ModelError(f"{source} is of the kind {config.model_type}; one of {', '.join(FAMILIES)} is needed")
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        raise ModelError(
            f"{source} has relative positions in its attention, which then takes no mean; give one without"
        )
    if blocks is not None and not 1 <= blocks <= config.num_hidden_layers:
        raise ModelError(f"{source} has {config.num_hidden_layers} blocks; {blocks} of them cannot be kept")


def _averaging(like: Any) -> Any:
    """A block of the same shapes that gives every token the mean of all, normalised, and a trace of itself."""
    block = copy.deepcopy(like)
    with torch.no_grad():
        for value in block.parameters():
            value.zero_()
        for square, length in ((block.attention.self.value, 1.0), (block.attention.output.dense, _WEIGHT)):
            square.weight.fill_diagonal_(length)
        for norm in (block.attention.output.LayerNorm, block.output.LayerNorm):
            norm.weight.fill_(1.0)
    return block
