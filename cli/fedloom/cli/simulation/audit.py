"""`fedloom audit`: whether an attacker sees more of one example than the accountant admits."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedloom.cli.console import out
from fedloom.core.config.run import load_run

if TYPE_CHECKING:
    from fedloom.client.models.adapter_model import AdapterModel
    from fedloom.client.policy import Policy
    from fedloom.client.privacy.auditing.audit import Audit
    from fedloom.core.config.run import RunConfig

__all__ = ["audit"]

_EXPLAINED = {
    "consistent": "the attacker saw no more than was claimed. This is a lower bound, not a proof of privacy: it can "
    "refute the claim, never establish it.",
    "blind": "nothing was refuted, but not even a mechanism with a tenth of the noise would have been: the audit says "
    "nothing. Use more --trials.",
    "VIOLATION": "the attacker saw more than the claim allows. A right mechanism is called so in at most one audit in "
    "a hundred: run it again, and if it says so again, do not train.",
}


def audit(
    run: Annotated[Path, typer.Argument(help="The run file.")],
    policy: Annotated[
        Path | None, typer.Option(help="A client's policy file: its delta, device and base model folder are used.")
    ] = None,
    trials: Annotated[
        int, typer.Option(help="Releases with the canary, and as many without. More give a tighter bound.", min=100)
    ] = 1000,
    adversarial: Annotated[
        bool, typer.Option("--adversarial", help="Also attack the step as a coordinator that lies would.")
    ] = False,
    json_only: Annotated[bool, typer.Option("--json", help="Print only one line of JSON.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, such as privacy.noise_multiplier=0.5.")
    ] = None,
) -> None:
    """Attack the private step that a run file asks for, and bound its epsilon from below.

    The attacker knows all but one example, chose that example, and sees every noisy sum. With --adversarial it also
    chooses weights and settings, and looks for correlated noise and telling low bits. No private data is read, no
    account charged, nothing sent. Exit status 1 when the claim is refuted or the audit could not have refuted it.

    Example: fedloom audit examples/sentiment.toml
    """
    config = load_run(run, tuple(overrides or ()))
    site = _site(policy)
    # Loads torch, which takes seconds: a mistake in a file should not have to wait for it.
    from fedloom.client.policy import check_spec
    from fedloom.client.privacy.auditing.adversarial import adversarial as attacks
    from fedloom.client.privacy.auditing.audit import audit as attack
    from fedloom.server.build import calibrated

    config = calibrated(config)
    if site is not None:
        check_spec(site, config.spec)
    delta = config.privacy.delta if site is None else site.privacy.delta
    model = _load(config, site)
    result = attack(model, config.spec, delta, trials=trials)
    if adversarial:
        result = replace(result, attacks=attacks(model, config.spec))
    if not json_only:
        _show(config, result)
    typer.echo(json.dumps(_document(config, result)))
    if result.verdict != "consistent":
        raise typer.Exit(1)


def _site(policy: Path | None) -> "Policy | None":
    from fedloom.client.policy import load_policy

    return None if policy is None else load_policy(policy)


def _load(config: "RunConfig", site: "Policy | None") -> "AdapterModel":
    from fedloom.client.models.load import load_model
    from fedloom.client.policy import ComputePolicy

    if site is None:
        return load_model(config.model, config.adapter, ComputePolicy.of(config.engine))
    base = site.model.folder or config.model.base
    return load_model(config.model.model_copy(update={"base": base}), config.adapter, site.compute)


def _show(config: "RunConfig", result: "Audit") -> None:
    out.print(
        f"{config.run.name}: {result.parameters:,} trained values, clip norm {result.clip_norm:g}, noise multiplier "
        f"{result.noise_multiplier:g}, delta {result.delta:g}; bounds hold together at 99 %"
    )
    table = Table("check", "trials", "steps", "rate", "claimed", "at least", "noise ≤", "", box=None, pad_edge=False)
    for check in result.checks:
        figures = (f"{check.claim:.3f}", _figure(check.lower), _figure(check.noise_at_most))
        counts = (str(check.trials), str(check.steps), f"{check.sampling_rate:g}")
        table.add_row(check.name, *counts, *figures, check.verdict)
    out.print(table)
    if result.attacks:
        _show_attacks(result)
    out.print(f"{result.verdict}: {_EXPLAINED[result.verdict]}")


def _show_attacks(result: "Audit") -> None:
    table = Table("attack", "tries", "found", "allowed", "counted in", "", box=None, pad_edge=False)
    for each in result.attacks:
        found = (_figure(each.found), f"{each.allowed:g}")
        table.add_row(each.name, str(each.tries), *found, each.figure, each.verdict)
    out.print(table)


def _figure(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "no bound"


def _document(config: "RunConfig", result: "Audit") -> dict[str, Any]:
    """What a program reads; null where there is no bound, as an infinity is not JSON."""
    checks = [
        {
            "name": check.name,
            "verdict": check.verdict,
            "trials": check.trials,
            "steps": check.steps,
            "sampling_rate": check.sampling_rate,
            "claimed_epsilon": check.claim,
            "epsilon_at_least": check.lower if math.isfinite(check.lower) else None,
            "noise_multiplier_at_most": check.noise_at_most if math.isfinite(check.noise_at_most) else None,
            "control_seen": check.control_seen,
        }
        for check in result.checks
    ]
    attacks = [
        {
            "name": each.name,
            "verdict": each.verdict,
            "tries": each.tries,
            "counted_in": each.figure,
            "found": each.found if math.isfinite(each.found) else None,
            "allowed": each.allowed,
            "control_seen": each.control_seen,
        }
        for each in result.attacks
    ]
    return {
        "audit": config.run.name,
        "verdict": result.verdict,
        "confidence": 0.99,
        "delta": result.delta,
        "clip_norm": result.clip_norm,
        "noise_multiplier": result.noise_multiplier,
        "parameters": result.parameters,
        "checks": checks,
        "attacks": attacks,
    }
