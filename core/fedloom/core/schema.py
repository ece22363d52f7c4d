"""What an adapter is made of: names, shapes and roles, agreed once per run.

Both sides derive every smaller schema (the part that is trained, a lower rank) from the agreed one, so
no shape, dtype or tensor name ever has to be believed from the wire.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import SchemaError
from fedloom.core.limits import MAX_NAME_LENGTH, MAX_PAYLOAD_BYTES, MAX_SCHEMA_BYTES, MAX_TENSORS

__all__ = ["LORA", "Array", "Pair", "Role", "Schema", "Start", "TensorSpec", "Tensors", "linear_name"]

Array = npt.NDArray[np.floating]
Tensors = Mapping[str, Array]


class Role:
    """Roles of the adapter kinds that come with fedloom. A role is any word: a kind of your own brings its own."""

    LORA_A: Final = "lora_A"
    """Down projection, shape (r, in)."""
    LORA_B: Final = "lora_B"
    """Up projection, shape (out, r); zero at the start."""
    BIAS: Final = "bias"
    """Change of a bias vector of the base model, shape (out,); zero at the start."""
    HEAD: Final = "head"
    """Task head. One that the checkpoint lacks is drawn at the start; one that it has travels as its change."""
    BASE_A: Final = "base_A"
    """Right factor of a correction to the frozen weight, W = W0 + scale * base_B @ base_A (FedEx, FLoRA)."""
    BASE_B: Final = "base_B"
    """Left factor of that correction, shape (out, k)."""
    LINEAR: Final = "linear"
    """A term that a client adds to the gradient of another tensor, of that one's shape (SCAFFOLD, FedDyn)."""


class Start(StrEnum):
    """What a tensor is before the first round."""

    DRAWN = "drawn"
    """A lora_A as KAIMING, a matrix of a head as NORMAL, anything else as ZERO."""
    ZERO = "zero"
    """Zero: the model starts as the base model, or the tensor travels as a change of what the base model has."""
    KAIMING = "kaiming"
    """Uniform in +-1/sqrt(in), in being the last size: Kaiming-uniform with a = sqrt(5), as PEFT draws a lora_A."""
    ORTHOGONAL = "orthogonal"
    """A matrix of orthonormal rows, or columns where it is taller than wide, made of a normal one (Saxe et al., ICLR
    2014, arXiv 1312.6120)."""
    NORMAL = "normal"
    """Normal with standard deviation 0.02: `initializer_range` of BERT (Devlin et al., 2019) and its descendants."""


LORA = frozenset({Role.LORA_A, Role.LORA_B})
"""Both factors of a low-rank pair."""

_LEAST_SCALE, _MOST_SCALE = 1e-7, 1e4
"""What [adapter] alpha over rank can be, from 1e-4 / 512 to 1e4 / 1."""

_AXES = {Role.LORA_A: 0, Role.BASE_A: 0, Role.LORA_B: 1, Role.BASE_B: 1}
"""The rank axis of the roles that a schema document needs not name it for."""

