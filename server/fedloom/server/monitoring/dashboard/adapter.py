"""The result as a download: a PEFT folder or merged model, or, where torch is not, the tensors as they are."""

import json
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO

from safetensors.numpy import save

from fedloom.server.coordinator import Coordinator

__all__ = ["RESULTS", "folder_zip", "state_zip"]

RESULTS = {"peft": "adapter", "merged": "merged"}
"""Folders of a run's result, by what they hold; merged where PEFT does not know the kind of the adapter."""

_IN_MEMORY_BYTES = 8 << 20
_README = """The adapter of run {name} after {done} of {rounds} rounds, as its coordinator holds it.

adapter.safetensors has the tensors under the names of the run's schema, run.json the run file. This coordinator has
no torch; `fedloom export RUN.toml --state STATE` writes a PEFT folder where it is installed.
"""


def folder_zip(folder: Path) -> IO[bytes]:
    """The plain files of a run's result, packed.

    Raises:
        OSError: One cannot be read.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.is_symlink()]
    return _packed({path.name: path for path in files})


def state_zip(coordinator: Coordinator) -> IO[bytes]:
    """What the coordinator holds after the last committed round, packed."""
    state, config = coordinator.state, coordinator.config
    readme = _README.format(name=config.run.name, done=state.round, rounds=config.run.rounds)
    about = {"rounds_done": state.round, "run": config.model_dump(mode="json", exclude_none=True)}
    return _packed(
        {
            "adapter.safetensors": save(dict(coordinator.result(state)), metadata={"format": "fedloom"}),
            "run.json": json.dumps(about, indent=2).encode(),
            "README.txt": readme.encode(),
        }
    )


def _packed(content: Mapping[str, Path | bytes]) -> IO[bytes]:
    with ExitStack() as on_failure:
        file = on_failure.enter_context(SpooledTemporaryFile(_IN_MEMORY_BYTES))
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:  # trained floats do not compress
            for name, each in content.items():
                if isinstance(each, Path):
                    packed.write(each, name)
                else:
                    packed.writestr(name, each)
        file.seek(0)
        on_failure.pop_all()  # whoever sends it closes it
    return file
