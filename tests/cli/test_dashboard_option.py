"""`fedloom server --dashboard`, as a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError

import pytest

from fedloom.core.config.run import load_run
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.server.monitoring.dashboard.access import LINKS_FILE, TOKENS_FILE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A run file that needs no torch to be served."""
    run = tmp_path / "sentiment.toml"
    run.write_bytes((ROOT / "examples" / "sentiment.toml").read_bytes())
    config = load_run(run)
    schema = Schema((TensorSpec("m.A", "m", Role.LORA_A, (8, 4)), TensorSpec("m.B", "m", Role.LORA_B, (4, 8))), 2.0)
    content = {
        "model": config.model.model_dump(mode="json", exclude={"digest"}),
        "adapter": config.adapter.model_dump(mode="json"),
        "digest": f"sha256:{'0' * 64}",
        "schema": json.loads(schema.to_json()),
    }
    run.with_suffix(".schema.json").write_text(json.dumps(content))
    return run


def started(run: Path, dashboard: str, stdout: int = subprocess.PIPE) -> "subprocess.Popen[str]":
    options = ["--insecure-loopback", "--listen", "127.0.0.1:0", "--dashboard", dashboard, "--log-format", "json"]
    options += ["--set", "privacy.noise_multiplier=0.595", "--log-level", "info"]
    command = [sys.executable, "-u", "-m", "fedloom.cli.main", "server", str(run), *options]
    return subprocess.Popen(
        command, cwd=run.parent, stdout=stdout, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def answer(url: str, token: str = "") -> int:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as got:
            return int(got.status)
    except HTTPError as error:
        return error.code


def listening(process: "subprocess.Popen[str]") -> str:
    """What it has printed once it listens."""
    assert process.stdout is not None
    assert process.stderr is not None
    lines: list[str] = []
    while not any(line.startswith("listening on") for line in lines):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    return "".join(lines)


def test_no_token_is_printed_but_at_a_terminal(prepared: Path) -> None:
    """A service's output is a journal. The links are in a file; the server stops, and starts again, as before."""
    tokens: list[str] = []
    folder = prepared.parent / "runs/sentiment/state"
    for _ in range(2):
        with started(prepared, "0.0.0.0:0") as process:
            text = listening(process)
            (port,) = re.findall(r"dashboard at http://0\.0\.0\.0:(\d+)/", text)
            found = re.findall(r"#token=(\S+)", (folder / LINKS_FILE).read_text())
            url = f"http://127.0.0.1:{port}"

            assert tokens in ([], found), "the tokens stay"
            tokens = found
            assert "not encrypted" in text
            assert str(folder.relative_to(prepared.parent) / LINKS_FILE) in text
            assert answer(f"{url}/healthz") == 200
            assert answer(f"{url}/api/runs") == 401
            assert [answer(f"{url}/api/runs/sentiment", token) for token in tokens] == [200, 200]
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)

        assert process.returncode == 0, err
        assert "start again with the same state directory" in out
        assert {"at", "level", "logger", "message"} <= json.loads(err.splitlines()[0]).keys()
        assert not any(token in text + out + err for token in tokens)
    for name in (TOKENS_FILE, LINKS_FILE):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    assert load_run(prepared.parent / "runs/sentiment/run.toml").run.name == "sentiment"


def test_at_a_terminal_there_are_links_to_click_on(prepared: Path) -> None:
    ours, theirs = os.openpty()
    with started(prepared, "127.0.0.1:0", stdout=theirs) as process:
        os.close(theirs)
        text = ""
        while "listening on" not in text:
            text += os.read(ours, 1 << 16).decode()
        process.send_signal(signal.SIGTERM)
        with suppress(OSError):  # the terminal is gone
            while os.read(ours, 1 << 16):
                pass
        process.communicate(timeout=60)
    os.close(ours)

    links = (prepared.parent / "runs/sentiment/state" / LINKS_FILE).read_text().splitlines()
    assert len(links) == 2
    assert all(link in text for link in links)
