"""Under what an update was made, and so under what alone it may leave this machine.

An update may wait in the outbox through restarts of both sides. Whoever asks for it then may describe the run anew:
without secure aggregation, say, whose updates lie in the outbox as they are before masking. So what was promised when
an update was made is kept with it, and it is sent under exactly that or not at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedloom.client.policy import Policy, SecureAggregationPolicy
from fedloom.core.config.run import Spec
from fedloom.core.errors import PolicyError
from fedloom.core.secagg.steps import MASKED
from fedloom.proto.messages import Joined

if TYPE_CHECKING:
    from fedloom.client.session.outbox import OutboxEntry  # which keeps terms

__all__ = ["Terms", "binding", "check_terms", "terms_of"]

_REMEDY = (
    "nothing is sent. Start the client again once the coordinator describes the run as it did, or once the round is "
    "over and the update removed from the outbox"
)


@dataclass(frozen=True)
class Terms:
    """What this site was promised, and has promised itself, when it made an update."""

    spec: str
    """The run's spec, as JSON."""
    schema: str
    """Digest of the run's schema."""
    min_clients: int
    """The site's secure_aggregation.min_clients."""
    peers: Mapping[str, str] = field(default_factory=dict)
    """The site's secure_aggregation.peers."""


def terms_of(policy: Policy, joined: Joined) -> Terms:
    """The terms of an update that is made now."""
    mine = policy.secure_aggregation
    return Terms(joined.spec.model_dump_json(), joined.schema.digest, mine.min_clients, dict(mine.peers))


def check_terms(update: "OutboxEntry", joined: Joined) -> None:
    """Refuse to send an update to a run that is not the one it was made for, in every word of its description.

    Of an update that the first release has put there, without terms, the header and the charge tell how it may leave.

    Args:
        update: What is asked for.
        joined: What the coordinator says now.

    Raises:
        PolicyError: The run is another one, or described in another way.
    """
    terms = update.terms
    wrong = ["run"] if update.run != joined.run else []
    if terms is None:
        wrong += _unlike_header(update, joined.spec)
    else:
        wrong += _differences(Spec.from_json(terms.spec), joined.spec)
        wrong += ["schema"] if terms.schema != joined.schema.digest else []
    if wrong:
        raise PolicyError(
            f"the coordinator describes the run otherwise than when the update for round {update.header.round + 1} was "
            f"made, in {', '.join(wrong)}; {_REMEDY}"
        )


def binding(policy: SecureAggregationPolicy, terms: Terms | None) -> SecureAggregationPolicy:
    """The policy for an update's secure sum: what holds now and held when the update was made."""
    if terms is None:
        return policy
    peers = {name: key for name, key in policy.peers.items() if terms.peers.get(name) == key}
    return policy.model_copy(update={"peers": peers, "min_clients": max(policy.min_clients, terms.min_clients)})


def _unlike_header(update: "OutboxEntry", spec: Spec) -> list[str]:
    """What an update's own header and charge say of its run, where the run says something else."""
    said = {
        "secure_aggregation.enabled": (update.header.codec == MASKED) is spec.secure_aggregation.enabled,
        "privacy.enabled": (update.charge is not None) is spec.privacy.enabled,
        "federated_evaluation.enabled": not update.header.score or spec.federated_evaluation.enabled,
    }
    return [key for key, fits in said.items() if not fits]


def _differences(made: Spec, now: Spec) -> list[str]:
    """Keys whose values differ; never the values, which are a peer's text."""
    ours, theirs = _leaves(made.model_dump()), _leaves(now.model_dump())
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def _leaves(tables: dict[str, Any]) -> dict[str, object]:
    """`section.key` of every value of a spec."""
    sections = {name: table for name, table in tables.items() if isinstance(table, dict)}
    return {f"{name}.{key}": value for name, table in sections.items() for key, value in table.items()}
