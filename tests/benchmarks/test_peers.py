"""`make bench-peers`: what it compares is the same work, and the tables say what was found."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peers.memory import MARK, Sampler, end_leftovers, processes
from peers.run import ENGINES, SAME, WORKS, check_same, keep, rows
from peers.wire import counted
from peers.work import Work, flat, reported, unflat
from safetensors.numpy import save_file

from docs import make_peers
from tests.test_meta import ROOT

PINS = sorted((ROOT / "benchmarks" / "peers").glob("*.txt"))


def test_every_peer_has_its_pins() -> None:
    assert [path.stem for path in PINS] == sorted({each.environment for each in ENGINES.values()} - {""})


@pytest.mark.parametrize("path", PINS, ids=lambda path: path.stem)
def test_pins_are_exact_and_of_one_model(path: Path) -> None:
    pins = dict(line.split("==") for line in path.read_text(encoding="utf-8").splitlines() if line[0] != "#")
    ours = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )

    assert all(re.fullmatch(r"[A-Za-z0-9._+!-]+", version) for version in pins.values())
    for name in ("numpy", "peft", "torch", "transformers"):
        assert pins[name] == ours[name], "another version would be another piece of work"


@pytest.mark.parametrize("far", [False, True])
def test_those_who_end_elsewhere_are_not_compared(tmp_path: Path, far: bool) -> None:
    save_file({"m.A": np.zeros((2, 3), np.float32)}, tmp_path / "start.safetensors")
    ends = np.arange(6, dtype=np.float32).reshape(2, 3)
    others = {"fedloom": {"m.A": ends}, "pfl": {"m.A": ends * np.float32(1 + (2 if far else 0.5) * SAME)}}

    if far:
        with pytest.raises(SystemExit, match="pfl and fedloom end"):
            check_same(others, tmp_path / "start.safetensors")
    else:
        check_same(others, tmp_path / "start.safetensors")


def test_an_adapter_with_other_tensors_is_not_the_same(tmp_path: Path) -> None:
    save_file({"m.A": np.zeros(3, np.float32)}, tmp_path / "start.safetensors")

    with pytest.raises(SystemExit, match="inf apart"):
        check_same({"fedloom": {"m.A": np.ones(3)}, "pfl": {"m.B": np.ones(3)}}, tmp_path / "start.safetensors")


def test_ratios_are_those_within_repetitions() -> None:
    # The second repetition met a machine half as fast: the ratio of medians would not be 3.
    found = [
        {"bare": {"round_s": 6.0 * slow}, "fedloom": {"round_s": 2.0 * slow, "start_s": 9.0}} for slow in (1, 2, 1)
    ]

    bare, ours = rows(Work("lora", 2, 3, ""), ("bare", "fedloom"), found)

    assert bare["ratios"] == [3, 3, 3]
    assert bare["ratio"] == 3
    assert ours["round_s"] == 2
    assert ours["clients_per_s"] == 1
    assert ours["start_s"] == 9
    assert "start_s" not in bare


def test_flat_arrays_come_back() -> None:
    values = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.full(2, 9, np.float32)}

    again = unflat(flat(values), values)

    assert again.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(again[name], value)


def test_the_proxy_counts_each_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as peer:
                while data := peer.recv(1 << 16):
                    peer.sendall(data[: len(data) // 2])

        threading.Thread(target=answer, daemon=True).start()
        with counted(f"127.0.0.1:{server.getsockname()[1]}") as traffic:
            host, _, port = traffic.address.rpartition(":")
            began = time.time()
            with socket.create_connection((host, int(port))) as client:
                client.sendall(bytes(1000))
                assert len(client.recv(1 << 16)) == 500
            figures = traffic.of_a_round([began, began, time.time()], clients=5)

    assert figures == {"bytes_up": 100, "bytes_down": 50}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_memory_is_that_of_all_processes_with_the_mark() -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); print()"
    child = "import time; held = b'x' * (64 << 20); print(flush=True); time.sleep(60)"
    mark = f"test-{os.getpid()}"
    with Sampler(mark, "time.sleep") as sampler:
        subprocess.run([sys.executable, "-c", code, child], env=os.environ | {MARK: mark}, check=True)
        deadline = time.monotonic() + 60
        while sampler.peaks_mib(time.time())[1] < 64:
            assert time.monotonic() < deadline, "the orphan was not seen"
            time.sleep(0.1)
        everything, server = sampler.peaks_mib(time.time())
        end_leftovers(mark)
        while processes(mark):
            assert time.monotonic() < deadline, "the orphan was not ended"
            time.sleep(0.1)

    assert everything >= server >= 64


@pytest.fixture
def figures() -> dict[str, Any]:
    """What the driver writes, of one piece of work."""
    work, engines = WORKS["lora-2"]
    done = {name: {"round_s": 0.5 if name == "flower" else 2.0, "peak_mib": 500.0} for name in engines}
    about = {"date": "2026-11-30", "cores": 2, "cores_there": 2, "processor": "x", "python": "3.11.7"}
    about |= {"load_before": 0.1, "versions": {"flwr": "1"}, "left_out": ["nvflare"]}
    return {"lora-2": about | {"rows": rows(work, engines, [done])}}


def test_the_page_says_who_is_faster(figures: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, source = tmp_path / "benchmarks.md", tmp_path / "results.json"
    page.write_text("# B\n<!-- made by docs/make_peers.py -->\n<!-- end of what is made -->\nafter\n")
    source.write_text(json.dumps(figures))
    monkeypatch.setattr(make_peers, "TARGET", page)
    monkeypatch.setattr(make_peers, "SOURCE", source)
    monkeypatch.setattr(sys, "argv", ["make_peers"])

    make_peers.main()

    text = page.read_text()
    assert "Faster than fedloom: Flower, Ray (0.25 of fedloom's round).\n" in text
    assert "**500 ms**" in text
    assert "left out: NVFlare, simulator." in text
    assert text.endswith("after\n")
    figures["lora-2"]["load_before"] = 0.2
    source.write_text(json.dumps(figures))
    monkeypatch.setattr(sys, "argv", ["make_peers", "--check"])
    with pytest.raises(SystemExit, match="stale"):
        make_peers.main()


def test_every_piece_of_work_and_engine_has_a_name() -> None:
    assert make_peers.WORKS.keys() == WORKS.keys()
    assert make_peers.ENGINES.keys() == ENGINES.keys()


def test_a_piece_of_work_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    for title, load in (("lora-2", 1), ("empty", 2), ("lora-2", 3)):
        keep(path, title, {"load_before": load})

    found = json.loads(path.read_text())
    assert list(found) == ["empty", "lora-2"]
    assert found["empty"] == {"load_before": 2}
    assert found["lora-2"] == {"load_before": 3}


def test_a_script_that_says_nothing_has_done_nothing() -> None:
    assert reported("some output\nof a framework\n") is None


@pytest.mark.e2e
@pytest.mark.slow
def test_fedloom_does_the_same_as_a_loop_over_peft(tmp_path: Path) -> None:
    """The driver itself, with the engines that need no environment of their own, and one that is not installed."""
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "peers.run", "--only", "lora-2", "--engines", "fedloom", "bare"]
    done = subprocess.run(
        [*command, "fedloom-private", "--repeats", "1", "--cores", "1", "--out", str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["engine"]: row for row in json.loads(out.read_text())["lora-2"]["rows"]}
    assert found.keys() == {"fedloom", "bare", "fedloom-private"}
    assert all(row["round_s"] > 0 and row["start_s"] > 0 and row["peak_mib"] > 100 for row in found.values())
    assert 4 * 74_498 <= found["fedloom"]["bytes_up"] < 4.2 * 74_498
