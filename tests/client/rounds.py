"""What tests of a client's round ask it to do, and randomness whose effect is known."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.core.config.run import Spec
from fedloom.core.privacy.gaussian import Integers
from fedloom.core.schema import Array, Role
from fedloom.proto.messages import Assignment

ALL = frozenset({Role.LORA_A, Role.LORA_B, Role.HEAD})


Floats = npt.NDArray[np.float64]


class Everyone:
    """Samples every example and adds no noise, to look at the sum alone."""

    def uniform(self, count: int) -> Floats:
        return np.zeros(count)

    def normal(self, deviation: int, count: int) -> Integers:
        return np.zeros(count, np.int64)


def assignment(train: frozenset[str] = ALL, **fields: Any) -> Assignment:
    values: dict[str, Any] = {
        "round": 0,
        "broadcast_roles": ALL,
        "broadcast_digest": "0" * 64,
        "broadcast_bytes": 0,
    } | fields
    return Assignment(train=train, **values)


def start(model: AdapterModel, seed: int = 5, rank: int | None = None) -> dict[str, Array]:
    """A random adapter under the model's schema."""
    rng = np.random.default_rng(seed)
    schema = model.schema if rank is None else model.schema.with_rank(rank)
    return {s.name: rng.normal(0, 0.3, s.shape).astype(np.float32) for s in schema.tensors}


def changed(spec: Spec, **sections: dict[str, Any]) -> Spec:
    tables = spec.model_dump()
    return Spec.model_validate({name: table | sections.get(name, {}) for name, table in tables.items()})
