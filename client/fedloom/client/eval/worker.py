"""A process that scores one adapter after the other on held-out rows, for a coordinator that waits for none of it.

It is told by lines and lengths: the order as one line of JSON, then for each adapter eight bytes of length and a
safetensors document; it answers each, and the order itself, with one line of JSON. It ends when its input does.
"""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import load, save

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, FedloomError, Unavailable
from fedloom.core.schema import Tensors

__all__ = ["main", "scoring"]

_LENGTH = struct.Struct(">Q")
_NICE = 10


@contextmanager
def scoring(config: RunConfig, source: str) -> Iterator[Callable[[Tensors], tuple[float, float]]]:
    """Have a process for the length of a `with` block whose value gives accuracy and loss (nats) of an adapter.

    It has loaded the base model and the rows when the block begins. The value is for one thread; it waits, and raises
    Unavailable or ConfigError when the process has ended or cannot score.

    Args:
        config: The run file, the base model pinned.
        source: A packaged data set, or a folder with a test split, or a file, all of which is held-out.

    Raises:
        ConfigError: fedloom[client] is not installed, or the rows or the base model cannot be used.
        Unavailable: The process has ended.
    """
    # Not a thread here: tokenizing and torch would keep the interpreter's lock and every core from whom we serve.
    command = [sys.executable, "-m", "fedloom.client.eval.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:

        def score(adapter: Tensors) -> tuple[float, float]:
            content = save({name: np.ascontiguousarray(each) for name, each in adapter.items()})
            answer = _asked(process, _LENGTH.pack(len(content)) + content)
            return float(answer["accuracy"]), float(answer["loss"])

        try:
            order = {"config": config.model_dump_json(exclude_none=True), "source": source}
            _asked(process, json.dumps(order).encode() + b"\n")
            yield score
        finally:
            process.kill()  # it keeps nothing
            assert process.stdin is not None
            with suppress(OSError):  # what it has not read is of no use any more
                process.stdin.close()


def _asked(process: "subprocess.Popen[bytes]", question: bytes) -> dict[str, Any]:
    """The answer of the process to one message."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):  # it may have said why
        process.stdin.write(question)
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise Unavailable(f"the process that scores on held-out rows has ended with status {process.wait()}")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise ConfigError(answer["error"])
    return answer


def main() -> None:
    """Serve whoever started this process."""
    answers, questions = os.fdopen(os.dup(1), "wb", buffering=0), sys.stdin.buffer
    os.dup2(2, 1)  # what a library prints is no answer
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # a coordinator that is told to stop has its last adapter scored
    with suppress(OSError):
        os.nice(_NICE)
    try:
        _serve(questions, answers)
    except ModuleNotFoundError as error:
        _answer(answers, error=f"scoring needs {error.name!r}, which is not installed; install fedloom[client]")
    except FedloomError as error:
        _answer(answers, error=str(error))
    except BrokenPipeError:
        pass  # nobody waits any more


def _serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    from fedloom.client.eval.held_out import HeldOut

    order = json.loads(questions.readline() or "{}")
    if not order:
        return
    source = order["source"]
    config = RunConfig.model_validate_json(order["config"])
    # Accuracy and loss are all that is told, so nothing is written.
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"generate": 0})})
    rows = HeldOut.load(config, source, "train" if Path(source).is_file() else "test")
    _answer(answers)
    while prefix := questions.read(_LENGTH.size):
        (size,) = _LENGTH.unpack(prefix)
        content = questions.read(size)
        if len(content) < size:
            return
        found = rows.score(load(content))
        _answer(answers, accuracy=found.accuracy, loss=found.loss)


def _answer(answers: IO[bytes], **content: object) -> None:
    answers.write(json.dumps(content).encode() + b"\n")


if __name__ == "__main__":
    main()
