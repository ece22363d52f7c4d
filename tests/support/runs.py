"""A run small enough for a test: two rounds of three steps on a tiny model."""

from pathlib import Path
from typing import Any

from fedloom.client.data.rows import Rows
from fedloom.core.config.run import RunConfig

__all__ = ["tiny_run", "write_rows"]


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
            "engine": {"threads": 1, "device": "cpu"},
            **sections,
        }
    )


def write_rows(folder: Path, rows: Rows) -> Path:
    """Write 30 rows to train.jsonl and the others to test.jsonl in a new folder, labels as numbers."""
    lines = [f'{{"text": "{text}", "label": {label}}}\n' for text, label in zip(rows.texts, rows.labels, strict=True)]
    folder.mkdir()
    for name, part in (("train", lines[:30]), ("test", lines[30:])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    return folder
