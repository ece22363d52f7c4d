"""What an adapter is made of: names, shapes and roles, agreed once per run.

Both sides derive every smaller schema (the part that is trained, a lower rank) from the agreed one, so
no shape, dtype or tensor name ever has to be believed from the wire.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import SchemaError
from fedloom.core.limits import MAX_NAME_LENGTH, MAX_PAYLOAD_BYTES, MAX_SCHEMA_BYTES, MAX_TENSORS

__all__ = ["LORA", "Array", "Pair", "Role", "Schema", "Start", "TensorSpec", "Tensors"]

Array = npt.NDArray[np.floating]
Tensors = Mapping[str, Array]


class Role(StrEnum):
    """What a tensor does in the model; strategies choose what to train and average by role."""

    LORA_A = "lora_A"
    """Down projection, shape (r, in)."""
    LORA_B = "lora_B"
    """Up projection, shape (out, r); zero at the start."""
    BIAS = "bias"
    """Change of a bias vector of the base model, shape (out,); zero at the start."""
    HEAD = "head"
    """Task head. One that the checkpoint lacks is drawn at the start; one that it has travels as its change."""
    BASE_A = "base_A"
    """Right factor of a correction to the frozen weight, W = W0 + scale * base_B @ base_A (FedEx, FLoRA)."""
    BASE_B = "base_B"
    """Left factor of that correction, shape (out, k)."""


class Start(StrEnum):
    """What a tensor is before the first round."""

    DRAWN = "drawn"
    """As its role says: see `strategies.start`."""
    ZERO = "zero"
    """Zero, because it travels as a change of what the base model's checkpoint has."""


LORA = frozenset({Role.LORA_A, Role.LORA_B})
"""Both factors of a low-rank pair."""

_LEAST_SCALE, _MOST_SCALE = 1e-7, 1e4
"""What [adapter] alpha over rank can be, from 1e-4 / 512 to 1e4 / 1."""

_RANKED_AXIS = {Role.LORA_A: 0, Role.BASE_A: 0, Role.LORA_B: 1, Role.BASE_B: 1}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its full name, the module it belongs to, its shape and its role. Values are float32."""

    name: str
    module: str
    role: Role
    shape: tuple[int, ...]
    start: Start = Start.DRAWN

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
            if not 0 < len(spec.name) <= MAX_NAME_LENGTH or len(spec.module) > MAX_NAME_LENGTH:
                raise SchemaError(f"tensor name {spec.name[:64]!r}: 1 to {MAX_NAME_LENGTH} characters allowed")
            if not 1 <= len(spec.shape) <= 4 or min(spec.shape) < 1:
                raise SchemaError(f"tensor {spec.name!r} has shape {spec.shape}; 1 to 4 positive sizes allowed")
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
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def roles(self) -> frozenset[Role]:
        """Roles that occur."""
        return frozenset(spec.role for spec in self.tensors)

    def roles_of(self, names: Iterable[str]) -> frozenset[Role]:
        """Roles of the tensors of these names; others are left out."""
        wanted = frozenset(names)
        return frozenset(spec.role for spec in self.tensors if spec.name in wanted)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The low-rank pairs of roles lora_A and lora_B, in wire order of their A."""
        b_names = {spec.module: spec.name for spec in self.tensors if spec.role is Role.LORA_B}
        a_specs = [spec for spec in self.tensors if spec.role is Role.LORA_A]
        return tuple(Pair(s.module, s.name, b_names[s.module]) for s in a_specs if s.module in b_names)

    @property
    def rank(self) -> int:
        """Largest rank of any pair; 0 when there is none."""
        return max((spec.shape[0] for spec in self.tensors if spec.role is Role.LORA_A), default=0)

    def select(self, roles: Iterable[Role]) -> "Schema":
        """The tensors with one of `roles`, in the same order."""
        wanted = frozenset(roles)
        return replace(self, tensors=tuple(spec for spec in self.tensors if spec.role in wanted))

    def with_rank(self, rank: int) -> "Schema":
        """The same tensors with every low-rank factor cut to at most `rank`.

        Raises:
            SchemaError: `rank` is below 1.
        """
        if rank < 1:
            raise SchemaError(f"rank {rank} must be at least 1")

        def cut(spec: TensorSpec) -> TensorSpec:
            axis = _RANKED_AXIS.get(spec.role)
            if axis is None:
                return spec
            shape = list(spec.shape)
            shape[axis] = min(shape[axis], rank)
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
        # What starts as its role says has no word for it, so that the digest of an older schema stays what it was.
        words = {Start.DRAWN: [], Start.ZERO: [Start.ZERO.value]}
        rows = [[s.name, s.module, s.role.value, list(s.shape), *words[s.start]] for s in self.tensors]
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
                TensorSpec(str(name), str(module), Role(role), tuple(int(n) for n in shape), *map(Start, start))
                for name, module, role, shape, *start in document["tensors"]
            )
            schema = cls(specs, float(document["scale"]))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise SchemaError(f"not a schema document: {error}") from error
        # The conversions above are lenient; one schema must have one spelling, or equal digests mean nothing.
        if schema.to_json() != text:
            raise SchemaError("schema document is not in canonical form; send what to_json writes")
        return schema
