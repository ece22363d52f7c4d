"""Messages as plain values or JSON and back, each by its one declaration in `messages`.

What comes from a peer is checked as the declaration says before anything uses it; which message it is, the reader says.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedloom.core.errors import ProtocolError

__all__ = ["checked", "from_json", "plain", "to_json"]

M = TypeVar("M")

_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def plain(message: object) -> dict[str, Any]:
    """A message's fields by name, as numbers, texts and collections of them."""
    fields: dict[str, Any] = _adapter(type(message)).dump_python(message)
    return fields


def checked(kind: type[M], fields: Mapping[str, Any]) -> M:
    """The message of these plain fields, whose types the carrier has seen to.

    Raises:
        ProtocolError: A field is none that an honest peer sends.
        CodecError: One names an unknown codec.
        ConfigError: The run's spec is not one.
        SchemaError: The schema is not one.
    """
    return _read(kind, lambda: _adapter(kind).validate_python(fields, strict=False))


def to_json(message: object) -> bytes:
    """A message as JSON."""
    return _adapter(type(message)).dump_json(message)


def from_json(kind: type[M], text: bytes) -> M:
    """A message from JSON; a field that is missing has its default, as in protobuf.

    Raises:
        ProtocolError: It is none, or a field is none that an honest peer sends.
        CodecError: One names an unknown codec.
        ConfigError: The run's spec is not one.
        SchemaError: The schema is not one.
    """
    return _read(kind, lambda: _adapter(kind).validate_json(text))


def _adapter(kind: type[M]) -> TypeAdapter[M]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _read(kind: type[M], read: Callable[[], M]) -> M:
    try:
        return read()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ProtocolError(
            f"{kind.__name__} that is not one: {'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}; both sides "
            "must run compatible versions of fedloom"
        ) from None
