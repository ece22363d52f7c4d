"""RUN.schema.json: what `fedloom prepare` writes where the base model lies, so that serving a run needs no torch."""

import json
from pathlib import Path
from typing import Any

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.core.schema import Schema

__all__ = ["prepared_path", "with_prepared"]


def prepared_path(run: Path) -> Path:
    """Where the prepared schema of a run file lies."""
    return run.with_suffix(".schema.json")


def with_prepared(config: RunConfig, document: dict[str, Any], run: Path) -> tuple[RunConfig, Schema]:
    """The run file with the base model pinned, and the schema.

    Args:
        config: The run file.
        document: What `fedloom prepare` makes of it.
        run: Path of the run file, for errors.

    Raises:
        ConfigError: The document was made for another model or adapter, or something is missing.
        SchemaError: Its schema is not one.
    """
    path = prepared_path(run)
    if missing := [key for key in ("model", "adapter", "digest", "schema") if key not in document]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}; run `fedloom prepare {run}` again")
    for key, value in (("model", config.model), ("adapter", config.adapter)):
        asked = value.model_dump(mode="json", exclude={"digest"})
        if document.get(key) != asked:
            raise ConfigError(f"{path} was made for another [{key}] section; run `fedloom prepare {run}` again")
    if config.model.digest not in (None, document["digest"]):
        raise ConfigError(f"{path} has base model {document['digest']}; the run file pins {config.model.digest}")
    model = config.model.model_copy(update={"digest": document["digest"]})
    schema = Schema.from_json(json.dumps(document["schema"], separators=(",", ":")))
    return config.model_copy(update={"model": model}), schema
