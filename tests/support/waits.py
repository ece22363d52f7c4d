"""What makes a program wait for a GPU, found on the CPU: operations that hand a tensor's values to the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Waits", "no_waits"]

_WAITING = frozenset(
    {
        "_local_scalar_dense",  # item(), bool(), int() and float()
        "_unique2",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "repeat_interleave",
        "unique_consecutive",
        "unique_dim",
    }
)
_INDEXING = frozenset({"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"})


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Notes those of what runs while it is on, `.cpu()` and `.numpy()` aside, which do nothing on the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _WAITING or (name in _INDEXING and any(_is_mask(each) for each in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


@contextmanager
def no_waits() -> Iterator[None]:
    """Fail if anything in here waits."""
    with Waits() as waits:
        yield
    assert waits.found == []
