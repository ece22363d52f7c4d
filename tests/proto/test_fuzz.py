"""Every decoder against inputs that no honest peer or disk would give: only fedloom's own errors may come out.

`fuzzing.py` beside this file makes the inputs, by changing sound ones where their structure is, and counts which lines
of the decoders they reach. There are over 200,000 of them, with `FEDLOOM_PROVE=1` over 2 million.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.core.config.parsing import read_json, read_toml
from fedloom.core.errors import FedloomError
from fedloom.server.rounds.state import event_from_json
from fedloom.server.storage.hash_chain import read_mark

PROVE = os.environ.get("FEDLOOM_PROVE") == "1"
INPUTS, PAYLOADS = (100_000, 100_000) if PROVE else (400, 13_000)
LEAST = 2_000_000 if PROVE else 200_000
SEED = os.environ.get("FEDLOOM_SEED", "0")


@pytest.mark.prove
@pytest.mark.timeout(6 * 3600)
def test_no_input_brings_a_decoder_down(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    script = Path(__file__).with_name("fuzzing.py")
    command = [
        sys.executable,
        str(script),
        "--inputs",
        str(INPUTS),
        "--payloads",
        str(PAYLOADS),
        "--seed",
        SEED,
        "--report",
        str(report),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    found = json.loads(report.read_text())
    print(done.stdout)
    for decoder in found["decoders"]:
        # Changes that are all refused at the door, or all harmless, would test nothing.
        assert decoder["accepted"] > 0, decoder
        assert decoder["refused"] > (decoder["accepted"] + decoder["refused"]) // 50, decoder
    assert found["inputs"] >= LEAST
    assert found["lines_reached"] >= 0.9 * found["lines"], found["missed"]
    assert found["peak_rss_mib"] < 512


@pytest.mark.parametrize("read", [read_toml, read_json, lambda path: event_from_json(path.read_text()), read_mark])
def test_nesting_that_exhausts_the_parser_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "file"
    path.write_text(("x = " if read is read_toml else "") + "[" * 100_000)

    with pytest.raises(FedloomError):
        read(path)
