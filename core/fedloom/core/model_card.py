"""The README.md of an export: a model card whose front matter model hubs understand.

It is a function of what fedloom.json holds and of the run file, so equal results have equal cards wherever they are
written. It names no path of a machine, and nothing of anybody's rows.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from string import Template
from typing import Any

__all__ = ["Form", "Purpose", "held_out_facts", "hub_name", "model_card"]

_TEMPLATE = Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_THOUSANDTHS = 1000
_WITHOUT = "Trained without differential privacy: what the clients sent was not noised, and nothing is promised of it."


@dataclass(frozen=True)
class Form:
    """A form of export, as its card tells it."""

    library: str
    """The hub's library_name."""
    tags: tuple[str, ...]
    """Beside those that every card has."""
    what: str
    """One sentence on what the folder holds."""
    loading: str
    """How it is loaded, as code; BASE stands for the base model and THIS FOLDER for where the files are."""
    language: str = "python"
    """Of the code."""
    notes: str = ""
    """What else its user should know, in Markdown."""


@dataclass(frozen=True)
class Purpose:
    """What a model was trained for."""

    task: str
    """Name of the task."""
    columns: str
    """The columns of a row, in words."""
    pipeline: str | None
    """The hub's pipeline_tag; None where it has none for the task."""
    reads: str
    """What becomes of a row before the model reads it, as a sentence without its full stop."""


def held_out_facts(
    accuracy: float | None, loss: float | None, metrics: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What fedloom.json says of scores on held-out rows, which only who has the rows knows.

    Args:
        accuracy: Share of right answers, 0 to 1; None if nothing was scored.
        loss: Its mean, in nats.
        metrics: What the task has beside these, by name.
    """
    more = {"held_out_metrics": dict(metrics)} if metrics else {}
    return {"held_out_accuracy": accuracy, "held_out_loss": loss, **more}


def hub_name(base: object) -> str | None:
    """The base model as ORG/NAME of a hub; None if it is named otherwise, such as by a folder."""
    return base if isinstance(base, str) and _HUB_ID.fullmatch(base) else None


def model_card(facts: Mapping[str, Any], form: Form, purpose: Purpose | None = None) -> str:
    """The text of README.md.

    Args:
        facts: What fedloom.json holds. Of a key that it lacks nothing is said, and without `privacy` no guarantee is.
        form: What the folder holds.
        purpose: What the model was trained for; None if that is not known.
    """
    private = (
        ("differential-privacy",) if any(map(_statement, (facts.get("privacy"), facts.get("user_privacy")))) else ()
    )
    front: dict[str, Any] = {"base_model": hub_name(facts.get("base")), "library_name": form.library}
    front |= {"pipeline_tag": purpose.pipeline if purpose else None}
    front |= {"tags": ["fedloom", "federated-learning", *form.tags, *private]}
    # Values in JSON are YAML too, whatever characters a name has.
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value is not None]
    return _TEMPLATE.substitute(
        front="\n".join(lines),
        name=facts.get("run", "model"),
        what=form.what,
        language=form.language,
        loading=form.loading.replace('"BASE"', json.dumps(hub_name(facts.get("base")) or "BASE")),
        notes=f"{form.notes}\n" if form.notes else "",
        purpose="\n".join(_purpose(facts, purpose)),
        privacy="\n\n".join(_privacy(facts)),
    )


def _purpose(facts: Mapping[str, Any], purpose: Purpose | None) -> Sequence[str]:
    said = []
    if purpose is not None:
        said = [f"- Task: {purpose.task}", f"- Columns of a row: {purpose.columns}", f"- {purpose.reads}"]
    if labels := facts.get("labels"):
        said.append(f"- Labels, in the order of the model's outputs: {', '.join(map(_code, labels))}")
    if (base := facts.get("base")) is not None:
        digest = f", {facts['base_digest']}" if facts.get("base_digest") else ""
        said.append(f"- Base model: {_code(hub_name(base) or PurePath(str(base)).name)}{digest}")
    if (rounds := facts.get("rounds")) is not None:
        said.append(f"- Rounds: {rounds}")
    for name, value in _held_out(facts):
        said.append(f"- {name} on the coordinator's held-out rows: {value:.4f}")
    return [*said, "", "`fedloom.json` has the same for programs."]


def _held_out(facts: Mapping[str, Any]) -> Sequence[tuple[str, float]]:
    """What was measured, and is a number."""
    more = facts.get("held_out_metrics") or {}
    found = {"Accuracy": facts.get("held_out_accuracy"), "Loss": facts.get("held_out_loss"), **more}
    return [(name, float(value)) for name, value in found.items() if isinstance(value, int | float)]


def _privacy(facts: Mapping[str, Any]) -> Sequence[str]:
    """Paragraphs on what is promised of the clients' rows, and of whole clients."""
    stated, user = _statement(facts.get("privacy")), _statement(facts.get("user_privacy"))
    said = []
    if stated:
        said.append(
            f"Trained with differential privacy. Protected is {stated['unit']} of one client's data "
            f"({stated['adjacency']}), over {stated.get('covers', 'this run')}, at {_figures(stated)}. "
            "It holds for each client by itself, and nobody else need be trusted for it."
        )
        if "mechanism" in stated:
            clipping = f" at norm {stated['clip_norm']:g} ({stated['clipping']})" if "clip_norm" in stated else ""
            said.append(f"Mechanism: {stated['mechanism']}{clipping}.")
        sampling = f" Sampling: {stated['sampling']}." if "sampling" in stated else ""
        said.append(f"Accountant: {stated['accountant']}.{sampling}")
    elif "merged" in facts:
        said.append("No guarantee of differential privacy holds for all that it was merged from.")
    else:
        said.append(_WITHOUT)
    if user:
        said.append(
            f"Protected as well is {user['unit']} ({user['adjacency']}), at {_figures(user)}: {user.get('mechanism')}. "
            f"Accountant: {user['accountant']}. The two promises are not added up."
        )
    return said


def _statement(found: object) -> Mapping[str, Any]:
    """A statement of privacy that says all it must; empty if it does not: anybody may have written it."""
    terms = ("unit", "adjacency", "accountant")
    if not isinstance(found, Mapping) or not all(isinstance(found.get(each), str) for each in terms):
        return {}
    return found if all(isinstance(found.get(each), int | float) for each in ("epsilon", "delta")) else {}


def _figures(stated: Mapping[str, Any]) -> str:
    """Epsilon, rounded up so that no more is promised than holds, and delta."""
    return f"epsilon {math.ceil(stated['epsilon'] * _THOUSANDTHS) / _THOUSANDTHS:g} and delta {stated['delta']:g}"


def _code(text: object) -> str:
    """A name as code in Markdown, on one line."""
    shown = " ".join(str(text).replace("`", "'").split())
    return f"`{shown}`"
