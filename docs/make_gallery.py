"""Write the table of docs/gallery.md from examples/recipes.json; `--check` exits 1 when it is stale.

`python -m docs.make_gallery runs/triage` puts the figures of a run folder into examples/recipes.json first. Figures of
settings that the run file in examples/ has no more are stale, too.
"""

import hashlib
import json
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from docs.made import between_marks, write

TARGET = Path(__file__).with_name("gallery.md")
EXAMPLES = TARGET.parent.parent / "examples"
SOURCE = EXAMPLES / "recipes.json"

JOBS = {
    "triage": "How soon an emergency patient has to be seen",
    "findings": "What a clinical note says of each finding",
    "complaints": "Products and issues of bank complaints",
    "preferences": "The tone of a front desk, from pairs of answers",
    "instruct": "A nurse's note as a line that a program reads",
    "dictation": "Spoken orders on wards, written as the house does",
    "keywords": "Words that steer a machine, by voices that are new",
    "defects": "Scratches, holes and stains on metal",
}
"""Recipes of the gallery in its order, and what each does."""
_SCORES = {
    "ordinal": ("kappa", 1, "weighted kappa of grades"),
    "multi-label": ("f1_micro", 100, "% F1 of tags"),
    "token-classification": ("accuracy", 100, "% of words"),
    "image-classification": ("accuracy", 100, "% of pictures"),
    "audio-classification": ("accuracy", 100, "% of recordings"),
    "dpo": ("accuracy", 100, "% of pairs"),
    "instruct": ("exact_match", 100, "% of answers right to the letter"),
    "speech-recognition": ("wer", 100, "% of words wrong, so less is better"),
}
"""By task: the figure that is shown, what it is multiplied by, and its unit."""
_HEAD = ("job", "`fedloom simulate`", "task", "base", "data, silos", "ε, δ", "majority", "start", "end", "of what")
_COST = ("MB up, a client", "MB down", "CPU minutes", "peak memory")
_NONE = "–"
"""In the place of a figure that there is not."""


def main() -> None:
    """Write the page, or with `--check` only compare it."""
    folders = [Path(each) for each in sys.argv[1:] if each != "--check"]
    known = json.loads(SOURCE.read_text(encoding="utf-8")) if SOURCE.is_file() else {}
    if folders:
        known |= dict(map(recipe, folders))
        ordered = {name: known[name] for name in JOBS if name in known}
        SOURCE.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, figures in known.items():
        if figures["settings"] != settings(_tables(name)):
            sys.exit(
                f"examples/{name}.toml is not what its figures were measured with; run it and then "
                f"`python -m docs.make_gallery runs/{name}`"
            )
    if missing := JOBS.keys() - known.keys():
        sys.exit(f"recipes.json has no figures of {', '.join(sorted(missing))}; run them, then give their run folders")
    table = "\n".join(["", *_table(known), "", ""])
    write("make_gallery", {TARGET: between_marks(TARGET, "make_gallery", table)}, check="--check" in sys.argv)


def recipe(folder: Path) -> tuple[str, dict[str, Any]]:
    """The name of a run and what it came to, read from its run folder.

    Raises:
        SystemExit: It is a run of other settings than those of the run file in examples/.
    """
    ran = tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))
    name = ran["run"]["name"]
    tables = _tables(name)
    changed = [f"{s}.{k}" for s, keys in tables.items() for k, v in keys.items() if ran.get(s, {}).get(k) != v]
    if changed:
        sys.exit(f"{folder} ran with another {', '.join(changed)} than examples/{name}.toml; run that file as it is")
    held = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    examples = [each["examples"] for each in held["classes"]]
    return name, {
        "settings": settings(tables),
        "start": {"accuracy": held["accuracy_start"], "loss": held["loss_start"], **held["metrics_start"]},
        "end": {"accuracy": held["accuracy"], "loss": held["loss"], **held["metrics"]},
        "majority": max(examples) / sum(examples) if examples else None,
        "held_out": held["held_out_examples"],
        "epsilon": max(held["epsilon"].values()),
        "bytes_up": held["bytes_up"],
        "bytes_down": held["bytes_down"],
        "seconds": held["seconds"],
        "cpu_seconds": held["cpu_seconds"],
        "peak_bytes": held["peak_bytes"],
    }


def settings(tables: Mapping[str, Any]) -> str:
    """A digest of what a run file says, whatever its comments say."""
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:16]


def _tables(name: str) -> dict[str, Any]:
    return tomllib.loads((EXAMPLES / f"{name}.toml").read_text(encoding="utf-8"))


def _table(known: Mapping[str, Any]) -> Iterable[str]:
    head = (*_HEAD, *_COST)
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for name, job in JOBS.items():
        run, figures = _tables(name), known[name]
        task, clients = run["model"].get("task", "text-classification"), run["data"]["clients"]
        key, scale, unit = _SCORES[task]
        # Before training DPO compares the base model with itself: rounding decides between the two answers.
        start = None if task == "dpo" else figures["start"].get(key)
        majority = figures["majority"] if key == "accuracy" else None
        cells = (
            job,
            f"[examples/{name}.toml](../examples/{name}.toml)",
            f"`{task}`",
            f"`{run['model']['base']}`",
            f"`{run['data']['source']}`, {clients}",
            f"{figures['epsilon']:.2f}, {run['privacy']['delta']:g}",
            *(_shown(each, scale) for each in (majority, start)),
            f"**{_shown(figures['end'][key], scale)}**",
            f"{unit}, {figures['held_out']:,} held-out rows",
            *(f"{figures[way] / clients / 1e6:.2f}" for way in ("bytes_up", "bytes_down")),
            f"{figures['cpu_seconds'] / 60:.1f}",
            f"{figures['peak_bytes'] / 2**20:,.0f} MiB",
        )
        yield f"| {' | '.join(cells)} |"


def _shown(value: float | None, scale: int) -> str:
    return _NONE if value is None else f"{scale * value:.1f}" if scale > 1 else f"{value:.2f}"


if __name__ == "__main__":
    main()
