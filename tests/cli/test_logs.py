"""What goes to standard error."""

import json
import logging
from collections.abc import Iterator

import pytest

from fedloom.cli.logs import write_logs
from fedloom.server.rounds.state import ClientLost


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    write_logs("json", "info")
    log = logging.getLogger("fedloom.trial")

    log.debug("not this")
    log.info("%s", ClientLost(3, "ann\nben", "lease"))
    try:
        raise ValueError("inside")
    except ValueError:
        log.exception("it failed")

    lost, failed = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert lost["event"] == {"kind": "ClientLost", "round": 3, "client": "ann\nben", "reason": "lease"}
    assert (lost["level"], lost["logger"]) == ("info", "fedloom.trial")
    assert "ValueError: inside" in failed["error"]
    assert failed["message"] == "it failed"


def test_text_keeps_the_level_in_force_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    write_logs("text", "error")
    write_logs("text")

    logging.getLogger("fedloom.trial").warning("quiet")
    logging.getLogger("fedloom.trial").error("loud")

    assert capsys.readouterr().err.strip().endswith("ERROR fedloom.trial: loud")
