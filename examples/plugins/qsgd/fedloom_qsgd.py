"""One byte a value by stochastic rounding (QSGD, Alistarh et al., NeurIPS 2017, arXiv 1610.02132, with 127 levels)."""

import numpy as np

from fedloom.core.codecs.api import NO_SEED, CodecTraits
from fedloom.core.errors import CodecError
from fedloom.core.schema import Array, Schema, Tensors

__all__ = ["Qsgd"]


class Qsgd:
    """A float32 step for each tensor, then one byte a value, rounded up or down at random: unbiased.

    It only sees what is clipped and noised already, and so changes no guarantee.
    """

    name = "qsgd"
    largest = 1e38
    traits = CodecTraits(unbiased=True, linear=False, max_error=1 / 127)

    def encoded_size(self, schema: Schema) -> int:
        """Four bytes a tensor and one a value."""
        return 4 * len(schema.tensors) + schema.size

    def encode(self, schema: Schema, tensors: Tensors, seed: bytes = NO_SEED) -> bytes:
        """Steps, then levels from -127 to 127 in schema order; refuses what is not finite or too large."""
        schema.check(tensors)
        values = [np.ascontiguousarray(tensors[spec.name], np.float32).ravel() for spec in schema.tensors]
        if not all((np.abs(each) <= self.largest).all() for each in values):  # NaN is not
            raise CodecError(f"qsgd holds finite values up to {self.largest:g}; find out where others come from")
        draw = np.random.Generator(np.random.Philox(key=np.frombuffer(seed, np.uint64)))
        steps = np.array([np.abs(each).max() / np.float32(127) for each in values], "<f4")
        steps[steps < np.finfo(np.float32).tiny] = 0  # all of a tensor that small is 0
        levels = [
            np.floor(each / step + draw.random(each.size)) if step else np.zeros(each.size)
            for each, step in zip(values, steps, strict=True)
        ]
        return steps.tobytes() + b"".join(each.clip(-127, 127).astype(np.int8).tobytes() for each in levels)

    def decode(self, schema: Schema, payload: bytes) -> dict[str, Array]:
        """Level times step."""
        if len(payload) != self.encoded_size(schema):
            raise CodecError(f"payload has {len(payload)} bytes; qsgd needs {self.encoded_size(schema)}")
        count = len(schema.tensors)
        steps, levels = np.frombuffer(payload, "<f4", count), np.frombuffer(payload, np.int8, offset=4 * count)
        parts = np.split(levels, np.cumsum([spec.size for spec in schema.tensors])[:-1]) if count else []
        shapes = zip(schema.tensors, parts, steps, strict=True)
        return {spec.name: (part * step).astype(np.float32).reshape(spec.shape) for spec, part, step in shapes}
