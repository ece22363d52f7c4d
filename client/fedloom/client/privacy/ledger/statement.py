"""The privacy statement of an account: what it promises, and every charge that the promise rests on."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version

from fedloom.client.privacy.ledger.hash_chain import CHARGED
from fedloom.client.privacy.ledger.ledger import Ledger

__all__ = ["statement"]


def statement(ledger: Ledger, budget: float, delta: float) -> dict[str, object]:
    """The account as a JSON document.

    `epsilon` composes the sampling that was really used: rate, noise and steps of every charge, released or not.
    Nothing in it depends on the data beyond the fact that they were trained on.

    Args:
        ledger: The account.
        budget: Epsilon that the policy allows.
        delta: Delta at which both are stated.

    Raises:
        ConfigError: There is no finite epsilon at this delta.
    """
    stated = ledger.statement(delta)
    reserved = {entry.number: entry for entry in ledger.entries if entry.kind == CHARGED}
    charges: list[Mapping[str, object]] = [
        json.loads(reserved[charge.number].body)
        | {"charge": charge.number, "reserved": reserved[charge.number].written, "released": charge.digest}
        for charge in ledger.charges()
    ]
    return {
        "format": "fedloom privacy statement 1",
        "account": ledger.account,
        "unit": stated.unit,
        "adjacency": stated.adjacency,
        "delta": delta,
        "epsilon": stated.epsilon,
        "budget": budget,
        "accountant": {"kind": "PLD", "library": "dp-accounting", "version": version("dp-accounting")},
        "grid": stated.grid,
        "sampling": "Poisson, each example by itself at the charge's rate; empty batches are noised and counted",
        "mechanisms": [asdict(spend) for spend in stated.mechanisms],
        "charges": charges,
        "entries": ledger.sequence,
        "head": ledger.head,
    }
