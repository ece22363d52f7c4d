"""A run small enough for a test: two rounds of three steps on a tiny model."""

from pathlib import Path
from typing import Any

from fedloom.core.config.run import RunConfig

__all__ = ["tiny_run"]


def tiny_run(base: Path, **sections: dict[str, Any]) -> RunConfig:
    """The run; a section that is given stands in place of this one's.

    Args:
        base: Folder of the base model.
        sections: Tables of the run file, by their names.
    """
    return RunConfig.model_validate(
        {
            "run": {"name": "tiny", "rounds": 2, "seed": 5},
            "model": {"base": str(base), "labels": ["negative", "positive"], "max_length": 16},
            "adapter": {"rank": 4, "alpha": 8},
            "train": {"steps": 3, "sampling_rate": 0.5, "learning_rate": 0.3},
            "privacy": {"enabled": False},
            "engine": {"threads": 1},
            **sections,
        }
    )
