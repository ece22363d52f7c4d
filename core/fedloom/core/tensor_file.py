"""Tensors of an adapter as one safetensors file, with the schema that names them."""

import json
from typing import Any

from safetensors.numpy import save

from fedloom.core.schema import Schema, Tensors

__all__ = ["TENSORS", "tensor_file"]

TENSORS = "adapter.safetensors"
"""What such a file is called in a folder of other files."""


def tensor_file(tensors: Tensors, schema: Schema, known: dict[str, Any]) -> bytes:
    """The content of the file. Its metadata has the schema as `schema`, and `known` as JSON as `fedloom`.

    Args:
        tensors: Exactly the schema's.
        schema: Their names, shapes and roles.
        known: What its user should know, such as the base model's digest.
    """
    return bytes(save(dict(tensors), {"schema": schema.to_json(), "fedloom": json.dumps(known)}))
