"""Attention masks for which no GPU is waited for.

transformers leaves a mask out that masks nothing, and looks at the mask on the device for that: in every forward pass
the CPU waits until all the work before it is done. Whoever has made the batch knows without looking.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

__all__ = ["padding_known"]

_padded: ContextVar[bool | None] = ContextVar("padded", default=None)
"""Whether the batch of the forward pass under way has padding; None where nobody has said."""


@contextmanager
def padding_known(mask: torch.Tensor | None) -> Iterator[None]:
    """Forward passes within use `mask`, or leave it out, as they would if they looked at it.

    Args:
        mask: The batch's attention mask, 0 on padding. None, or one that is on a device already, changes nothing.
    """
    known = None if mask is None or mask.device.type != "cpu" else not mask.numpy().all()
    token = _padded.set(known)
    try:
        yield
    finally:
        _padded.reset(token)


def _sdpa_mask(*sizes: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    padded = _padded.get()
    if padded is False:
        attention_mask = None
    elif padded and attention_mask is not None:
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    found: torch.Tensor | None = sdpa_mask(*sizes, attention_mask=attention_mask, **options)
    return found


AttentionMaskInterface.register("sdpa", _sdpa_mask)
