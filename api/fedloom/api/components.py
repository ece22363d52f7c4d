"""Tasks, adapters and strategies as objects, and the tables of a run file that they are written as."""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from fedloom.core import registry
from fedloom.core.config.parsing import Section
from fedloom.core.config.run import StrategySection
from fedloom.core.errors import ConfigError
from fedloom.strategies.api import Strategy

__all__ = [
    "Bias",
    "CausalLM",
    "Head",
    "ImageClassification",
    "Instruct",
    "LoRA",
    "TextClassification",
    "TokenClassification",
    "adapter_table",
    "strategy_table",
    "task_table",
]


class TextClassification(Section):
    """One label for each text."""

    kind: ClassVar = "text-classification"
    labels: tuple[str, ...]
    """Label names, at least 2, which the labels in the data are, or the positions of."""
    max_length: int = 64
    """Tokens kept of each text; its end is cut off."""
    head: Literal["train", "frozen"] = "train"
    """Whether the classification head is trained (inside the clipped set) or stays at its start value."""


class TokenClassification(TextClassification):
    """One label for each word of a text."""

    kind: ClassVar = "token-classification"


class ImageClassification(Section):
    """One label for each picture."""

    kind: ClassVar = "image-classification"
    labels: tuple[str, ...]
    """Label names, at least 2, which the labels in the data are, or the positions of."""
    image_size: int | None = None
    """Side in pixels to which pictures are brought. None is the base model's own; many can read no other."""
    head: Literal["train", "frozen"] = "train"
    """Whether the classification head is trained (inside the clipped set) or stays at its start value."""


class CausalLM(Section):
    """The next token of each text, or of each completion alone where the rows have prompts."""

    kind: ClassVar = "causal-lm"
    head: ClassVar = "frozen"
    max_length: int = 64
    """Tokens kept of each text; its end is cut off."""


class Instruct(CausalLM):
    """The assistant's turns of a conversation, in the base model's chat template."""

    kind: ClassVar = "instruct"


class LoRA(Section):
    """Low-rank pairs beside linear layers (Hu et al., ICLR 2022, arXiv 2106.09685)."""

    kind: ClassVar = "lora"
    rank: int = 8
    """Rank r."""
    alpha: float = 16.0
    """The scale is alpha / rank."""
    targets: tuple[str, ...] | Literal["auto", "all-linear"] = ("query", "value")
    """Names (suffixes) of the linear layers that get a pair. "all-linear": every linear layer but the head and the
    output. "auto": those that PEFT has for the base model's kind, and all where it has none."""


class Bias(Section):
    """Every bias vector of the encoder (BitFit, Ben Zaken et al., ACL 2022, arXiv 2106.10199)."""

    kind: ClassVar = "bias"


class Head(Section):
    """The classification head alone."""

    kind: ClassVar = "head"


def task_table(task: Any) -> dict[str, Any]:
    """The keys of [model] that a task sets.

    Raises:
        ConfigError: It is no task.
    """
    options = _table(task, "task", "fl.TextClassification(labels=[...])")
    frozen = {"head": task.head} if hasattr(task, "head") and "head" not in options else {}
    return {"task": options.pop("kind"), **frozen, **options}


def adapter_table(adapter: Any) -> dict[str, Any]:
    """[adapter], from an adapter.

    Raises:
        ConfigError: It is none.
    """
    return _table(adapter, "adapter", "fl.LoRA(rank=8)")


def strategy_table(strategy: "str | StrategySection | Strategy") -> tuple[dict[str, Any], "Strategy | None"]:
    """[strategy], from a name, a section or an object; and the object itself if it is installed nowhere.

    Raises:
        ConfigError: It is no strategy, or an installed one whose options cannot be read off it.
    """
    if isinstance(strategy, str):
        return {"name": strategy}, None
    if isinstance(strategy, StrategySection):
        return strategy.model_dump(mode="json", exclude_unset=True, exclude_none=True), None
    kind = type(strategy)
    missing = [name for name in ("init", "plan", "fold", "commit") if not callable(getattr(strategy, name, None))]
    missing += [] if hasattr(strategy, "traits") else ["traits"]
    if missing or isinstance(strategy, type):
        given = f"the class {strategy.__name__}" if isinstance(strategy, type) else f"a {kind.__name__}"
        lacks = "" if isinstance(strategy, type) else f", which lacks {', '.join(missing)}"
        raise ConfigError(
            f"strategy is {given}{lacks}; give an object of a subclass of "
            "fedloom.strategies.api.Strategy, such as fl.FedSVD(period=2), or the name of an installed one"
        )
    home = f"{kind.__module__}:{kind.__qualname__}"
    installed = [name for name, entry in registry.entries("strategies").items() if entry.value == home]
    if not installed:
        return {"name": kind.__name__, "options": dict(_scalars(strategy))}, strategy
    if not is_dataclass(strategy):
        raise ConfigError(
            f"the options of {kind.__name__} cannot be read off the object, which is no dataclass; give "
            f'fl.Strategy(name="{installed[0]}", options={{...}})'
        )
    return {"name": installed[0], "options": dict(_scalars(strategy))}, None


def _scalars(strategy: object) -> Iterator[tuple[str, Any]]:
    """Options that differ from their defaults, but for what the run file sets by model.head."""
    for field in fields(strategy) if is_dataclass(strategy) else ():
        value = getattr(strategy, field.name)
        named = field.init and field.name != "train_head" and isinstance(value, bool | int | float | str)
        if named and (field.default is MISSING or value != field.default):
            yield field.name, value


def _table(component: Any, what: str, example: str) -> dict[str, Any]:
    """A component's kind and the options that were set.

    Raises:
        ConfigError: It is no component.
    """
    kind = getattr(component, "kind", None)
    if isinstance(component, type) or not isinstance(kind, str):
        shown = f"the class {component.__name__}" if isinstance(component, type) else repr(component)
        raise ConfigError(f"{what} is {shown}; give an object such as {example}")
    if isinstance(component, BaseModel):
        return {"kind": kind, **component.model_dump(mode="json", exclude_unset=True, exclude_none=True)}
    return {"kind": kind, **{field.name: getattr(component, field.name) for field in fields(component)}}
