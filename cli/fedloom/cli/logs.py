"""What commands that stay write to standard error: lines for people, or JSON for programs."""

import json
import logging
import sys
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import typer

__all__ = ["JsonLines", "LogFormat", "LogLevel", "write_logs"]

LogFormat = Annotated[
    Literal["text", "json"], typer.Option("--log-format", help="json: one object a line on stderr, for programs.")
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"] | None,
    typer.Option("--log-level", help="Least severity that is logged; warning, or info with --verbose."),
]

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonLines(logging.Formatter):
    """One JSON object a line: at, level, logger, message, and error or event where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for a record."""
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        for argument in record.args if isinstance(record.args, tuple) else ():
            if is_dataclass(argument) and not isinstance(argument, type):  # such as an event of the run's log
                line["event"] = {"kind": type(argument).__name__, **asdict(argument)}
        return json.dumps(line, default=str)


def write_logs(form: str = "text", level: str | None = None) -> None:
    """Log to standard error from now on.

    Args:
        form: text or json.
        level: Least severity; None leaves what is in force.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(_TEXT))
    root = logging.getLogger()
    logging.basicConfig(level=level.upper() if level else root.level, handlers=[handler], force=True)
