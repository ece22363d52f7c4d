"""The blocks of a model below everything that is trained, and forward passes that begin behind them.

With adapters on the last blocks only, what enters the first of these is the same for an example in every step of a run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fedloom.client.data.tokens import collate
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.privacy.dp_sgd.probe import made_up

__all__ = ["FrozenPrefix", "frozen_prefix", "only_tokens"]

_LENGTH = 16
"""Tokens of the longest made-up text: all that is looked at is who needs gradients, and what padding does."""


class _Captured(Exception):  # no error: it ends a forward pass that has given what was asked for
    """The rest of the forward pass is not needed."""


class FrozenPrefix:
    """The leading blocks of a model that hold no trained parameter and come before all that do."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        """`blocks`: at least one, in the order of the forward pass; a block's result is its hidden states."""
        self.blocks = blocks
        self.width, self.dtype = 0, torch.float32
        """Of the hidden states; known from the first that are captured."""
        self._beside: tuple[None, ...] | None = None
        """What a block gives beside its hidden states; None if it gives them alone, in no tuple."""

    @torch.no_grad()
    def capture(self, forward: Callable[[], object]) -> torch.Tensor:
        """What the last of the blocks gives in a forward pass, which ends there; shape (batch, places, width).

        Raises:
            RuntimeError: It gives more than its hidden states, or is not reached.
        """
        found: list[Any] = []

        def take(_module: nn.Module, _inputs: Any, result: Any) -> None:
            found.append(result)
            raise _Captured

        hook = self.blocks[-1].register_forward_hook(take)
        try:
            forward()
        except _Captured:
            pass
        finally:
            hook.remove()
        result = found[0] if found else None
        hidden, *others = result if isinstance(result, tuple) else (result,)
        self._beside = (None,) * len(others) if isinstance(result, tuple) else None
        if not isinstance(hidden, torch.Tensor) or any(each is not None for each in others):
            raise RuntimeError("a block of the model gives more than its hidden states")
        self.width, self.dtype = hidden.shape[-1], hidden.dtype
        return hidden.detach()

    @contextmanager
    def skipped(self, hidden: torch.Tensor) -> Iterator[None]:
        """Forward passes within take `hidden` for what the blocks would give; these are not computed."""
        given = hidden if self._beside is None else (hidden, *self._beside)
        try:
            for block in self.blocks:
                block.forward = partial(_give, given)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)


def frozen_prefix(model: AdapterModel) -> FrozenPrefix | None:
    """The blocks that need not be computed again, whatever of the adapter's schema is trained.

    None where there are none, or where the rest of the model does not give the same scores from what they gave: it may
    need something else of them too, or padding may have a part in the scores. This is tried on made-up examples.
    """
    examples = made_up(model, _LENGTH)
    batch = collate(examples, np.arange(len(examples)), model.tokenizer.pad_token_id if examples.input_ids else 0)
    try:
        frozen = _frozen(model, batch)
        if not frozen:
            return None
        prefix = FrozenPrefix(frozen)
        hidden = only_tokens(prefix.capture(partial(model.logits, batch)), batch)
        with torch.no_grad():
            whole = model.logits(batch)
            with prefix.skipped(hidden):
                rest = model.logits(batch)
    except (RuntimeError, TypeError, ValueError):  # what models raise whose blocks are not what these look like
        return None
    counted = batch["attention_mask"].bool() if whole.dim() == 3 and "attention_mask" in batch else ...
    return prefix if torch.allclose(whole[counted], rest[counted], rtol=1e-5, atol=1e-5) else None


def only_tokens(hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The hidden states with zeros on padding."""
    mask = batch.get("attention_mask")
    return hidden if mask is None else hidden * mask.to(hidden)[..., None]


def _frozen(model: AdapterModel, batch: dict[str, torch.Tensor]) -> list[nn.Module]:
    """The blocks whose results need no gradient when everything of the schema is trained."""
    blocks = _blocks(model.model.get_base_model())
    before = [(slot.parameter, slot.parameter.requires_grad) for slot in model.slots.values()]
    frozen: list[nn.Module] = []

    def note(module: nn.Module, _inputs: Any, result: Any) -> None:
        hidden = result[0] if isinstance(result, tuple) else result
        if not hidden.requires_grad and len(frozen) < len(blocks) and blocks[len(frozen)] is module:
            frozen.append(module)

    hooks = [block.register_forward_hook(note) for block in blocks]
    try:
        model.trainable(model.schema.roles)
        with torch.enable_grad():
            model.logits(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, trained in before:
            parameter.requires_grad_(trained)
    return frozen


def _blocks(base: Any) -> list[nn.Module]:
    """The longest list of modules of one kind, which a transformer's blocks are; empty if there is none.

    Beside a decoder those of the encoder: what they give depends on what is read and not on what is written.
    """
    base = base.get_encoder() if base.config.is_encoder_decoder else base
    lists = [list(each) for each in base.modules() if isinstance(each, nn.ModuleList)]
    alike = [each for each in lists if len({type(block) for block in each}) == 1]
    return max(alike, key=len, default=[])


def _give(given: Any, *_inputs: Any, **_options: Any) -> Any:
    return given