_SELECTIONS = 64
"""How many selections a schema remembers."""

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an adapter. Values are float32.

    Args:
        name: Full name, unique in the schema.
        module: The module it belongs to. The two factors of a pair share it.
        role: What it does in the model, a word of letters, digits, "_" and "-". Strategies choose by role or by name.
        shape: One to four sizes.
        start: What it is before the first round.
        rank_axis: The axis whose size is the adapter's rank, which a client may work below. None: as its role says,
            0 for lora_A and base_A, 1 for lora_B and base_B, and no axis for any other.
    """

    name: str
    module: str
    role: str
    shape: tuple[int, ...]
    start: Start = Start.DRAWN
    rank_axis: int | None = None

    def __post_init__(self) -> None:
        """Settle the rank axis."""
        if self.rank_axis is None:
            object.__setattr__(self, "rank_axis", _AXES.get(self.role))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Pair:
    """The two factors of one low-rank update, by tensor name."""

    module: str
    a: str
    b: str


@dataclass(frozen=True)
class Schema:
    """An ordered set of tensors and the LoRA scale that applies to every pair.

    Args:
        tensors: Specs in wire order.
        scale: s in W = W0 + s·B·A, the same for every client of a run whatever its rank.
    """

    tensors: tuple[TensorSpec, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a schema no honest run would have."""
        if len(self.tensors) > MAX_TENSORS:
            raise SchemaError(f"schema has {len(self.tensors)} tensors; at most {MAX_TENSORS} are allowed")
        if len({spec.name for spec in self.tensors}) != len(self.tensors):
            raise SchemaError("schema names a tensor twice; every tensor name must be unique")
        for spec in self.tensors:
            _check_spec(spec)
        if self.roles & {spec.name for spec in self.tensors if spec.name != spec.role}:
            raise SchemaError("a tensor of the schema is named as a role of others; give it another name")
        if 4 * self.size > MAX_PAYLOAD_BYTES:
            raise SchemaError(f"adapter of {self.size} values exceeds {MAX_PAYLOAD_BYTES} bytes; lower the rank")
        if not _LEAST_SCALE <= self.scale <= _MOST_SCALE:
            raise SchemaError(
                f"LoRA scale {self.scale!r} is not within {_LEAST_SCALE:g} to {_MOST_SCALE:g}; change adapter.alpha"
            )

    @cached_property
    def size(self) -> int:
        """Number of values in all tensors together."""
        return sum(spec.size for spec in self.tensors)

    @cached_property
    def _selected(self) -> dict[tuple[frozenset[str], frozenset[str]], "Schema"]:
        """What `select` has given: every client of a round asks for the same few, and for their digests."""
        return {}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def roles(self) -> frozenset[str]:
        """Roles that occur."""
        return frozenset(spec.role for spec in self.tensors)

    def names(self, *words: str) -> frozenset[str]:
        """Names of the tensors that `select` gives for these words; of all tensors without any word."""
        chosen = self.select(words).tensors if words else self.tensors
        return frozenset(spec.name for spec in chosen)

    def unknown(self, words: Iterable[str]) -> list[str]:
        """Those of `words` that are neither a role nor a tensor's name here."""
        return sorted(frozenset(words) - self.roles - self.names())

    def words(self, names: Iterable[str]) -> frozenset[str]:
        """A short selection of exactly these tensors: the roles of which all are among them, and the other names."""
        wanted = frozenset(names)
        missed = {spec.role for spec in self.tensors if spec.name not in wanted}
        return frozenset(
            spec.name if spec.role in missed else spec.role for spec in self.tensors if spec.name in wanted
        )

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The low-rank pairs of roles lora_A and lora_B, in wire order of their A."""
        b_names = {spec.module: spec.name for spec in self.tensors if spec.role == Role.LORA_B}
        a_specs = [spec for spec in self.tensors if spec.role == Role.LORA_A]
        return tuple(Pair(s.module, s.name, b_names[s.module]) for s in a_specs if s.module in b_names)

    @property
    def rank(self) -> int:
        """Largest rank of any tensor that has one; 0 when there is none."""
        return max((spec.shape[spec.rank_axis] for spec in self.tensors if spec.rank_axis is not None), default=0)

    def select(self, words: Iterable[str], but: Iterable[str] = ()) -> "Schema":
        """The tensors whose role or name is among `words`, and not among `but`, in the same order.

        A word that is neither here selects nothing, see `unknown`.
        """
        wanted, left_out = frozenset(words), frozenset(but)
        if (known := self._selected.get((wanted, left_out))) is not None:
            return known
        chosen = (spec for spec in self.tensors if not wanted.isdisjoint((spec.role, spec.name)))
        found = replace(self, tensors=tuple(spec for spec in chosen if left_out.isdisjoint((spec.role, spec.name))))
        if len(self._selected) >= _SELECTIONS:  # the words may be a peer's
            self._selected.clear()
        self._selected[wanted, left_out] = found
        return found

    def with_rank(self, rank: int) -> "Schema":
        """The same tensors, each cut to at most `rank` along its rank axis.

        Raises:
            SchemaError: `rank` is below 1.
        """
        if rank < 1:
            raise SchemaError(f"rank {rank} must be at least 1")

        def cut(spec: TensorSpec) -> TensorSpec:
            if spec.rank_axis is None:
                return spec
            shape = list(spec.shape)
            shape[spec.rank_axis] = min(shape[spec.rank_axis], rank)
            return replace(spec, shape=tuple(shape))

        return replace(self, tensors=tuple(cut(spec) for spec in self.tensors))

    def with_base(self, rank: int) -> "Schema":
        """This schema plus a rank-`rank` correction of the frozen weight for every pair."""
        extra: list[TensorSpec] = []
        by_name = {spec.name: spec for spec in self.tensors}
        for pair in self.pairs:
            a, b = by_name[pair.a], by_name[pair.b]
            extra += [
                TensorSpec(f"{pair.module}.base_A", pair.module, Role.BASE_A, (rank, a.shape[1])),
                TensorSpec(f"{pair.module}.base_B", pair.module, Role.BASE_B, (b.shape[0], rank)),
            ]
        return replace(self, tensors=self.tensors + tuple(extra))

    def with_linear(self, words: Iterable[str]) -> "Schema":
        """This schema plus a term for the gradient of each tensor that `words` select, named by `linear_name`."""
        extra = (replace(spec, name=linear_name(spec.name), role=Role.LINEAR) for spec in self.select(words).tensors)
        return replace(self, tensors=self.tensors + tuple(extra))

    def check(self, tensors: Tensors) -> None:
        """Refuse tensors that are not exactly this schema's.

        Raises:
            SchemaError: A name is missing or extra, or a shape differs.
        """
        wanted = {spec.name: spec.shape for spec in self.tensors}
        missing, extra = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
        if missing or extra:
            names = ", ".join(sorted(missing | extra)[:3])
            raise SchemaError(f"{len(missing)} tensors missing, {len(extra)} unexpected ({names}); send the schema's")
        for name, shape in wanted.items():
            if tensors[name].shape != shape:
                raise SchemaError(f"tensor {name!r} has shape {tensors[name].shape}; the schema says {shape}")

    def zeros(self) -> dict[str, Array]:
        """A float32 zero for every tensor."""
        return {spec.name: np.zeros(spec.shape, np.float32) for spec in self.tensors}

    def to_json(self) -> str:
        """The canonical JSON form: the digest is over exactly these characters."""
        rows = [[s.name, s.module, s.role, list(s.shape), *_particulars(s)] for s in self.tensors]
        return json.dumps({"version": 1, "scale": float(self.scale), "tensors": rows}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Schema":
        """Read what `to_json` wrote.

        Raises:
            SchemaError: The document is too large, not JSON, not a schema, or not exactly as `to_json` writes it.
        """
        if len(text) > MAX_SCHEMA_BYTES:
            raise SchemaError(f"schema of {len(text)} characters; at most {MAX_SCHEMA_BYTES} are allowed")
        try:
            document = json.loads(text)
            if document["version"] != 1:
                raise SchemaError(f"schema version {document['version']!r}; this build reads version 1")
            specs = tuple(
                TensorSpec(str(name), str(module), str(role), tuple(int(n) for n in shape), *_read(*particulars))
                for name, module, role, shape, *particulars in document["tensors"]
            )
            schema = cls(specs, float(document["scale"]))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise SchemaError(f"not a schema document: {error}") from error
        # The conversions above are lenient; one schema must have one spelling, or equal digests mean nothing.
        if schema.to_json() != text:
            raise SchemaError("schema document is not in canonical form; send what to_json writes")
        return schema


def linear_name(name: str) -> str:
    """What a broadcast calls the term that is added to the gradient of the tensor `name`."""
    return f"{name}.{Role.LINEAR}"


def _check_spec(spec: TensorSpec) -> None:
    if not 0 < len(spec.name) <= MAX_NAME_LENGTH or len(spec.module) > MAX_NAME_LENGTH:
        raise SchemaError(f"tensor name {spec.name[:64]!r}: 1 to {MAX_NAME_LENGTH} characters allowed")
    if not 1 <= len(spec.shape) <= 4 or min(spec.shape) < 1:
        raise SchemaError(f"tensor {spec.name!r} has shape {spec.shape}; 1 to 4 positive sizes allowed")
    if not _ROLE.fullmatch(spec.role):
        raise SchemaError(f"tensor {spec.name!r} has role {spec.role[:64]!r}; 1 to 64 letters, digits, _ and - allowed")
    if spec.rank_axis is not None and not 0 <= spec.rank_axis < len(spec.shape):
        raise SchemaError(f"tensor {spec.name!r} of shape {spec.shape} has no axis {spec.rank_axis} for a rank")


def _particulars(spec: TensorSpec) -> list[str | int]:
    """What its role does not say of a tensor: nothing, its start, or its start and its rank axis.

    The digest of a schema of the first release stays what it was.
    """
    if spec.rank_axis != _AXES.get(spec.role):
        assert spec.rank_axis is not None  # an axis that its role has cannot be taken away
        return [spec.start.value, spec.rank_axis]
    return [] if spec.start is Start.DRAWN else [spec.start.value]


def _read(start: str = Start.DRAWN.value, rank_axis: int | None = None) -> tuple[Start, int | None]:
    return Start(start), None if rank_axis is None else int(rank_axis)
