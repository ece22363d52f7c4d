"""`fedloom init`: a run file, and a site's policy, to begin with."""

import json
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel

from fedloom.cli.console import out
from fedloom.core.config.parsing import parse
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, DataError

__all__ = ["init"]

T = TypeVar("T")

_TARGETS = {
    "distilbert": ("q_lin", "v_lin"),
    "gpt2": ("c_attn",),
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
}
"""What the layers that map queries and values are called, by a base model's own name of its architecture."""
_USUAL_TARGETS = ("query", "value")

_CLIENTS = 4

_PRIVATE = {"steps": 4, "optimizer": "sgd", "ema": 0.5, "learning_rate": 2.0, "head_learning_rate": 4.0}
"""Few large batches, and the mean of their steps: the best of the optimisers in docs/optimizers.md."""
_OPEN = {"steps": 20, "optimizer": "adam", "learning_rate": 0.002, "head_learning_rate": 0.002}
"""Many small batches, as its run without privacy."""
_BATCHES = {True: (100, 0.02), False: (20, 0.004)}
"""Examples in a step, and the least sampling rate, of private runs and others."""
_MOST_RATE = 0.5


def init(
    file: Annotated[Path | None, typer.Argument(help="The run file to write; NAME.toml if not given.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Label names with commas between them; none trains a language model.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model: a local folder, a name of `fedloom assets`, or ORG/NAME in the hub cache."),
    ] = None,
    epsilon: Annotated[
        str | None, typer.Option(help="Epsilon of each example over the whole run; none trains without privacy.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data of a simulation: a folder with train.csv and test.csv, or an asset.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="Write a site's policy file there too.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; take the default of what is not given.")] = False,
) -> None:
    """Ask four questions and write a commented run file that runs as it is.

    Each question has an option, which answers it beforehand. Files that exist are left alone.

    Example: fedloom init --name first --labels negative,positive --base minilm-l3-mean --epsilon 6 --yes
    """
    ask = _ask if not yes else _default
    chosen = ask(name, "Name of the run", "first", _named)
    words = ask(labels, "Labels, with commas between them (none: a language model)", "negative,positive", _labels)
    model = ask(base, "Base model, a local folder or a name of `fedloom assets`", "minilm-l3-mean", _base)
    limit = ask(epsilon, "Private with which epsilon (none: without privacy)", "6", _epsilon)
    source = data or ("sentiment" if words == ("negative", "positive") else "data")
    path = file or Path(f"{chosen}.toml")
    rate = _rate(source, words, limit is not None)
    texts = {path: _run_file(path, chosen, words, model, limit, source, rate)}
    if policy is not None:
        texts[policy] = _policy_file(policy, path, words, limit, rate)
    for target in texts:
        if target.exists():
            raise ConfigError(f"{target} exists and is left as it is; give another name, or move it away")
    for target, text in texts.items():
        try:
            with target.open("x", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            raise ConfigError(f"cannot write {target}: {error}; give a folder that exists and is yours") from error
        out.print(f"wrote {target}")
    for line in _next(path, source, policy):
        out.print(line)


def _next(path: Path, source: str, policy: Path | None) -> Iterator[str]:
    """What to do with the files: nothing is named as if it were there that is not."""
    from fedloom.client.assets.fetch import ASSETS

    if Path(source).exists() or source in ASSETS:
        yield f"next: fedloom simulate {path}"
    else:
        yield f"next: make the folder {source} with train.csv and test.csv in it, or give another to --data; then"
        yield f"      fedloom simulate {path}"
    if policy is not None:
        yield f"{policy} is for a site: correct data.source and data.declared_examples in it"


def _ask(given: str | None, question: str, default: str, read: Callable[[str], T]) -> T:
    """The answer to a question, asked until it can be read; an option answers it beforehand."""
    if given is not None:
        return read(given)

    def again(text: str) -> T:
        try:
            return read(text)
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from error

    answer: T = typer.prompt(question, default=default, value_proc=again)
    return answer


def _default(given: str | None, question: str, default: str, read: Callable[[str], T]) -> T:
    return read(default if given is None else given)


def _named(text: str) -> str:
    parse(RunConfig, {"run": {"name": text, "rounds": 1}, **_LEAST}, source="name of the run")
    return text


_LEAST = {
    "model": {"base": "minilm-l3-mean", "labels": ["a", "b"]},
    "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 1.0},
}
"""The rest of a run file, while only its name is in question."""


def _labels(text: str) -> tuple[str, ...]:
    """Label names; empty for a language model."""
    if text.strip() == "none":
        return ()
    names = tuple(name.strip() for name in text.split(","))
    if len(names) < 2 or not all(names) or len(set(names)) < len(names):
        raise ConfigError(
            f"labels {text!r}: at least two different names with commas between them, such as yes,no, or none"
        )
    return names


def _base(text: str) -> str:
    if not text.strip():
        raise ConfigError("no base model is given; name a local folder, or an asset that `fedloom assets` lists")
    return text.strip()


def _epsilon(text: str) -> float | None:
    if text.strip() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"epsilon {text!r}: a number above 0, such as 6, or none to train without privacy")
    return value


def _targets(base: str) -> tuple[str, ...]:
    """The layers that get a pair, by the architecture a local model's config.json names."""
    try:
        kind = json.loads((Path(base).expanduser() / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return _USUAL_TARGETS  # an asset, or a folder that is still to come
    return _TARGETS.get(str(kind), _USUAL_TARGETS)


def _task(labels: tuple[str, ...]) -> str:
    return "text-classification" if labels else "causal-lm"


def _rate(source: str, labels: tuple[str, ...], private: bool) -> float:
    """The sampling rate with which a client's step has enough examples for what it learns to stand out of the noise."""
    batch, least = _BATCHES[private]
    if not Path(source).exists():
        return least
    try:
        from fedloom.client.data.layout import Layout
        from fedloom.client.data.load import records

        rows = sum(1 for _ in records(source, "train", Layout(_task(labels), {})))
    except (ModuleNotFoundError, DataError) as error:
        out.print(f"{source} cannot be counted, so train.sampling_rate is a guess: {error}")
        return least
    each = max(1, rows // _CLIENTS)
    rate = float(f"{min(_MOST_RATE, max(least, batch / each)):.1g}")
    out.print(
        f"{rows:,} rows to train on, {each:,} for each of {_CLIENTS} clients: train.sampling_rate = {rate:g} puts "
        f"about {round(rate * each):,} of them into a step"
    )
    return rate


def _run_file(
    path: Path, name: str, labels: tuple[str, ...], base: str, epsilon: float | None, source: str, rate: float
) -> str:
    """A whole run file, which `load_run` takes."""
    task = _task(labels)
    train = {**(_OPEN if epsilon is None else _PRIVATE), "sampling_rate": rate, "schedule": "linear"}
    if not labels:
        del train["head_learning_rate"]
    head = {"labels": list(labels), "head": "train"} if labels else {"head": "frozen"}
    grouped = "group" if source == "sentiment" else "iid"
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": name, "rounds": 10, "seed": 0},
        "model": {"base": base, "task": task, **head, "max_length": 64},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16.0, "targets": list(_targets(base))},
        "train": train,
        "privacy": {"enabled": False} if epsilon is None else {"epsilon": epsilon, "delta": 1e-5, "clip_norm": 1.0},
        "strategy": {"name": "fedavg", "weighting": "uniform"}
        if epsilon is None
        else {"name": "fedsvd", "weighting": "examples"},
        "rounds": {"min_clients": 2} | ({} if epsilon is None else {"spare_rounds": 1}),
        "data": {"source": source, "clients": _CLIENTS, "partition": grouped},
        "evaluation": {"every": 2},
    }
    preface = (
        f"# Run {name}: what a coordinator asks of every client, and what a simulation on one machine runs.\n"
        f"#   fedloom simulate {path}\n"
        f"#   fedloom simulate {path} --set run.rounds=3      # any key, for once\n"
        f"# Sections and keys that are left out have the defaults of docs/reference.md.\n"
    )
    return preface + _checked(RunConfig, tables, path)


def _policy_file(path: Path, run: Path, labels: tuple[str, ...], epsilon: float | None, rate: float) -> str:
    """A whole policy file, which `load_policy` takes and which allows the run."""
    from fedloom.client.policy import Policy

    privacy: dict[str, Any] = {"epsilon": epsilon or 6.0, "delta": 1e-5, "min_noise_multiplier": 0.3}
    named = {"labels": list(labels)} if labels else {}
    privacy |= {"max_sampling_rate": max(0.1, rate), "allow_non_private": epsilon is None}
    tables: dict[str, dict[str, Any]] = {
        "client": {"name": "site-a", "state": "fedloom-state"},
        "data": {"source": "train.csv", "task": _task(labels), **named, "declared_examples": 1000},
        "privacy": privacy,
        "limits": {"max_steps_per_round": 100, "max_rounds": 100},
        "compute": {"device": "auto"},
    }
    preface = (
        "# What this site allows, whatever a coordinator asks. Relative paths count from its folder.\n"
        f"#   fedloom privacy plan {run} --policy {path}\n"
        f"#   fedloom client --server HOST:PORT --policy {path}\n"
    )
    return preface + _checked(Policy, tables, path)


def _checked(model: type[BaseModel], tables: dict[str, dict[str, Any]], path: Path) -> str:
    """The tables as commented TOML, read back once: what is written loads."""
    text = "".join(_lines(model, tables))
    parse(model, tomllib.loads(text), source=str(path))
    return text


def _lines(model: type[BaseModel], tables: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Each key below what the model's own documentation says of it."""
    document = model.model_json_schema()
    for name, values in tables.items():
        (section,) = _references(document["properties"][name])
        about = document["$defs"][section]
        purpose = about["description"].partition(": ")[2]
        yield f"\n[{name}]  # {purpose[:1].upper()}{purpose[1:]}\n"
        for key, value in values.items():
            yield _comment(about["properties"][key]["description"])
            # Numbers, strings, switches and lists of them are written alike in JSON and TOML; `_checked` reads it back.
            yield f"{key} = {json.dumps(value, ensure_ascii=False)}\n"


def _references(entry: dict[str, Any]) -> Iterator[str]:
    choices = [entry, *entry.get("anyOf", ())]
    yield from (str(choice["$ref"]).rpartition("/")[2] for choice in choices if "$ref" in choice)


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, 100))
