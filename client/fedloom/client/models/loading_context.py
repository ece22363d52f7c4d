"""What holds while another's code loads a model: no reports on the terminal, and the same random values everywhere."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import transformers

__all__ = ["LOCAL_ONLY", "quiet", "repeatable"]

LOCAL_ONLY: Mapping[str, bool] = {"local_files_only": True, "trust_remote_code": False}
"""Options of every `from_pretrained`: nothing is downloaded, and no code that lies with a model is run. Left open,
transformers asks at the terminal."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' load report, which `find_head` reads instead, and its progress bars."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()


@contextmanager
def repeatable() -> Iterator[None]:
    """A block whose random values are the same in every process; those of the caller go on as if it were not there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
