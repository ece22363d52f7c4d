"""What commands that stay write to standard error: lines for people, or JSON for programs."""

import json
import logging
import sys
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import typer

from fedloom.core.text import clean, clean_lines

__all__ = ["JsonLines", "LogFormat", "LogLevel", "TextLines", "write_logs"]

LogFormat = Annotated[
    Literal["text", "json"], typer.Option("--log-format", help="json: one object a line on stderr, for programs.")
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"] | None,
    typer.Option("--log-level", help="Least severity that is logged; warning, or info with --verbose."),
]

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_MOST_LETTERS = 8000
"""Longest message; longer than what is kept of a peer's text, so that our own words around it stay."""


class TextLines(logging.Formatter):
    """One line for each record, and indented ones for its traceback: nothing a peer says looks like a record."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def format(self, record: logging.LogRecord) -> str:
        """The line for a record."""
        record.message, record.asctime = clean(record.getMessage(), _MOST_LETTERS), self.formatTime(record)
        text = self.formatMessage(record)
        if record.exc_info:
            text += "\n" + clean_lines(self.formatException(record.exc_info))
        return text.replace("\n", "\n    ")


class JsonLines(logging.Formatter):
    """One JSON object a line: at, level, logger, message, and error or event where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for a record."""
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": clean(record.getMessage(), _MOST_LETTERS),
        }
        if record.exc_info:
            line["error"] = clean_lines(self.formatException(record.exc_info))
        for argument in record.args if isinstance(record.args, tuple) else ():
            if is_dataclass(argument) and not isinstance(argument, type):  # such as an event of the run's log
                line["event"] = {"kind": type(argument).__name__, **asdict(argument)}
        return json.dumps(line, default=str)  # in ASCII, whatever an event holds


def write_logs(form: str = "text", level: str | None = None) -> None:
    """Log to standard error from now on.

    Args:
        form: text or json.
        level: Least severity; None leaves what is in force.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    logging.basicConfig(level=level.upper() if level else root.level, handlers=[handler], force=True)
