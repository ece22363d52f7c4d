"""What the frozen blocks give for each example, computed when it is first needed and kept for as long as this process.

It is kept in an encrypted file without a name, whose key is in this process's memory only: when the process ends,
however it ends, nothing readable is left.
"""

import logging
import os
import tempfile
import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fedloom.client.data.rows import Indices
from fedloom.client.data.tokens import Encoded
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import ComputePolicy
from fedloom.client.tasks.api import Task
from fedloom.client.training.device import on_device
from fedloom.client.training.frozen_prefix import FrozenPrefix, frozen_prefix, only_tokens

__all__ = ["Activations", "EncryptedFile", "kept_activations"]

log = logging.getLogger(__name__)

_BLOCK = 16
"""Bytes of one block of AES."""


class EncryptedFile:
    """Byte strings by key, each written once, in an unnamed file in the folder for temporary files."""

    def __init__(self, most: int) -> None:
        """`most`: bytes that it may grow to."""
        self._most, self._size = most, 0
        self._places: dict[bytes, tuple[int, int]] = {}
        self._file = tempfile.TemporaryFile(prefix="fedloom-")  # noqa: SIM115  # open for as long as this object is
        weakref.finalize(self, self._file.close)
        self._cipher = AES(os.urandom(32))
        self._writing = threading.Lock()  # trainers of several threads share a file

    def __contains__(self, key: bytes) -> bool:
        """Whether it has been written."""
        return key in self._places

    def write(self, key: bytes, value: bytes) -> bool:
        """Keep a value; False if there is no room for it."""
        with self._writing:
            if self._size + len(value) > self._most:
                return False
            try:
                os.pwrite(self._file.fileno(), self._turned(self._size, value), self._size)
            except OSError as error:
                log.warning("the file of activations takes no more (%s)", error)
                self._most = self._size
                return False
            self._places[key] = (self._size, len(value))
            self._size += -(-len(value) // _BLOCK) * _BLOCK  # no two values share a block of the key stream
            return True

    def read(self, key: bytes) -> bytes:
        """What was written."""
        offset, length = self._places[key]
        return self._turned(offset, os.pread(self._file.fileno(), length, offset))

    def _turned(self, offset: int, value: bytes) -> bytes:
        """Encrypted or decrypted, which are the same: the key stream depends on the key and the place in the file."""
        stream = Cipher(self._cipher, CTR((offset // _BLOCK).to_bytes(_BLOCK, "big"))).encryptor()
        return stream.update(value)


class Activations:
    """The results of a model's frozen blocks, by example."""

    def __init__(self, model: AdapterModel, prefix: FrozenPrefix, file: EncryptedFile) -> None:
        """The file may hold what other trainers of this process have put into it for the same blocks."""
        self._model, self._prefix, self._file = model, prefix, file

    def skipping(
        self, encoded: Encoded, indices: Indices, batch: dict[str, torch.Tensor]
    ) -> AbstractContextManager[None]:
        """A context in which the model reads `batch` from what is kept of these rows.

        What is missing is computed first. Where there is no room for it, the context changes nothing.
        """
        keys = [encoded.digest(int(index)) for index in indices]
        missing = {key: row for row, key in enumerate(keys) if key not in self._file}
        if missing:
            chosen = list(missing.values())
            if not self._compute(list(missing), {name: part[chosen] for name, part in batch.items()}):
                return nullcontext()
        return self._prefix.skipped(self._hidden(keys, batch))

    def _compute(self, keys: list[bytes], batch: dict[str, torch.Tensor]) -> bool:
        hidden = only_tokens(self._prefix.capture(partial(self._model.logits, batch)), batch).cpu()
        for key, row, length in zip(keys, hidden, _lengths(hidden, batch), strict=True):
            value = row[:length].contiguous().view(torch.uint8).numpy().tobytes()
            if not self._file.write(key, value):
                return False
        return True

    def _hidden(self, keys: list[bytes], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Shape (batch, places, width), with zeros on padding."""
        width, dtype = self._prefix.width, self._prefix.dtype
        rows = [torch.frombuffer(bytearray(self._file.read(key)), dtype=dtype).view(-1, width) for key in keys]
        places = batch["input_ids"].shape[1] if "input_ids" in batch else max(map(len, rows))
        whole = torch.zeros(len(rows), places, width, dtype=dtype)
        for place, row in zip(whole, rows, strict=True):
            place[: len(row)] = row
        return on_device(whole, self._model.device)


def kept_activations(model: AdapterModel, base: str | None, compute: ComputePolicy) -> Activations | None:
    """Where the results of a model's frozen blocks are kept.

    Args:
        model: The base model and its adapter.
        base: The base model's digest.
        compute: What of this machine may be used.

    Returns:
        None if the model has no such blocks, its digest is not known, or the policy gives no room.
    """
    # They are kept for one sequence, one picture or one recording, and not for two of these or for a task's own way of
    # reading. What is written about a recording goes into other blocks than the recording.
    traits = model.task.traits
    both = traits.media and traits.per_token
    usual = type(model.task).scores is Task.scores and traits.sequences == 1 and not both
    if base is None or not compute.activation_cache_mib or not (usual or (traits.audio and traits.decoder)):
        return None
    if model not in _prefixes:
        _prefixes[model] = found = frozen_prefix(model)
        if found is not None:
            log.info("the first %d blocks are computed once for each example", len(found.blocks))
    if (prefix := _prefixes[model]) is None:
        return None
    what = (base, len(prefix.blocks), str(prefix.dtype), compute.quantization, str(model.device))
    return Activations(model, prefix, _file(what, compute.activation_cache_mib << 20))


_prefixes: "weakref.WeakKeyDictionary[AdapterModel, FrozenPrefix | None]" = weakref.WeakKeyDictionary()
"""By model: the trainers that share one need not all look for it."""


@lru_cache(maxsize=1)
def _file(what: tuple[str | int, ...], most: int) -> EncryptedFile:
    """The file of one base model and one number of blocks; that of another one is given up."""
    return EncryptedFile(most)


def _lengths(hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> list[int]:
    mask = batch.get("attention_mask")
    return [hidden.shape[1]] * len(hidden) if mask is None else [int(each) for each in mask.sum(1)]
