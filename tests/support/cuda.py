"""A CUDA device that is not there, for what is decided before anything runs on one."""

from types import SimpleNamespace

import pytest
import torch

__all__ = ["pretend_cuda"]


def pretend_cuda(patch: pytest.MonkeyPatch, memory: int = 24 << 30) -> None:
    """Have torch say that there is one device with so many bytes."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
