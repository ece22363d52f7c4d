"""The codec of a run that names none.

An adapter of up to 1 MiB is one message: with fewer bits it would take as many round trips, and on a line of 20 Mbit/s
0.4 s less. Above, four bits take an eighth of the bytes and act like noise of half a percent more standard deviation.
"""

from fedloom.core.schema import Schema

__all__ = ["AUTO", "chosen", "possible"]

AUTO = "auto"

_EXACT, _SHORT = "fp32", "eden4"
_SMALL_BYTES = 1 << 20


def chosen(name: str, schema: Schema) -> str:
    """The codec that a run of this schema works with: what its file names, or for "auto" fp32 up to 1 MiB, then eden4.

    Args:
        name: As the run file has it.
        schema: Of the run, not of what one client is asked for: all clients of a run send in one codec.
    """
    if name != AUTO:
        return name
    return _EXACT if 4 * schema.size <= _SMALL_BYTES else _SHORT


def possible(name: str) -> tuple[str, ...]:
    """What `chosen` may give for some schema."""
    return (_EXACT, _SHORT) if name == AUTO else (name,)
