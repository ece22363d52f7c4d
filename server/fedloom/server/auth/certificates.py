"""The list of certificates an authority has made: only what is on it, and not revoked, is let in.

A certificate with a good signature that is not on the list is refused too, so a lost list locks everybody out and lets
nobody in. The list is SQLite, written by the commands and by enrolment, and read by running coordinators: each sees
what the other has committed.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedloom.core.errors import ConfigError, IdentityError, StoreError
from fedloom.core.security.subject import Identity, MemberRole, fingerprint

__all__ = ["MAX_VALID", "Entry", "Identities"]

MAX_VALID = 4
"""Most valid certificates of one name. A member that renews needs two, and a loop of renewals must end somewhere."""

_FILE = "identities.db"
_TABLES = """
CREATE TABLE IF NOT EXISTS certificates (
    fingerprint TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    role TEXT NOT NULL,
    invite INTEGER NOT NULL,
    parent TEXT,
    key_digest TEXT NOT NULL,
    certificate BLOB NOT NULL,
    issued_s REAL NOT NULL,
    expires_s REAL NOT NULL,
    revoked_s REAL
);
CREATE INDEX IF NOT EXISTS by_name ON certificates (name);
CREATE UNIQUE INDEX IF NOT EXISTS one_by_invite ON certificates (parent, key_digest);
"""
_COLUMNS = "fingerprint, name, role, invite, issued_s, expires_s, revoked_s"
_INVITE_USED = "this invite has been used; ask the operator for another one"


@dataclass(frozen=True)
class Entry:
    """One certificate on the list."""

    fingerprint: str
    identity: Identity
    """What the certificate itself names: for an invite the role is `invite`."""
    promised: MemberRole
    """The role in which its holder takes part, or is invited to."""
    issued_s: float
    expires_s: float
    """Seconds since 1970, as is the time of issue."""
    revoked: bool
    used: bool
    """An invite with which somebody has enrolled."""

    def state(self, now_s: float) -> Literal["valid", "invited", "used", "revoked", "expired"]:
        """In one word."""
        if self.revoked:
            return "revoked"
        if self.used:
            return "used"
        if now_s >= self.expires_s:
            return "expired"
        return "invited" if self.identity.role is MemberRole.INVITE else "valid"


class Identities:
    """The list in a folder of certificates, open in this process. Calls may come from any thread.

    Raises:
        StoreError: The disk or the database refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._mutex = threading.Lock()
        with self._explained():
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
            mode = self._db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode != "wal":
                self._db.close()
                raise StoreError(f"{self._path} stays in journal mode {mode!r}; put it on a local disk")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_TABLES)

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        with self._mutex:
            self._db.close()

    def version(self) -> int:
        """A number that changes whenever another process or another `Identities` has written."""
        with self._mutex, self._explained():
            return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def find(self, name: str) -> Entry | None:
        """The certificate with this fingerprint."""
        query = f"SELECT {_COLUMNS} FROM certificates WHERE fingerprint = ?"
        with self._mutex, self._explained():
            row = self._db.execute(query, (name,)).fetchone()
            return self._entry(row) if row else None

    def entries(self) -> list[Entry]:
        """All, by name and age."""
        query = f"SELECT {_COLUMNS} FROM certificates ORDER BY name, issued_s, fingerprint"
        with self._mutex, self._explained():
            return [self._entry(row) for row in self._db.execute(query).fetchall()]

    def invite(self, identity: Identity, certificate: x509.Certificate, digest: str) -> None:
        """Put an invite's certificate on the list.

        Args:
            identity: Who is invited, in the role that is promised.
            certificate: The invite's own.
            digest: Of its public key.

        Raises:
            ConfigError: The name is already known in another role.
        """
        with self._writing():
            other = "SELECT role FROM certificates WHERE name = ? AND role <> ? AND revoked_s IS NULL"
            if row := self._db.execute(other, (identity.name, identity.role)).fetchone():
                raise ConfigError(
                    f"{identity.name} is known as {row[0]}; revoke it first, or choose another name for the new role"
                )
            self._insert(identity, certificate, digest, invite=True, parent=None)

    def enrol(self, holder: str, digest: str, sign: Callable[[Identity], x509.Certificate]) -> x509.Certificate:
        """A certificate for a key, asked for by the holder of a certificate on the list.

        With an invite it is the first certificate of a member. Others of that name are revoked: one name is one member.
        The same key gets the same certificate again, because the answer may have been lost; another key gets nothing.
        With a member's certificate it is a renewal.

        Args:
            holder: Fingerprint of the asking certificate.
            digest: Of the public key to certify.
            sign: Makes the certificate.

        Raises:
            IdentityError: The asking certificate is not good any more, the invite was used for another key, or the
                member has renewed too often.
        """
        now_s = time.time()
        with self._writing():
            row = self._db.execute(f"SELECT {_COLUMNS} FROM certificates WHERE fingerprint = ?", (holder,)).fetchone()
            if row is None or row[6] is not None or now_s >= row[5]:
                raise IdentityError("this certificate cannot be used to enrol; ask the operator for an invite")
            identity, invite = Identity(MemberRole(row[2]), row[1]), bool(row[3])
            earlier = "SELECT key_digest, certificate, revoked_s FROM certificates WHERE parent = ?"
            for made_for, made, revoked_s in self._db.execute(earlier, (holder,)).fetchall():
                if made_for == digest and revoked_s is None:
                    return x509.load_der_x509_certificate(made)
                if invite:
                    raise IdentityError(_INVITE_USED)
            if invite:
                self._revoke(identity.name, now_s, keep=holder)
            elif self._valid(identity.name, now_s) >= MAX_VALID:
                raise IdentityError(f"{MAX_VALID} certificates of this name are valid; use one, or wait until one ends")
            certificate = sign(identity)
            self._insert(identity, certificate, digest, invite=False, parent=holder)
            return certificate

    def revoke(self, name: str) -> int:
        """Refuse everything of this name from now on, its invites too; how many certificates that were.

        Raises:
            ConfigError: No such name is on the list.
        """
        with self._writing():
            if self._db.execute("SELECT 1 FROM certificates WHERE name = ?", (name,)).fetchone() is None:
                raise ConfigError(f"nobody named {name[:80]!r} was ever invited; `fedloom certs list` shows who was")
            return self._revoke(name, time.time(), keep="")

    def _revoke(self, name: str, now_s: float, *, keep: str) -> int:
        query = "UPDATE certificates SET revoked_s = ? WHERE name = ? AND revoked_s IS NULL AND fingerprint <> ?"
        return self._db.execute(query, (now_s, name, keep)).rowcount

    def _valid(self, name: str, now_s: float) -> int:
        query = (
            "SELECT count(*) FROM certificates WHERE name = ? AND invite = 0 AND revoked_s IS NULL AND expires_s > ?"
        )
        return int(self._db.execute(query, (name, now_s)).fetchone()[0])

    def _insert(
        self, identity: Identity, certificate: x509.Certificate, digest: str, *, invite: bool, parent: str | None
    ) -> None:
        self._db.execute(
            "INSERT INTO certificates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
            (
                fingerprint(certificate),
                identity.name,
                identity.role,
                int(invite),
                parent,
                digest,
                certificate.public_bytes(Encoding.DER),
                time.time(),
                certificate.not_valid_after_utc.timestamp(),
            ),
        )

    def _entry(self, row: tuple[str, str, str, int, float, float, float | None]) -> Entry:
        name, role = row[1], MemberRole(row[2])
        used = "SELECT 1 FROM certificates WHERE parent = ?"
        return Entry(
            fingerprint=row[0],
            identity=Identity(MemberRole.INVITE if row[3] else role, name),
            promised=role,
            issued_s=row[4],
            expires_s=row[5],
            revoked=row[6] is not None,
            used=bool(row[3]) and self._db.execute(used, (row[0],)).fetchone() is not None,
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction: all of it is on the disk when the block ends, or nothing."""
        with self._mutex, self._explained(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{self._path}: {error}; free or repair the disk") from error
