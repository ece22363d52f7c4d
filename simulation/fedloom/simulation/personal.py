"""A run whose clients keep tensors to themselves has an adapter for each client: how good they are, and their files."""

from pathlib import Path
from typing import Any

import numpy as np

from fedloom.client.eval.score import Score, evaluate
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.result import result_name, save_result
from fedloom.client.privacy.ledger.account import personal_folder
from fedloom.client.session.personal_tensors import kept_personal
from fedloom.core.model_card import held_out_facts
from fedloom.core.schema import Tensors
from fedloom.simulation.federation import Federation

__all__ = ["save_clients", "scored"]


def scored(federation: Federation, run: str, adapter: Tensors) -> tuple[Score, dict[str, Score]]:
    """The score of a run on the held-out rows, and that of each client's adapter, by client.

    Args:
        federation: The clients, and the model, which is left with one of the adapters.
        run: The run's name.
        adapter: What the clients share.

    Returns:
        The mean over the clients, their answers counted together, and each; or the shared adapter's score and nothing
        more, if no client keeps anything to itself.
    """
    own = {name: _own(federation, run, name) for name in federation.clients}
    if not any(own.values()):
        federation.model.show(adapter)
        return evaluate(federation.model, federation.held_out, generate=federation.config.evaluation.generate), {}
    scores = {}
    for name, values in own.items():
        federation.model.show({**adapter, **values})
        scores[name] = evaluate(federation.model, federation.held_out, generate=federation.config.evaluation.generate)
    return _mean(list(scores.values())), scores


def _mean(scores: list[Score]) -> Score:
    accuracy, loss = (float(np.mean(each)) for each in zip(*((s.accuracy, s.loss) for s in scores), strict=True))
    tables = zip(*(score.confusion for score in scores), strict=True)
    confusion = tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in tables)
    names = set.intersection(*(set(score.metrics) for score in scores))
    metrics = {
        name: float(np.mean([score.metrics[name] for score in scores])) for name in scores[0].metrics if name in names
    }
    return Score(accuracy, loss, scores[0].examples, confusion, metrics)


def save_clients(
    federation: Federation,
    model: AdapterModel,
    run: str,
    adapter: Tensors,
    scores: dict[str, Score],
    folder: Path,
    facts: dict[str, Any],
) -> None:
    """Write the result of each client in `scores` to `adapters/NAME`, or `merged-by-client/NAME`, of the run folder.

    `model` is what they are written with, see `writable`; it is left with one of the adapters.
    """
    inside = folder / ("adapters" if result_name(model) == "adapter" else "merged-by-client")
    for name, score in scores.items():
        model.show({**adapter, **_own(federation, run, name)})
        known = {**facts, "client": name, **held_out_facts(score.accuracy, score.loss, score.metrics)}
        save_result(model, inside / name, known)


def _own(federation: Federation, run: str, name: str) -> Tensors:
    return kept_personal(personal_folder(federation.policies[name]), run, name)
