"""The adapter a run starts from, drawn without any tensor library."""

import numpy as np

from fedloom.proto.schema import Array, Role, Schema, Start, TensorSpec

__all__ = ["starting_adapter"]

HEAD_STD = 0.02
"""Standard deviation of a fresh head: `initializer_range` of BERT (Devlin et al., 2019) and its descendants."""


def starting_adapter(schema: Schema, seed: int) -> dict[str, Array]:
    """Values before the first round: the same for the same schema and seed, whoever draws them.

    - lora_A, shape (r, in): uniform in +-1/sqrt(in), which is Kaiming-uniform with a = sqrt(5) as in PEFT.
    - lora_B, bias and the correction factors: zero, so that the model starts as the base model.
    - head: normal with standard deviation 0.02, and zero for vectors (the biases of the head) and for a head that the
      checkpoint has, whose change it is.

    Args:
        schema: Schema of the whole adapter.
        seed: The run's seed, 0 to 2**63 - 1.

    Returns:
        float32 tensors, exactly the schema's.

    Source: Hu et al., ICLR 2022, arXiv 2106.09685, section 4.1 (A random, B zero).
    """
    return {spec.name: _draw(spec, seed, index) for index, spec in enumerate(schema.tensors)}


def _draw(spec: TensorSpec, seed: int, index: int) -> Array:
    # The counter's top word keeps these streams apart from those that strategies draw with key [seed, round].
    generator = np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, 1]))
    if spec.role is Role.LORA_A:
        bound = 1.0 / np.sqrt(spec.shape[1])
        return generator.uniform(-bound, bound, spec.shape).astype(np.float32)
    if spec.role is Role.HEAD and len(spec.shape) > 1 and spec.start is Start.DRAWN:
        return generator.normal(0.0, HEAD_STD, spec.shape).astype(np.float32)
    return np.zeros(spec.shape, np.float32)
