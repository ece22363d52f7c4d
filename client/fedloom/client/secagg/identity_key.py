"""The long-term key by which a client's peers know it, apart from any coordinator."""

import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedloom.core.errors import ConfigError

__all__ = ["load_identity", "public_text"]

_FILE = "identity.key"
_KEY_BYTES = 32


def load_identity(folder: Path) -> Ed25519PrivateKey:
    """The Ed25519 key in a client's state folder, made at first use and readable by its owner alone.

    Raises:
        ConfigError: The file is no key, or others may read it.
    """
    path = folder / _FILE
    if not path.exists():
        _make(path)
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="ascii")
        key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(text))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} holds no identity key: {error}; restore it, or remove it and have your peers pin the new one"
        ) from error
    if mode & 0o077:
        raise ConfigError(f"{path} may be read by others (mode {mode & 0o777:o}); run `chmod 600` on it")
    return key


def public_text(identity: Ed25519PrivateKey) -> str:
    """The public key as peers write it into their policy: 64 hexadecimal digits."""
    return identity.public_key().public_bytes_raw().hex()


def _make(path: Path) -> None:
    """Write a new key, whole or not at all; whoever is second takes the first one's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{secrets.token_hex(8)}")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(file, "w", encoding="ascii") as out:
            out.write(secrets.token_bytes(_KEY_BYTES).hex())
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink()
