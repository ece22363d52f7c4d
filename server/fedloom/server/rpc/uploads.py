"""Updates that are on their way: what has come of each, so that a broken upload goes on where it stopped.

An upload is held in memory while there is room, and otherwise, or as soon as its call breaks, in a file of the
state directory. So memory does not grow with the number of clients that send at once, and a coordinator that is
stopped and started again still has what came before. Nothing here is trusted later: the whole payload must have the
digest in its header.
"""

import hashlib
import threading
import time
from pathlib import Path

from fedloom.core.errors import ProtocolError, StoreError
from fedloom.proto.messages import UpdateHeader

__all__ = ["MEMORY_BYTES", "Upload", "Uploads"]

MEMORY_BYTES = 32 << 20
"""Most bytes of unfinished uploads in memory, all clients together."""

_KEPT_S = 600.0
"""How long a broken upload may wait for its client."""
_SUFFIX = ".part"


class Upload:
    """The bytes of one update that have come so far, in order from its first."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path, self.size_bytes = path, size_bytes
        self.turn = 0
        """Which call may add bytes; an earlier one, whose line may be dead without anybody knowing, may not."""
        self.parts: list[memoryview] = []
        self.lock = threading.Lock()
        self.on_disk = path.is_file() and path.stat().st_size <= size_bytes
        self.received = path.stat().st_size if self.on_disk else 0


class Uploads:
    """All unfinished uploads of one run, at most one for each client. Any thread may call.

    Args:
        folder: Where broken and large uploads lie; made when it is needed.
        memory_bytes: Most bytes of them in memory.
    """

    def __init__(self, folder: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder, self._room = folder, memory_bytes
        self._mutex = threading.Lock()
        self._held: dict[str, Upload] = {}
        self._swept_s = 0.0

    def take(self, header: UpdateHeader, size_bytes: int, offset: int) -> tuple[Upload, int]:
        """The upload of this update and the number of the caller's turn; nobody else may add to it any more.

        Args:
            header: Of the update; an unfinished one of the same client that is another is forgotten.
            size_bytes: Its full length.
            offset: Where the caller wants to go on; 0 begins again.

        Raises:
            StoreError: The disk refuses.
        """
        key = f"{header.client}\0{header.round}\0{header.attempt}\0{header.codec}\0{header.digest}"
        path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}{_SUFFIX}"
        try:
            self._sweep()
            while True:
                # Looked up and made in one step: of two calls that come at once, both must get the same one.
                with self._mutex:
                    upload = self._held.get(header.client) or Upload(path, size_bytes)
                    self._held[header.client] = upload
                if upload.path != path:
                    self.drop(header.client)
                    continue
                with upload.lock:
                    with self._mutex:
                        if self._held.get(header.client) is not upload:
                            continue  # dropped meanwhile
                    upload.turn += 1
                    turn = upload.turn
                    if offset == 0 or (upload.on_disk and not path.is_file()):
                        self._empty(upload)
                    return upload, turn
        except OSError as error:
            raise _failed(path, error) from error

    def fits(self, upload: Upload, size_bytes: int) -> bool:
        """Whether `add` would take so many bytes without touching the disk."""
        return not upload.on_disk and size_bytes <= self._room

    def add(self, upload: Upload, turn: int, data: memoryview) -> None:
        """Add bytes to the end.

        Raises:
            ProtocolError: Another call has taken the upload over, or these are too many.
            StoreError: The disk refuses.
        """
        with upload.lock:
            if turn != upload.turn:
                raise ProtocolError("another call goes on with this update; this one is over")
            if upload.received + len(data) > upload.size_bytes:
                raise ProtocolError(
                    f"at least {upload.received + len(data)} bytes of payload came; "
                    f"the header announced {upload.size_bytes}"
                )
            if self.fits(upload, len(data)):
                upload.parts.append(data)
                self._give(-len(data))
            else:
                self._write(upload, data)
            upload.received += len(data)

    def payload(self, upload: Upload, turn: int) -> bytes:
        """All of it, once it is all there; it stays until `drop`.

        Raises:
            ProtocolError: Another call has taken the upload over.
            StoreError: The disk refuses.
        """
        with upload.lock:
            if turn != upload.turn:
                raise ProtocolError("another call goes on with this update; this one is over")
            if not upload.on_disk:
                return b"".join(upload.parts)
            try:
                return upload.path.read_bytes()
            except OSError as error:
                raise _failed(upload.path, error) from error

    def park(self, upload: Upload, turn: int) -> None:
        """Keep what has come where it costs no memory, unless another call is at it already.

        Raises:
            StoreError: The disk refuses.
        """
        with upload.lock:
            if turn == upload.turn and upload.parts:
                self._write(upload, memoryview(b""))

    def drop(self, client: str) -> None:
        """Forget the upload of a client, if there is one.

        Raises:
            StoreError: The disk refuses.
        """
        with self._mutex:
            upload = self._held.pop(client, None)
        if upload is None:
            return
        with upload.lock:
            upload.turn += 1
            try:
                self._empty(upload)
            except OSError as error:
                raise _failed(upload.path, error) from error

    def clear(self) -> None:
        """Forget every upload, also those of earlier processes: the run is over.

        Raises:
            StoreError: The disk refuses.
        """
        for client in list(self._held):
            self.drop(client)
        self._sweep(kept_s=-1.0)

    def _write(self, upload: Upload, data: memoryview) -> None:
        """Move what is in memory to the file, with `data` after it. Not synchronised: its digest tells."""
        try:
            self._folder.mkdir(0o700, exist_ok=True)
            with upload.path.open("ab" if upload.on_disk else "wb") as file:
                for part in (*upload.parts, data):
                    file.write(part)
        except OSError as error:
            raise _failed(upload.path, error) from error
        self._give(sum(map(len, upload.parts)))
        upload.on_disk = True
        upload.parts.clear()

    def _empty(self, upload: Upload) -> None:
        self._give(sum(map(len, upload.parts)))
        upload.parts.clear()
        upload.received, upload.on_disk = 0, False
        upload.path.unlink(missing_ok=True)

    def _give(self, size_bytes: int) -> None:
        with self._mutex:
            self._room += size_bytes

    def _sweep(self, kept_s: float = _KEPT_S) -> None:
        """Delete files nobody has come back for. At most once a minute."""
        now_s = time.time()  # the files carry the wall clock's time; a step of it costs a client its second try
        if kept_s >= 0 and abs(now_s - self._swept_s) < 60:
            return
        self._swept_s = now_s
        for path in self._folder.glob(f"*{_SUFFIX}"):
            try:
                old = now_s - path.stat().st_mtime > kept_s
                if old:
                    path.unlink()
            except FileNotFoundError:
                continue


def _failed(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path}: {error}; free or repair the disk, then start the coordinator again")
