"""`fedloom server --dashboard`, as a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import pytest

from fedloom.proto.run import load_run
from fedloom.proto.schema import Role, Schema, TensorSpec

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


def started(run: Path, dashboard: str) -> "subprocess.Popen[str]":
    options = ["--insecure-loopback", "--listen", "127.0.0.1:0", "--dashboard", dashboard, "--log-format", "json"]
    options += ["--set", "privacy.noise_multiplier=0.595", "--log-level", "info"]
    command = [sys.executable, "-u", "-m", "fedloom.cli.main", "server", str(run), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=run.parent, stdout=pipe, stderr=pipe, text=True, env=dict(os.environ))


def answer(url: str, token: str = "") -> int:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as got:
            return int(got.status)
    except HTTPError as error:
        return error.code


def test_tokens_are_printed_once_and_the_server_stops_as_before(prepared: Path) -> None:
    tokens: list[str] = []
    for start in (1, 2):
        with started(prepared, "0.0.0.0:0") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            lines: list[str] = []
            while not any(line.startswith("listening on") for line in lines):
                lines.append(process.stdout.readline())
                assert lines[-1], process.stderr.read()
            text = "".join(lines)
            (port,) = re.findall(r"dashboard at http://0\.0\.0\.0:(\d+)/", text)
            shown = re.findall(r"#token=(\S+)", text)
            url = f"http://127.0.0.1:{port}"
            tokens = tokens or shown

            assert len(shown) == (2 if start == 1 else 0)
            assert "not encrypted" in text
            assert answer(f"{url}/healthz") == 200
            assert answer(f"{url}/api/runs") == 401
            assert [answer(f"{url}/api/runs/sentiment", token) for token in tokens] == [200, 200]
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)

        assert process.returncode == 0, err
        assert "start again with the same state directory" in out
        assert {"at", "level", "logger", "message"} <= json.loads(err.splitlines()[0]).keys()
    assert (prepared.parent / "runs/sentiment/state/dashboard.json").stat().st_mode & 0o777 == 0o600
    assert load_run(prepared.parent / "runs/sentiment/run.toml").run.name == "sentiment"
