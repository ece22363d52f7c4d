"""One line of a doctor's report."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Level", "failed", "ok", "warning"]

Level = Literal["ok", "warning", "failed"]
"""failed: a client cannot take part, or its ledger would not be safe. warning: it can, with something to know."""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    """What was looked at, such as device."""
    level: Level
    text: str
    """What was found."""
    remedy: str = ""
    """What to do about it; empty when all is well, or when `text` says so."""


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", text)


def warning(check: str, text: str, remedy: str = "") -> Finding:
    """Something to know."""
    return Finding(check, "warning", text, remedy)


def failed(check: str, text: str, remedy: str = "") -> Finding:
    """Something that must be put right."""
    return Finding(check, "failed", text, remedy)
