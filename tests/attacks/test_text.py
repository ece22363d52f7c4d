"""Text of a peer that forges log lines, drives the terminal or reads as another, on every way to where it is read."""

import json
import logging
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from fedloom.cli.console import failed, out
from fedloom.cli.logs import JsonLines, TextLines
from fedloom.cli.server import operate as operation
from fedloom.client.transport import admin as operator
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.errors import FedloomError, ProtocolError
from fedloom.core.text import clean, clean_lines
from fedloom.flower.messages import Reply
from fedloom.flower.rounds import Answered, _Site, _take
from fedloom.proto.message_codec import to_json
from fedloom.proto.messages import Joined
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.wire import RETRY_AFTER, from_wire
from fedloom.server.storage.audit_log import Audit, AuditRecord
from tests.dashboard.stage import Stage, stage
from tests.support import preloaded

FORGED = "2030-01-01 00:00:00,000 CRITICAL fedloom: "
HOSTILE = f"no\n{FORGED}\r\x1b[2J\x1b]0;title\x07\x9b31m\u202egpj\u2066\u2028\x85[bold red]b[/]:skull:"
TIMEOUT_S = 60.0


def harmless(text: str, what: str = "[bold red]b[/]:skull:") -> None:
    """What was said can still be read, and nothing of it is obeyed."""
    assert what in text
    for line in text.splitlines():
        assert line.isprintable(), ascii(line)
        assert not line.startswith(FORGED)


@given(st.text(alphabet=st.characters(), max_size=50))
def test_what_is_cleaned_is_one_line_that_can_be_printed(text: str) -> None:
    shown = clean(text)

    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    assert clean(shown) == shown
    shown.encode()
    assert [line.isprintable() for line in clean_lines(text).split("\n")] == [True] * (text.count("\n") + 1)


def test_letters_of_every_language_stay_and_long_texts_do_not() -> None:
    assert clean("Klinik Süd, 第二病院, مستشفى") == "Klinik Süd, 第二病院, مستشفى"
    assert clean("x" * 10**6, 10) == "xxxxxxxxxx…"


def record(message: str, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    about = None if error is None else (type(error), error, None)
    return logging.LogRecord("fedloom.trial", logging.WARNING, "here", 1, message, arguments, about)


def test_a_message_is_one_line_of_a_log() -> None:
    text = TextLines().format(record("update not taken: %s", HOSTILE))
    document = json.loads(JsonLines().format(record("update not taken: %s", HOSTILE)))

    harmless(text)
    assert len(text.splitlines()) == 1
    harmless(document["message"])
    assert len(document["message"].splitlines()) == 1


def test_an_exception_of_a_peer_s_text_forges_no_line() -> None:
    error = ProtocolError(HOSTILE)

    text = TextLines().format(record("it failed", error=error))
    document = json.loads(JsonLines().format(record("it failed", error=error)))

    harmless(text)
    assert all(line.startswith("    ") for line in text.splitlines()[1:])
    assert "\x1b" not in document["error"]


def test_a_console_prints_words(capsys: pytest.CaptureFixture[str]) -> None:
    """An error, a line and a table; markup and emoji of a peer stay as they are written."""
    table = Table("name", box=None)
    table.add_row(HOSTILE.replace("\n", " "))
    out.print(table)
    out.print(HOSTILE.replace("\n", " "))
    failed(ProtocolError(HOSTILE.replace("\n", " ")))

    shown = capsys.readouterr()
    harmless(shown.out)
    harmless(shown.err)
    assert shown.out.count("[bold red]b[/]:skull:") == 2


def test_what_an_operator_is_told_is_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reply = pb.StatusReply(run=HOSTILE, live=[HOSTILE], lost={HOSTILE: HOSTILE})
    monkeypatch.setattr(operator, "status", lambda *_: reply)

    operation.status("here:1", tmp_path)
    operation.status("here:1", tmp_path, json_only=True)

    shown = capsys.readouterr().out
    assert shown.count("[bold red]b[/]:skull:") >= 4
    # The lines of the table are our own; none of them begins where the peer wants it to.
    harmless(shown)


@contextmanager
def coordinator(code: grpc.StatusCode, text: str, trailer: tuple[tuple[str, str], ...] = ()) -> Iterator[str]:
    """Refuses every call in its own words."""

    def refuse(request: pb.JoinRequest, context: "grpc.ServicerContext") -> pb.JoinReply:
        context.set_trailing_metadata(trailer)
        context.abort(code, text)

    handler = grpc.unary_unary_rpc_method_handler(refuse)
    methods = dict.fromkeys(("Join", "Work", "Leave"), handler)
    handlers = [grpc.method_handlers_generic_handler("fedloom.v1.Federation", methods)]
    server = grpc.server(ThreadPoolExecutor(4), handlers=handlers)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


@pytest.mark.parametrize(
    ("code", "trailer"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, ()),
        (grpc.StatusCode.UNAVAILABLE, ()),
        (grpc.StatusCode.OUT_OF_RANGE, ()),
        (grpc.StatusCode.UNIMPLEMENTED, ()),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ((RETRY_AFTER, "1"),)),
    ],
)
def test_a_coordinator_s_refusal_is_one_line(code: grpc.StatusCode, trailer: tuple[tuple[str, str], ...]) -> None:
    calls: tuple[Callable[[GrpcConnection], object], ...] = (
        lambda line: line.join("ann", 1),
        lambda line: line.work(),
        lambda line: line.leave("bye"),
    )
    with coordinator(code, HOSTILE, trailer) as address:
        line = GrpcConnection(address)
        for call in calls:
            with pytest.raises(FedloomError) as caught:
                call(line)
            harmless(str(caught.value))
            assert len(str(caught.value).splitlines()) == 1
        line.close()


