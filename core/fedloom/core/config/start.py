"""[start]: the adapter that a run begins from."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open

from fedloom.core.codecs import codec
from fedloom.core.codecs.auto import AUTO
from fedloom.core.config.parsing import FileName, Section
from fedloom.core.errors import CodecError, ConfigError, SchemaError
from fedloom.core.schema import Array, Role, Schema, Tensors
from fedloom.core.tensor_file import TENSORS

__all__ = [
    "StartSection",
    "beginning",
    "check_digest",
    "check_origin",
    "needs_base",
    "pinned",
    "read_tensors",
    "tensors_file",
]


_MERGED = "; what corrects the base model can be gone on from merged, by `fedloom export --format merged`"


class StartSection(Section):
    """[start]: an earlier adapter to go on from, in place of a fresh one. Clients are not told where it came from."""

    adapter: FileName
    """The folder of a run's result, such as runs/NAME/adapter, that of another PEFT adapter, or a file of
    `fedloom export --format safetensors`."""
    digest: str | None = Field(default=None, pattern=r"^sha256:[0-9a-f]{64}$")
    """Pin of its file of tensors; another one is refused. None takes what is found."""


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Raises:
        ConfigError: There is no such file, or it is none of safetensors.
    """
    try:
        with safe_open(str(path), framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, ValueError) as error:  # numpy has no bfloat16
        raise ConfigError(f"start.adapter: {path} cannot be read: {error}; give an adapter in float32") from error


def tensors_file(section: StartSection) -> Path:
    """The file that holds the tensors."""
    path = Path(section.adapter)
    if not path.is_dir():
        return path
    return path / ("adapter_model.safetensors" if needs_base(section) else TENSORS)


def needs_base(section: StartSection | None) -> bool:
    """Whether it takes the base model to read the tensors: those of a PEFT folder. Others are the schema's own."""
    folder = None if section is None else Path(section.adapter)
    return folder is not None and folder.is_dir() and not (folder / TENSORS).is_file()


def pinned(section: StartSection | None) -> StartSection | None:
    """The section with the digest of what it names, unless that is gone."""
    if section is None or section.digest is not None or not tensors_file(section).is_file():
        return section
    return section.model_copy(update={"digest": check_digest(tensors_file(section), None)})


def check_digest(path: Path, pinned: str | None) -> str:
    """The digest of a file of tensors.

    Raises:
        ConfigError: It cannot be read, or is not the one that start.digest pins.
    """
    try:
        with path.open("rb") as file:
            found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise ConfigError(f"start.adapter: {path} cannot be read: {error}; give an adapter's folder or file") from error
    if pinned not in (None, found):
        raise ConfigError(
            f"start.adapter: {path} has digest {found}, and start.digest pins {pinned}; get the same file"
        )
    return found


def check_origin(known: dict[str, Any], base_digest: str | None, labels: tuple[str, ...]) -> None:
    """Refuse an adapter that says it is of another base model or for other labels; one that says nothing passes.

    Args:
        known: What fedloom wrote beside the adapter.
        base_digest: Of this run's base model.
        labels: This run's.

    Raises:
        ConfigError: It is of another.
    """
    if base_digest and known.get("base_digest") not in (None, base_digest):
        raise ConfigError(
            f"start.adapter was trained on base model {known['base_digest']}, and this run's is {base_digest}; "
            "use the same base model"
        )
    if known.get("labels") and labels and tuple(known["labels"]) != labels:
        raise ConfigError(
            f"start.adapter was trained for the labels {known['labels']} in this order, and the run has "
            f"{list(labels)}; set model.labels to the same"
        )


def beginning(found: Tensors, schema: Schema, fresh: Tensors, broadcast: str) -> dict[str, Array]:
    """The adapter that a run begins from: every tensor of the schema, float32.

    Args:
        found: What the earlier adapter has. It may lack the head, whole: a new one is then trained.
        schema: The run's.
        fresh: The adapter that the run would draw.
        broadcast: Codec that has to carry it to the clients.

    Raises:
        ConfigError: A tensor is missing, has another shape or is not finite, or there is one that the run does not
            train.
    """
    heads = {spec.name for spec in schema.tensors if spec.role == Role.HEAD}
    whole = dict(found) if heads & found.keys() else {**{name: fresh[name] for name in heads}, **found}
    wanted = {spec.name for spec in schema.tensors}
    for names, what in ((wanted - whole.keys(), "lacks"), (whole.keys() - wanted, "has, and this run does not train,")):
        if names:
            raise ConfigError(
                f"start.adapter {what} {len(names)} tensors, such as {sorted(names)[0]}; set [adapter] and model.head "
                f"as they were when it was trained{_MERGED if any('.base_' in name for name in names) else ''}"
            )
    try:
        schema.check(whole)
    except SchemaError as error:
        raise ConfigError(
            f"start.adapter does not fit this run: {error}; set adapter.rank as it was when it was trained{_MERGED}"
        ) from error
    values = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in whole.items()}
    if spoilt := [name for name, each in values.items() if not np.isfinite(each).all()]:
        raise ConfigError(f"start.adapter has NaN or Inf in {spoilt[0]}; it cannot be trained on")
    try:
        codec("fp32" if broadcast == AUTO else broadcast).encode(schema, values)  # as whole adapters then go
    except CodecError as error:
        raise ConfigError(f'start.adapter cannot be sent to clients: {error}; set wire.broadcast = "fp32"') from error
    return values
