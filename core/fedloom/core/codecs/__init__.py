"""Codecs by name."""

from fedloom.core.codecs.api import Codec
from fedloom.core.codecs.dense import FP16, FP32
from fedloom.core.errors import CodecError

__all__ = ["CODECS", "Codec", "codec"]

CODECS: dict[str, Codec] = {each.name: each for each in (FP32, FP16)}
"""Every codec this build can read and write. Both sides look a name up here; nothing else decodes."""


def codec(name: str) -> Codec:
    """The codec called `name`.

    Raises:
        CodecError: There is none of that name.

    >>> codec("fp16").name
    'fp16'
    """
    try:
        return CODECS[name]
    except KeyError:
        raise CodecError(f"unknown codec {name!r}; this build has {', '.join(sorted(CODECS))}") from None
