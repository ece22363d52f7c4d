"""The line between a site's short-lived Flower processes and its resident trainer: a Unix socket for its owner alone.

A message is a fixed prefix, a head and a payload. The reader knows both lengths before it takes a byte of either.
"""

import os
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from fedloom.client.policy import Policy
from fedloom.core.errors import ConfigError, ProtocolError, Unavailable
from fedloom.core.limits import MAX_PAYLOAD_BYTES
from fedloom.flower.messages import MAX_HEAD_BYTES

__all__ = ["ask", "listening", "receive", "send", "socket_path"]

_PREFIX = struct.Struct(">8sIQ")
_MAGIC = b"fedloom1"
_LONGEST_PATH = 100
"""A socket's path has to fit into about 108 bytes, by the system's own structure."""
_START_S = 120.0
_PAUSE_S = 0.05


def socket_path(policy: Policy) -> Path:
    """Where the site's resident trainer listens: in a folder of its own, so that a container may be given nothing else.

    Raises:
        ConfigError: The path is too long for a socket.
    """
    path = policy.client.state / "flower" / "node.sock"
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(
            f"{path} is too long for a socket ({len(os.fsencode(path))} bytes, at most {_LONGEST_PATH}); give "
            "client.state in the policy a shorter path"
        )
    return path


def listening(path: Path) -> socket.socket:
    """A socket at `path` that only this user may connect to; what was there before is replaced.

    Raises:
        OSError: The folder cannot be written.
    """
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # With the mode from the first moment on: a chmod afterwards would leave a gap.
    before = os.umask(0o177)
    try:
        server.bind(str(path))
    finally:
        os.umask(before)
    server.listen()
    return server


def send(line: socket.socket, head: bytes, payload: bytes) -> None:
    """Send one message."""
    line.sendall(_PREFIX.pack(_MAGIC, len(head), len(payload)) + head)
    if payload:  # whoever has read a head without one may be gone already
        line.sendall(payload)


def receive(line: socket.socket) -> tuple[bytes, bytes]:
    """Read one message.

    Raises:
        ProtocolError: It is not one, or longer than any may be; nothing of it is kept.
        Unavailable: The other side is gone before its end.
    """
    magic, head, payload = _PREFIX.unpack(_exactly(line, _PREFIX.size))
    if magic != _MAGIC or head > MAX_HEAD_BYTES or payload > MAX_PAYLOAD_BYTES:
        raise ProtocolError(
            f"a message begins with {magic!r}, {head} bytes of head and {payload} of payload; {_MAGIC!r}, at most "
            f"{MAX_HEAD_BYTES} and {MAX_PAYLOAD_BYTES} are allowed: use one version of fedloom on this machine"
        )
    return _exactly(line, head), _exactly(line, payload)


def ask(path: Path, command: Sequence[str], head: bytes, payload: bytes) -> tuple[bytes, bytes]:
    """Ask the resident trainer at `path`; waits for as long as it works.

    Args:
        path: Its socket.
        command: Started if nobody listens there. The process outlives this one; what it says goes to node.log.
        head: Of the message.
        payload: Of the message.

    Raises:
        Unavailable: It does not start, or it ended before it answered.
        ProtocolError: What came back is not a message.
    """
    with closing(_connected(path) or _started(path, command)) as line:
        try:
            send(line, head, payload)
            return receive(line)
        except OSError as error:
            raise Unavailable(
                f"the resident trainer at {path} is gone: {error}; node.log beside it says why"
            ) from error


def _started(path: Path, command: Sequence[str]) -> socket.socket:
    """A line to a resident trainer that was not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.with_name("node.log")
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise Unavailable(
                f"{command[0]} cannot be started: {error}; name fedloom's command in node-config"
            ) from error
    deadline = time.monotonic() + _START_S
    while (line := _connected(path)) is None:
        # Status 0: another one was faster, and is about to listen.
        if process.poll() not in (None, 0) or time.monotonic() > deadline:
            raise Unavailable(f"the resident trainer does not listen at {path}; {log} says why")
        time.sleep(_PAUSE_S)
    return line


def _connected(path: Path) -> socket.socket | None:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.connect(str(path))
    except OSError:
        line.close()
        return None
    return line


def _exactly(line: socket.socket, size_bytes: int) -> bytes:
    """So many bytes; memory grows with what has come, not with what was announced."""
    parts: list[bytes] = []
    while size_bytes:
        part = line.recv(min(size_bytes, 1 << 20))
        if not part:
            raise Unavailable(f"the line ended {size_bytes} bytes before the message did")
        parts.append(part)
        size_bytes -= len(part)
    return b"".join(parts)
