"""What the quickstart and the tutorials tell a reader to do, done: every block in order, in a folder of its own.

`fedloom` is a script that makes runs small: two rounds of one step. Port and proxy of the pages are this machine's.
"""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from fedloom.client.assets.fetch import cache_dir, fetch
from tests.docs.blocks import DOCS, Block, blocks

PAGES = (
    "quickstart.md",
    "data.md",
    "api.md",
    "merging.md",
    "personalisation.md",
    "serving.md",
    "tutorial-simulation.md",
    "tutorial-sites.md",
    "tutorial-strategy.md",
    "tutorial-adapter.md",
    "tutorial-task.md",
)
NOT_RUN = {
    ("quickstart.md", "downloads; .ci/run does the same from a fresh clone"),
    ("quickstart.md", "the tests have an environment of their own"),
    ("tutorial-simulation.md", "trains for minutes"),
    ("data.md", "fetches a model and trains it for minutes"),
    ("data.md", "needs the model that was trained above"),
    ("data.md", "needs an adapter that was trained"),
    ("serving.md", "serves until it is stopped"),
    ("serving.md", "needs vLLM and a GPU"),
    ("serving.md", "needs the run on notes and llama.cpp"),
    ("serving.md", "needs a login at a hub"),
}
PROXY_SCRIPT = Path(__file__).with_name("connect_proxy.py")
_BLOCK_S = 600
ADDRESS, PROXY = "127.0.0.1:8470", "proxy.example:3128"

FEDLOOM = """#!/bin/sh
# The noise is fixed too: two steps would need so little for their epsilon that no policy allowed it.
small="--set run.rounds=2 --set train.steps=1 --set train.sampling_rate=0.004 --set privacy.noise_multiplier=1.0"
case "$1 $2" in
    simulate*) set -- "$@" $small --set evaluation.max_examples=20 ;;
    server*|evaluate*|export*|"privacy plan") set -- "$@" $small ;;
esac
exec {python} -m fedloom.cli.main "$@"
"""
PIP = """#!/bin/sh
# Into a folder that only this page's commands see, built with what is installed here.
[ "$1" = install ] && shift
exec {python} -m pip install --quiet --no-build-isolation --no-index --target {packages} "$@"
"""
PYTEST = '#!/bin/sh\nexec {python} -m pytest -p no:cacheprovider "$@"\n'


def test_every_page_says_what_is_not_run_and_why() -> None:
    marked = {(page, block.mark) for page in PAGES for block in blocks(page) if block.mark.startswith("not-run")}

    assert marked == {(page, f"not-run: {why}") for page, why in NOT_RUN}


@pytest.mark.parametrize("page", PAGES)
def test_every_mark_is_known_and_most_is_run(page: str) -> None:
    found = blocks(page)

    for block in found:
        assert block.mark in {"", "background", "said"} or block.mark.startswith(("not-run: ", "file=")), block
    assert sum(block.language in {"sh", "python", "toml"} and "not-run" not in block.mark for block in found) >= 4
    assert (DOCS / page).read_text().count("```") == 2 * len(found), "a fence is not closed, or names no language"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A shell with the three scripts, in which the demo's model and data are in the cache."""
    for asset in ("minilm-l3-mean", "sentiment"):
        fetch(asset)
    programs, packages = tmp_path / "bin", tmp_path / "packages"
    programs.mkdir()
    for name, text in (("fedloom", FEDLOOM), ("pip", PIP), ("pytest", PYTEST)):
        (programs / name).write_text(text.format(python=sys.executable, packages=packages))
        (programs / name).chmod(stat.S_IRWXU)
    (programs / "python").symlink_to(sys.executable)
    search = os.pathsep.join([str(programs), os.environ["PATH"]])
    paths = {"PATH": search, "PYTHONPATH": str(packages), "FEDLOOM_CACHE": str(cache_dir())}
    quiet = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return quiet | paths | {"COLUMNS": "120", "TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(1200)  # whole runs; a busy machine must not fail one
@pytest.mark.parametrize("page", PAGES)
def test_the_page_works(page: str, tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "clone"
    (folder / "examples").mkdir(parents=True)
    for path in (DOCS.parent / "examples").glob("*.toml"):
        (folder / "examples" / path.name).write_bytes(path.read_bytes())
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    background: list[subprocess.Popen[bytes]] = []
    with proxy(tmp_path / "asked") as port:
        try:
            for block in blocks(page):
                text = block.text.replace(ADDRESS, address).replace(PROXY, f"127.0.0.1:{port}")
                _do(page, block, text, folder, environment, background)
            for process in background:
                assert process.wait(120) == 0, (folder / "background.log").read_text()
        finally:
            for process in background:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    if page == "tutorial-sites.md":
        assert f"CONNECT {address} HTTP/1.1" in (tmp_path / "asked").read_text()
        assert (folder / "runs/ward/adapter/adapter_model.safetensors").is_file()


def _do(
    page: str,
    block: Block,
    text: str,
    folder: Path,
    environment: dict[str, str],
    background: list["subprocess.Popen[bytes]"],
) -> None:
    """One block, as its mark says."""
    where = f"{page} line {block.line}"
    if block.mark.startswith("file="):
        target = folder / block.mark.removeprefix("file=")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return
    if block.mark == "said":
        printed = (folder / "said.log").read_text().replace(f"{folder.resolve()}/", "")
        assert printed == text, f"{where} shows what was not said: {printed}"
    if block.mark.startswith("not-run") or block.language not in {"sh", "python"}:
        return
    command = ["bash", "-euc", text] if block.language == "sh" else [sys.executable, "-c", text]
    if block.mark == "background":
        log = folder / "background.log"
        with log.open("wb") as file:
            background.append(
                subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True)
            )
        end = time.monotonic() + 120
        while "listening on" not in log.read_text():
            assert background[-1].poll() is None, f"{where}: {log.read_text()}"
            assert time.monotonic() < end, f"{where} does not come up: {log.read_text()}"
            time.sleep(0.1)
        return
    with (folder / "said.log").open("w+") as said:
        done = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            done.wait(_BLOCK_S)
        finally:
            if done.poll() is None:  # one of its own background processes waits for what has failed
                os.killpg(done.pid, signal.SIGKILL)
                done.wait()
                pytest.fail(f"{where} does not end: {(folder / 'said.log').read_text()}")
    assert done.returncode == 0, f"{where}: {(folder / 'said.log').read_text()}"


@contextmanager
def proxy(log: Path) -> Iterator[str]:
    """A proxy in a process of its own: its port. What it was asked for is in `log`."""
    with log.open("wb") as file, subprocess.Popen([sys.executable, PROXY_SCRIPT], stdout=file) as process:
        try:
            while not log.read_text().endswith("\n"):
                assert process.poll() is None
                time.sleep(0.05)
            yield log.read_text().split()[0]
        finally:
            process.kill()
