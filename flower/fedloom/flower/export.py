"""A run file as a Flower app: a folder that `flwr run` takes, and that holds no code."""

import json
import re
from pathlib import Path
from typing import Any

import tomli_w

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.server.prepared_schema import prepared_path

__all__ = ["export_app"]

_LONGEST_NAME = 32
_README = """# {name}: a Flower app made by fedloom

`run.toml` is the run and `run.schema.json` its adapter; the code is the installed `fedloom.flower`, on the SuperLink's
machine and on every SuperNode's. There is none in this folder.

```sh
flower-superlink --insecure --disable-runtime-dependency-installation
fedloom flower node --policy client.toml                                              # at each site
flower-supernode --insecure --superlink HOST:8000 --node-config 'policy="/path/client.toml"'
flwr run . NAME-OF-YOUR-SUPERLINK --stream
fedloom export run.toml --state runs/{name}/state --out adapter
```

`--insecure` is for one machine. docs/flower.md of fedloom says what else there is to know.
"""


def export_app(folder: Path, config: RunConfig, document: dict[str, Any]) -> None:
    """Write the app.

    Args:
        folder: Where to; made if it is missing.
        config: The run, with its noise and the base model's digest filled in, so that every launch is the same run.
        document: What `fedloom prepare` makes of it.

    Raises:
        ConfigError: The folder holds something else already, or the run has no app's name.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; give a new folder for the app")
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run.toml"
    run.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    prepared_path(run).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / "pyproject.toml").write_text(tomli_w.dumps(_project(config.run.name)), encoding="utf-8")
    (folder / "README.md").write_text(_README.format(name=config.run.name), encoding="utf-8")


def _project(name: str) -> dict[str, Any]:
    """What Flower reads of an app."""
    return {
        "project": {
            "name": _app_name(name),
            "version": "1.0.0",
            "description": f"The fedloom run {name}",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedloom",
                    "fab-include": ["run.toml", "run.schema.json", "README.md"],
                    "components": {
                        "serverapp": "fedloom.flower.server_app:app",
                        "clientapp": "fedloom.flower.client_app:app",
                    },
                    # Where the SuperLink keeps runs, and for a local simulation the folder of its made-up clients.
                    "config": {"out": "runs", "clients": ""},
                }
            }
        },
    }


def _app_name(name: str) -> str:
    """The run's name as Flower allows one: a letter, then letters, digits and hyphens, 32 in all.

    >>> _app_name("2026_tiny.run")
    'run-2026-tiny-run'
    """
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    return (plain if plain[:1].isalpha() else f"run-{plain}")[:_LONGEST_NAME].rstrip("-")
