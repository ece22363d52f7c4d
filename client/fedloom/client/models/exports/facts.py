"""What the user of an adapter should know of it: fedloom.json."""

from pathlib import Path
from typing import Any

from fedloom.core.config.run import RunConfig, Spec
from fedloom.core.privacy.accounting import Statement

__all__ = ["facts", "privacy_facts"]


def facts(spec: Spec, privacy: Statement | None, user: dict[str, Any] | None = None) -> dict[str, Any]:
    """What an adapter's user should know: base model, labels, and the privacy guarantee with its terms.

    Args:
        spec: A completed run file, or what a client has seen of it. Nothing is told that clients are not, such as the
            strategy, but for what a run file says it began from: without [start] the same adapter has the same facts
            wherever it is written.
        privacy: Statement of the client that has spent most; None in a run without privacy.
        user: The coordinator's statement on whole clients; None without user-level privacy.
    """
    known: dict[str, Any] = {
        "run": spec.run.name,
        "base": spec.model.base,
        "base_digest": spec.model.digest,
        "task": spec.model.task,
        "labels": list(spec.model.labels),
        "rounds": spec.run.rounds,
        "privacy": None,
        "user_privacy": user,
    }
    for name in ("image_size", "audio_seconds"):
        if (asked := getattr(spec.model, name)) is not None:
            known[name] = asked
    if isinstance(spec, RunConfig) and spec.start is not None:
        known["start"] = {"adapter": Path(spec.start.adapter).name, "digest": spec.start.digest}
    if privacy is not None:
        known["privacy"] = privacy_facts(spec, privacy.document())
    return known


def privacy_facts(spec: Spec, stated: dict[str, Any]) -> dict[str, Any]:
    """A statement's document with the mechanism in words."""
    return {
        **stated,
        "mechanism": "DP-SGD on every client: Poisson sampling, per-example clipping, Gaussian noise",
        "clip_norm": spec.privacy.clip_norm,
        "clipping": spec.privacy.clipping,
    }
