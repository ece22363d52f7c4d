"""Codecs by name: those of the entry-point group `fedloom.codecs`. Both sides look a name up; nothing else decodes."""

from collections.abc import Callable
from functools import cache
from typing import Any

from fedloom.core.codecs.api import Codec, CodecTraits
from fedloom.core.errors import CodecError, ConfigError
from fedloom.core.registry import build, entries, load

__all__ = ["Codec", "CodecTraits", "codec", "installed"]


def codec(name: str) -> Codec:
    """The codec called `name`, made once for a process.

    Raises:
        CodecError: There is none of that name, or it cannot be used.

    >>> codec("fp16").name
    'fp16'
    """
    try:
        return _made(load("codecs", name), name)
    except ConfigError as error:
        installed(name)
        raise CodecError(str(error)) from error


@cache
def _made(kind: Callable[..., Any], name: str) -> Codec:
    # By the class too: a local one is another codec once its block has ended.
    try:
        found: Codec = build("codecs", name, {})
    except ConfigError as error:
        raise CodecError(str(error)) from error
    if found.name != name:
        raise CodecError(f"codec {name!r} calls itself {found.name!r}; both names must be the same")
    return found


def installed(name: str) -> str:
    """The name itself, which a peer may have sent, if there is such a codec. It is not imported.

    Raises:
        CodecError: There is none.
    """
    if name not in (found := entries("codecs")):
        raise CodecError(f"unknown codec {name!r}; this build has {', '.join(found)}")
    return name