def test_a_coordinator_s_refusal_is_not_longer_than_anybody_reads() -> None:
    with coordinator(grpc.StatusCode.FAILED_PRECONDITION, "x" * 5000) as address:
        line = GrpcConnection(address)
        with pytest.raises(ProtocolError) as caught:
            line.join("ann", 1)
        line.close()

    assert len(str(caught.value)) < 2500


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_client_s_terminal_and_log_obey_no_coordinator(tmp_path: Path, form: str) -> None:
    """The command itself: what it logs while it tries again, and the error it ends with."""
    policy = tmp_path / "client.toml"
    (tmp_path / "rows.csv").write_text("text,label\nsunny,good\nrainy,bad\n")
    policy.write_text('[client]\nname = "ann"\n[data]\nsource = "rows.csv"\nlabels = ["good", "bad"]\n')
    with coordinator(grpc.StatusCode.FAILED_PRECONDITION, HOSTILE) as address:
        command = [*preloaded.command(), "client", "--insecure-loopback", "--server", address]
        command += ["--policy", str(policy), "--log-format", form, "--log-level", "info"]
        ran = subprocess.run(command, capture_output=True, env=dict(os.environ), timeout=5 * TIMEOUT_S, check=False)

    assert ran.returncode == 2
    harmless(ran.stderr.decode())
    assert b"\x1b" not in ran.stdout


def test_a_run_without_a_name_that_can_be_printed_is_not_joined() -> None:
    with pytest.raises(ProtocolError) as caught:
        from_wire(Joined, pb.JoinReply(run=HOSTILE, epoch=1))

    assert str(caught.value).isprintable()


def test_a_stranger_s_name_reaches_log_audit_and_page_as_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with stage(tmp_path / "runs") as live:
        live.stranger(HOSTILE)
        live.coordinator.tick()
        noted = [each for each in live.store.audit() if each.kind == "refused"]
        shown = json.dumps(live.board.run(live.board.own), ensure_ascii=False)

    assert noted
    for note in noted:
        assert note.client.isprintable()
        assert note.detail.isprintable()
    assert shown.isprintable()
    assert all("\n" not in TextLines().format(each) for each in caplog.records)


def test_a_client_s_reason_to_leave_is_one_line_of_the_log(live: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    joined = live.coordinator.join("ann", 1, 1)

    live.coordinator.leave("ann", HOSTILE, joined.run, joined.epoch)

    (said,) = [each.getMessage() for each in caplog.records if "leaves" in each.getMessage()]
    assert said.isprintable()


def test_whatever_is_noted_is_one_line() -> None:
    kept: list[AuditRecord] = []
    book: Any = SimpleNamespace(epoch=1, note=lambda *records: kept.extend(records))
    audit = Audit(book)

    audit.note("rejected", HOSTILE, HOSTILE)
    audit.write()

    harmless(kept[0].client)
    harmless(kept[0].detail)


def test_a_node_of_flower_writes_no_line_of_the_coordinator_s_log(caplog: pytest.LogCaptureFixture) -> None:
    """Another framework's log: nothing of ours formats it."""
    caplog.set_level(logging.INFO)
    unused: Any = None
    refusing = Answered("m", to_json(Reply("ann", refusal="x\n\x1b[2J[bold]")), b"")
    for answered in (refusing, Answered("m", b"", b"", HOSTILE), Answered("m", HOSTILE.encode(), b"")):
        _take({}, _Site(1), answered, unused)

    said = [each.getMessage() for each in caplog.records]
    assert len(said) == 3
    assert all(each.isprintable() for each in said), said
    assert re.search(r"\\n\\x1b\[2J", said[0])
