"""The JSON Schema of a run file, with every component that is installed here: for editors, and for checks elsewhere."""

from typing import Any

from fedloom.core.codecs.auto import AUTO
from fedloom.core.config.run import RunConfig
from fedloom.core.registry import entries, options_model

__all__ = ["run_file_schema"]

_NAMED = (
    ("model", "task", "tasks"),
    ("adapter", "kind", "adapters"),
    ("train", "optimizer", "optimizers"),
    ("data", "partition", "partitioners"),
    ("strategy", "name", "strategies"),
    ("wire", "upload", "codecs"),
    ("wire", "broadcast", "codecs"),
)
"""Tables of the run file, the key of each that names a component, and its group."""

_APART = {"strategies": "options"}
"""Groups whose options lie in a table of their own; those of the others are keys beside the name."""

_NO_OPTIONS = {"codecs"}
_OTHERS = {"codecs": [AUTO]}
"""What may stand in place of a name."""


def run_file_schema() -> dict[str, Any]:
    """The schema (draft 2020-12). Each name is one that is installed, and decides which options its table may have.

    Raises:
        ConfigError: An installed component cannot be imported.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    for table, key, group in _NAMED:
        place = schema["properties"][table]
        choices = [place, *place.get("anyOf", ())]  # [data] may be left out
        (reference,) = (each["$ref"] for each in choices if "$ref" in each)
        _name_components(schema, schema["$defs"][reference.removeprefix("#/$defs/")], key, group)
    return schema


def _name_components(schema: dict[str, Any], section: dict[str, Any], key: str, group: str) -> None:
    """Let `key` be an installed name of the group, and its options be known in this table and no others."""
    named = section["properties"][key]
    named["enum"] = [*entries(group), *_OTHERS.get(group, ())]
    if group in _NO_OPTIONS:
        return
    for name in entries(group):
        prefix = f"{group}.{name}."
        options = options_model(group, name).model_json_schema(ref_template=f"#/$defs/{prefix}{{model}}")
        schema["$defs"] |= {prefix + model: each for model, each in options.pop("$defs", {}).items()}
        allowed = {"properties": options.get("properties", {})}
        if group in _APART:
            allowed = {"properties": {_APART[group]: {**allowed, "additionalProperties": False}}}
        asked: dict[str, Any] = {"properties": {key: {"const": name}}}
        if named.get("default") != name:
            asked["required"] = [key]
        section.setdefault("allOf", []).append({"if": asked, "then": allowed})
    if group not in _APART:
        section.pop("additionalProperties", None)
        section["unevaluatedProperties"] = False
