"""Where a base model lies on this machine, and whether it is the one that a run means."""

import hashlib
import re
from pathlib import Path

from transformers.utils import cached_file

from fedloom.client.assets.fetch import ASSETS, fetch
from fedloom.client.policy import Policy
from fedloom.core.config.run import Spec
from fedloom.core.errors import ModelError, PolicyError

__all__ = ["DIGESTED", "allowed_base", "base_digest", "resolve_base"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
DIGESTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def resolve_base(base: str) -> Path:
    """The folder of a base model named in a run or policy file.

    Args:
        base: A local folder, an asset's name, or ORG/NAME of a model that is in this machine's hub cache.

    Raises:
        ModelError: There is no such folder, or it holds no safetensors weights.
    """
    folder = fetch(base) if base in ASSETS else Path(base).expanduser()
    if not folder.exists() and _HUB_ID.fullmatch(base):
        folder = _cached(base)
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.base {base!r}: {folder} has no config.json; give a folder saved by save_pretrained")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"model.base {base!r}: {folder} has no *.safetensors; other weight formats are not read")
    return folder


def _cached(hub_id: str) -> Path:
    """The folder of the revision that the hub cache has as the main one; nothing is downloaded."""
    try:
        return Path(str(cached_file(hub_id, "config.json", local_files_only=True))).parent
    except OSError as error:
        raise ModelError(
            f"model.base {hub_id!r} is neither a local folder nor in this machine's hub cache, and nothing is "
            f"downloaded in a run; run `hf download {hub_id}` first, or give a folder"
        ) from error


def base_digest(folder: Path) -> str:
    """Identity of a base model: SHA-256 over its configuration, weights and tokenizer files.

    Returns:
        "sha256:" and 64 hex digits.
    """
    total = hashlib.sha256()
    for path in sorted({path for pattern in DIGESTED for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            part = hashlib.file_digest(file, "sha256")
        total.update(f"{path.name}\0{part.hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def allowed_base(policy: Policy, spec: Spec) -> Path:
    """The folder of the run's base model as this site has it.

    Raises:
        ModelError: There is none, or its digest is not the one that the run pins.
        PolicyError: It is not one this site allows.
    """
    base = policy.model.folder or spec.model.base
    folder = resolve_base(base)
    found = base_digest(folder)
    if policy.model.digests and found not in policy.model.digests:
        raise PolicyError(
            f"base model {base!r} has digest {found}; this site allows {', '.join(policy.model.digests)} "
            "(model.digests in the policy)"
        )
    if spec.model.digest is not None and found != spec.model.digest:
        raise ModelError(
            f"base model {base!r} has digest {found}; the run pins {spec.model.digest}; get the same files"
        )
    return folder
