"""An export on a model hub, for whoever asks for it; no run ever does."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from fedloom.core.config.parsing import read_json
from fedloom.core.errors import ConfigError, Unavailable

__all__ = ["push", "uploadable"]

_NEEDED = ("README.md", "fedloom.json")
_FACTS = {"run", "base_digest", "labels", "privacy"}
"""Keys that fedloom.json of every export has."""

_EXPORTED = re.compile(
    r"README\.md|fedloom\.json"
    r"|adapter_config\.json|adapter_model\.safetensors|adapter\.json|adapter\.safetensors"
    r"|config\.json|generation_config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja"
    r"|vocab\.(txt|json)|merges\.txt|tokenizer\.model|spiece\.model|preprocessor_config\.json"
    r"|model\.onnx(\.data)?|(model|adapter)\.gguf"
)
"""Names of all files that an export writes."""


def uploadable(folder: Path) -> list[Path]:
    """The files of an export, by name.

    Raises:
        ConfigError: The folder is no export of fedloom, or holds anything else: another file, a folder or a link.
    """
    if not folder.is_dir() or not all((folder / name).is_file() for name in _NEEDED):
        raise ConfigError(
            f"{folder} is no folder with {' and '.join(_NEEDED)}; give what `fedloom export` or a run wrote"
        )
    if lacks := sorted(_FACTS - read_json(folder / "fedloom.json").keys()):
        raise ConfigError(f"{folder / 'fedloom.json'} lacks {lacks[0]}; give what `fedloom export` wrote")
    files = sorted(folder.iterdir())
    for path in files:
        if path.is_symlink() or not path.is_file() or not _EXPORTED.fullmatch(path.name):
            raise ConfigError(f"{path} is no part of an export, so nothing is uploaded; move it away, or export anew")
    return files


def push(files: Sequence[Path], repo: str, *, public: bool = False, endpoint: str | None = None) -> str:
    """Upload files to a model repository in one commit, and return the commit's address.

    The repository is made if there is none. The token is that of `hf auth login`, or of the variable HF_TOKEN.

    Args:
        files: See `uploadable`.
        repo: OWNER/NAME.
        public: Let everybody read it. Otherwise it is made private, and must be private if it is there already.
        endpoint: The hub's address; None is that of the variable HF_ENDPOINT, or the public hub.

    Raises:
        ConfigError: Somebody else could read the repository, and `public` is false.
        Unavailable: The hub cannot be reached, or refuses.
    """
    hub = HfApi(endpoint=endpoint)
    try:
        if not public and _is_public(hub, repo):
            raise ConfigError(
                f"{repo} is there already, and everybody can read it; give --public, or the name of another repository"
            )
        hub.create_repo(repo, private=not public, exist_ok=True)
        if not public and _is_public(hub, repo):  # somebody else was first, or the hub has its own rule
            raise ConfigError(
                f"{repo} is public, though it was to be private; nothing was uploaded, and see the hub's settings"
            )
        added = [CommitOperationAdd(path.name, path) for path in files]
        done = hub.create_commit(repo, added, commit_message="Result of a run of fedloom")
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub's client makes of a network and a server
        # Of an upload that failed the client names the file, and the cause says why.
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        why = str(cause or error).strip().partition("\n")[0]
        remedy = "see the address, the network and the proxy"
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            remedy = "log in with `hf auth login`, with a token that may write there"
        raise Unavailable(f"nothing was committed to {repo} at {hub.endpoint}: {why}; {remedy}") from error
    return str(done.commit_url)


def _is_public(hub: HfApi, repo: str) -> bool:
    try:
        return not hub.model_info(repo).private
    except RepositoryNotFoundError:
        return False
