"""The adapter a run starts from, drawn or read without any tensor library."""

import json

import numpy as np

from fedloom.core.config.run import RunConfig
from fedloom.core.config.start import beginning, check_digest, check_origin, needs_base, read_tensors, tensors_file
from fedloom.core.errors import ConfigError
from fedloom.core.schema import Array, Role, Schema, Start, TensorSpec
from fedloom.strategies.lowrank import orthonormal_rows

__all__ = ["starting_adapter", "stored_start"]

NORMAL_STD = 0.02
"""Standard deviation of Start.NORMAL: `initializer_range` of BERT (Devlin et al., 2019) and its descendants."""


def starting_adapter(schema: Schema, seed: int) -> dict[str, Array]:
    """Values before the first round: the same for the same schema and seed, whoever draws them.

    Each tensor is drawn as its `start` says, see `fedloom.core.schema.Start`.

    Args:
        schema: Schema of the whole adapter.
        seed: The run's seed, 0 to 2**63 - 1.

    Returns:
        float32 tensors, exactly the schema's.

    Source: Hu et al., ICLR 2022, arXiv 2106.09685, section 4.1 (A random, B zero).
    """
    return {spec.name: _draw(spec, seed, index) for index, spec in enumerate(schema.tensors)}


def stored_start(config: RunConfig, schema: Schema) -> dict[str, Array]:
    """The adapter that a run begins from: a fresh one, or that of a file in [start], whose values are the schema's.

    Args:
        config: A run file with its base model pinned.
        schema: Its schema.

    Raises:
        ConfigError: The file holds no adapter that fits the run, or [start] names a folder: reading that needs the base
            model.
    """
    fresh = starting_adapter(schema, config.run.seed)
    if config.start is None:
        return fresh
    path = tensors_file(config.start)
    if needs_base(config.start):
        raise ConfigError(
            f"start.adapter = {config.start.adapter!r} is a folder, whose tensors can be read where the base model and "
            "torch are: run `fedloom prepare` there and set start.adapter to the file that it writes"
        )
    check_digest(path, config.start.digest)
    found, about = read_tensors(path)
    if "schema" not in about:
        raise ConfigError(f"start.adapter: {path} was not written by fedloom; give the adapter's folder instead")
    theirs = Schema.from_json(about["schema"])
    if schema.pairs and theirs.scale != schema.scale:
        raise ConfigError(
            f"start.adapter has scale {theirs.scale:g}, and the run's is {schema.scale:g}; "
            f"set adapter.alpha = {config.adapter.alpha * theirs.scale / schema.scale:g}"
        )
    check_origin(json.loads(about.get("fedloom", "{}")), config.model.digest, config.model.labels)
    return beginning(found, schema, fresh, config.wire.broadcast)


def _draw(spec: TensorSpec, seed: int, index: int) -> Array:
    # The counter's top word keeps these streams apart from those that strategies draw with key [seed, round].
    generator = np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, 1]))
    match _how(spec):
        case Start.KAIMING:
            bound = 1.0 / np.sqrt(spec.shape[-1])
            return generator.uniform(-bound, bound, spec.shape).astype(np.float32)
        case Start.ORTHOGONAL:
            drawn = generator.normal(size=spec.shape)
            basis = orthonormal_rows(drawn if len(drawn) <= drawn.shape[1] else drawn.T)
            return (basis if basis.shape == spec.shape else basis.T).astype(np.float32)
        case Start.NORMAL:
            return generator.normal(0.0, NORMAL_STD, spec.shape).astype(np.float32)
    return np.zeros(spec.shape, np.float32)


def _how(spec: TensorSpec) -> Start:
    if spec.start is not Start.DRAWN:
        return spec.start
    if spec.role == Role.LORA_A:
        return Start.KAIMING
    return Start.NORMAL if spec.role == Role.HEAD and len(spec.shape) > 1 else Start.ZERO
