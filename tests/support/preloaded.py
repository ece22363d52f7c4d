"""`fedloom` as a process of its own that is forked from an interpreter which has loaded torch, and so starts at once.

`command()` is used like `[python, "-m", "fedloom.cli.main"]` and behaves like it: arguments, environment, folder,
streams and exit status are the caller's, and the usual signals reach the process. What a test asserts about terminals,
or about what is imported, needs the real one.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

__all__ = ["HEAVY", "command", "fedloom"]

HEAVY = (
    "dp_accounting.pld",
    "hypothesis",
    "opacus.accountants",
    "opacus.grad_sample",
    "opacus.optimizers",
    "peft",
    "scipy.stats",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
)
"""What takes seconds to load, and holds no code of ours."""
_CLIENT = Path(__file__).with_name("preloaded_client.py")
_MOST_BYTES = 1 << 17


@functools.cache
def command() -> list[str]:
    """The words that start `fedloom`, before its arguments. The server behind them ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="fedloom-"))
    path = folder / "socket"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen(64)
        # Its standard input ends when this process does, however that comes about.
        server = subprocess.Popen(
            [sys.executable, __file__, str(listening.fileno())], stdin=subprocess.PIPE, pass_fds=[listening.fileno()]
        )
    atexit.register(server.kill)
    return [sys.executable, "-S", "-E", str(_CLIENT), str(path)]


def fedloom(*arguments: str | Path, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run the command to its end, at most 800 seconds; its streams are text and its exit status may be any."""
    words = [*command(), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=800, cwd=cwd)


def _serve(listening: socket.socket) -> None:
    """Fork a process for each caller, until standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
    while True:
        if 0 in select.select([listening.fileno(), 0], [], [])[0]:
            return
        caller, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _watch(caller)
            finally:
                os._exit(0)
        caller.close()


def _watch(caller: socket.socket) -> None:
    """Run one command, pass signals on to it and its exit status back; a caller that is gone ends it."""
    message, streams, _, _ = socket.recv_fds(caller, _MOST_BYTES, 3)
    asked = json.loads(message)
    child = os.fork()
    if child == 0:
        caller.close()
        _become(asked, streams)
    for each in streams:
        os.close(each)
    ended = os.pidfd_open(child)
    while caller.fileno() in select.select([caller.fileno(), ended], [], [])[0]:
        number = caller.recv(8)
        os.kill(child, int(number) if number else signal.SIGKILL)
        if not number:
            break
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        caller.send(str(os.waitstatus_to_exitcode(status)).encode())


def _become(asked: dict[str, Any], streams: list[int]) -> None:
    """Be `fedloom` as `python -m fedloom.cli.main` is it."""
    for target, each in enumerate(streams):
        os.dup2(each, target)
    os.closerange(3, 64)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[:0] = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.argv = ["fedloom", *asked["arguments"]]
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115  # they live as long as the process
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    status: object = 0
    try:
        runpy.run_module("fedloom.cli.main", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the end of an interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()  # what is loaded is never looked through again, and stays shared
    _serve(socket.socket(fileno=int(sys.argv[1])))
