"""PEFT adapters in folders into one: whether they belong together, and what is to be said of the result."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.core.errors import ConfigError
from fedloom.strategies.merging.merge import Merged, Rank, merge
from fedloom.strategies.merging.methods.api import Method
from fedloom.strategies.merging.methods.soup import Soup
from fedloom.strategies.merging.peft_folder import PeftFolder

__all__ = ["check_base", "check_together", "joint_privacy", "merge_folders", "merged_facts"]


def merge_folders(
    folders: Sequence[PeftFolder], method: Method, weights: Sequence[float] | None = None, rank: Rank | None = None
) -> Merged:
    """One adapter of several that belong together.

    Args:
        folders: At least one.
        method: As of `merge`, and so are weights and rank.
        weights: One for each.
        rank: Of the result.

    Raises:
        ConfigError: See `check_together` and `merge`; or the adapters hold biases of the base model, of which a PEFT
            folder does not say how they moved, and the method is no mean.
        SchemaError: Their layers or shapes differ.
    """
    check_together(folders)
    carried = folders[0].settings.get("bias", "none")
    if carried != "none" and not isinstance(method, Soup):
        raise ConfigError(
            f"{folders[0].path} holds biases of the base model (bias = {carried!r}) whole, and "
            f"{type(method).__name__} needs their changes; merge them with the method soup"
        )
    return merge([each.adapter for each in folders], method, weights, rank)


def check_together(folders: Sequence[PeftFolder]) -> None:
    """Refuse adapters of different base models, tasks or labels, as far as their folders say.

    Raises:
        ConfigError: Two differ, and in what.
    """
    first = folders[0]
    for other in folders[1:]:
        check_base(first, other)
        for key in ("task_type", "bias", "fan_in_fan_out"):
            _check_same(first, other, key, (first.settings.get(key), other.settings.get(key)))
        if first.facts and other.facts:
            for key in ("task", "labels"):
                _check_same(first, other, key, (first.facts.get(key), other.facts.get(key)))


def check_base(one: PeftFolder, two: PeftFolder) -> None:
    """Refuse adapters of different base models: by their digests if both are known, else by their names.

    Raises:
        ConfigError: They differ.
    """
    digests = one.facts.get("base_digest"), two.facts.get("base_digest")
    key = "base_model_name_or_path"
    known = all(digests)
    _check_same(one, two, "base model", digests if known else (one.settings.get(key), two.settings.get(key)))


def _check_same(one: PeftFolder, two: PeftFolder, what: str, values: tuple[Any, Any]) -> None:
    if values[0] != values[1]:
        raise ConfigError(
            f"{one.path} was trained with {what} {values[0]!r}, and {two.path} with {values[1]!r}; take adapters of "
            "one base model and task, with the same labels in the same order"
        )


def merged_facts(
    name: str, folders: Sequence[PeftFolder], method: Mapping[str, Any], weights: Sequence[float]
) -> dict[str, Any]:
    """What the user of a merged adapter should know, for its fedloom.json.

    Args:
        name: What it is called.
        folders: What it was made of.
        method: Its name and options.
        weights: One for each folder.
    """
    first = next((each.facts for each in folders if each.facts), {})
    sources = [
        {
            "adapter": each.facts.get("run", each.path.name),
            "digest": each.digest,
            "weight": weight,
            "privacy": each.facts.get("privacy"),
            "user_privacy": each.facts.get("user_privacy"),
        }
        for each, weight in zip(folders, weights, strict=True)
    ]
    return {
        "run": name,
        "base": first.get("base", folders[0].settings.get("base_model_name_or_path")),
        **{key: first.get(key) for key in ("base_digest", "task", "labels")},
        "privacy": joint_privacy([each.facts.get("privacy") for each in _last_of_runs(folders)]),
        "user_privacy": None,
        "merged": {**method, "adapters": sources},
    }


def _last_of_runs(folders: Sequence[PeftFolder]) -> list[PeftFolder]:
    """The adapters less earlier rounds of a run of which a later one is there: its statement covers their steps too."""
    last: dict[str | int, PeftFolder] = {}
    for index, each in enumerate(folders):
        run = each.run or index
        if run not in last or int(each.facts.get("rounds", 0)) > int(last[run].facts.get("rounds", 0)):
            last[run] = each
    return list(last.values())


def joint_privacy(stated: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """What holds for an example that is in the data of every merged adapter: the composition of their mechanisms.

    Merging looks at adapters only, so it costs nothing; but each of them may say something about the same example.

    Args:
        stated: The statement of each adapter, None of one without privacy; also of those with weight 0, which may have
            been left out for what they are.

    Returns:
        The document of a statement at the largest delta of theirs; None if one of them promises nothing.

    Raises:
        ConfigError: A statement cannot be read.
    """
    from fedloom.core.privacy.accounting import Spend, statement

    known = [each for each in stated if isinstance(each, Mapping)]
    if not known or len(known) < len(stated) or any(each.get("adjacency") != "add or remove one" for each in known):
        return None
    try:
        spends = [Spend(**mechanism) for each in known for mechanism in each["mechanisms"]]
        delta, rounds = max(float(each["delta"]) for each in known), sum(int(each["rounds"]) for each in known)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the privacy statement of an adapter's fedloom.json cannot be read ({error!r}); export the adapter again"
        ) from error
    return statement(spends, delta, covers="the runs of all merged adapters", rounds=rounds).document()
