"""What `fedloom inspect` says of the rounds that a run folder has kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from fedloom.cli.console import out
from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.schema import Role

if TYPE_CHECKING:
    from fedloom.server.storage.kept import KeptRound
    from fedloom.strategies.diagnostics.noise_share import NoiseShares

__all__ = ["run_document", "show_rounds"]

_MOST_CLIENTS = 8
"""Clients whose distances fit on a line."""


def run_document(folder: Path) -> dict[str, Any]:
    """The kept rounds of a run, for programs; nothing of a folder that is no run's.

    Args:
        folder: Whatever was to be inspected.

    Raises:
        ConfigError: Its run file cannot be read, or its state is of another run.
        StoreError: Its state is damaged.
    """
    from fedloom.server.storage.kept import kept_rounds

    if not ((folder / "run.toml").is_file() and (folder / "state" / "run.db").is_file()):
        return {}
    config = load_run(folder / "run.toml")
    rounds = [_round(each, config) for each in kept_rounds(folder / "state", config)]
    single = "a secure sum is all that the coordinator had" if config.secure_aggregation.enabled else None
    return {
        "private": config.privacy.enabled,
        "rounds": rounds,
        "unknown": {
            "rounds": None if rounds else "not kept: `rounds.keep = 1` in the run file keeps those of the last round",
            "updates": single,
            "noise_share": _noise_unknown(config, rounds),
        },
    }


def _round(kept: "KeptRound", config: RunConfig) -> dict[str, Any]:
    from fedloom.strategies.diagnostics.changes import round_changes

    document: dict[str, Any] = {"round": kept.number, **_drift(kept)}
    if not kept.updates:
        return {**document, "clients": [], "distances": None, "layers": []}
    changes, noise = round_changes(kept.before.schema, kept.updates), _noise(kept, config)
    layers = [
        {
            "module": each.module,
            "change": each.change,
            "averaging_error": each.error,
            "distance": each.spread,
            "noise_share": noise.layers.get(each.module) if noise else None,
        }
        for each in changes.layers
    ]
    lengths = np.sqrt(np.diag(changes.inner))
    clients = [
        {
            "client": update.client,
            "weight": update.weight,
            "change": float(length),
            "noise_share": noise.clients[index] if noise else None,
        }
        for index, (update, length) in enumerate(zip(kept.updates, lengths, strict=True))
    ]
    errors = [each.error for each in changes.layers if each.error is not None]
    count = len(kept.updates)
    distances = changes.distances
    whole = {
        "change": float(np.linalg.norm([each.change for each in changes.layers])),
        "averaging_error": float(np.linalg.norm(errors)) if errors else None,
        "distance": float(np.sqrt(np.sum(distances**2) / (count * (count - 1)))) if count > 1 else None,
        "noise_share": noise.mean if noise else None,
    }
    return {**document, **whole, "clients": clients, "distances": distances.tolist(), "layers": layers}


def _drift(kept: "KeptRound") -> dict[str, float | None]:
    """How much the adapter's products have turned in the round: means over layers; None where there was nothing yet."""
    from fedloom.strategies.diagnostics.changes import result_products
    from fedloom.strategies.merging.spectrum import likeness

    before, after = (result_products(each.schema, kept.strategy.result(each)) for each in (kept.before, kept.after))
    alike = [likeness(before[module], after[module]) for module in after if before[module].norm]
    names = {"cosine": "cosine", "input_overlap": "inputs", "output_overlap": "outputs"}
    return {
        key: float(np.mean([getattr(each, name) for each in alike])) if alike else None for key, name in names.items()
    }


def _noise(kept: "KeptRound", config: RunConfig) -> "NoiseShares | None":
    from fedloom.client.training.expected_noise import update_noise
    from fedloom.strategies.diagnostics.noise_share import noise_shares

    plans = [kept.strategy.plan(kept.before, kept.before.round, each.client) for each in kept.updates]
    if config.strategy.weighting != "examples" or any(plan.turns for plan in plans):
        return None
    variances: list[Mapping[str, float]] = []
    for update, train in zip(kept.updates, kept.trained, strict=True):
        begun = kept.number - 1 - update.staleness
        if (found := update_noise(config, train, begun, int(update.weight))) is None:
            return None
        adapter, head = found
        variances.append({role: head if role == Role.HEAD else adapter for role in kept.before.schema.roles})
    return noise_shares(kept.before.schema, kept.updates, variances)


def _noise_unknown(config: RunConfig, rounds: list[dict[str, Any]]) -> str | None:
    """Why no noise share is told; None where there is one."""
    if any(each.get("noise_share") is not None for each in rounds):
        return None
    if not config.privacy.enabled:
        return "none: the run is not private"
    if config.strategy.weighting != "examples":
        return 'not known: sizes that clients declare are in the log only with strategy.weighting = "examples"'
    return (
        "not known: it has a closed form only for sgd without smoothing, proximal_mu and ema, where all tensors move "
        "in every step and privacy.noise_bands = 1"
    )


def show_rounds(document: Mapping[str, Any], short: Mapping[str, str]) -> None:
    """The same for people.

    Args:
        document: What `run_document` gave.
        short: What a module is called in tables.
    """
    if not document:
        return
    rounds, unknown = document["rounds"], document["unknown"]
    if rounds:
        out.print()
        table = Table("round", "clients", *_TITLES, *_TURNED, box=None, pad_edge=False)
        for each in rounds:
            turned = (_plain(each[key]) for key in _TURNED.values())
            table.add_row(str(each["round"]), str(len(each["clients"]) or "-"), *_shown(each), *turned)
        out.print(table)
        _show_last(rounds[-1], short)
    for what, why in unknown.items():
        if why is not None and (rounds or what == "rounds"):
            out.print(f"{what.replace('_', ' ')} {why}")
    if rounds and not document["private"]:
        out.print("the run is not private: what is said of single clients has no noise")


_TITLES = {"change": "change", "averaging error": "averaging_error", "noise": "noise_share", "distance": "distance"}
_TURNED = {"cosine": "cosine", "inputs": "input_overlap", "outputs": "output_overlap"}


def _show_last(last: Mapping[str, Any], short: Mapping[str, str]) -> None:
    """Layers and clients of the newest round."""
    if not last["clients"]:
        return
    out.print(f"\nround {last['round']} by layer and by client")
    table = Table("layer", *_TITLES, box=None, pad_edge=False)
    for each in last["layers"]:
        table.add_row(short.get(each["module"], each["module"]), *_shown(each))
    out.print(table)
    out.print()
    clients = last["clients"]
    few = len(clients) <= _MOST_CLIENTS
    names = [f"to {number}" for number, _ in enumerate(clients, 1)] if few else ["nearest", "farthest"]
    table = Table("", "client", "weight", "change", "noise", *names, box=None, pad_edge=False)
    for index, each in enumerate(clients):
        others = [value for other, value in enumerate(last["distances"][index]) if other != index]
        found = last["distances"][index] if few else [min(others), max(others)]
        far = [f"{value:.3g}" if value else "-" for value in found]
        shown = f"{each['weight']:g}", f"{each['change']:.3g}", _share(each["noise_share"])
        table.add_row(str(index + 1), each["client"], *shown, *far)
    out.print(table)


def _shown(values: Mapping[str, Any]) -> list[str]:
    """The columns of `_TITLES`; an error is told as a part of the change that it is an error of."""
    change, error = values.get("change"), values.get("averaging_error")
    part = error / change if error is not None and change else None
    return [_plain(change), _share(part), _share(values.get("noise_share")), _plain(values.get("distance"))]


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
