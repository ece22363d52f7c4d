"""From a joined run and a policy to a trainer: data, base model, adapter and ledger of this site."""

from contextlib import ExitStack

from fedloom.client.config import Policy
from fedloom.client.data.load import load_rows
from fedloom.client.data.rows import digest
from fedloom.client.model import base_digest, load_model, resolve_base
from fedloom.client.privacy.ledger import Ledger
from fedloom.client.trainer import Trainer
from fedloom.proto.errors import PolicyError
from fedloom.proto.run import Spec

__all__ = ["prepare"]


def prepare(policy: Policy, spec: Spec) -> Trainer:
    """Load everything a client needs, the cheapest check first.

    Raises:
        DataError: The data set is missing or malformed.
        PolicyError: The base model is not one this site allows.
        ModelError: The base model cannot be loaded.
        LedgerError: The ledger is in use or cannot be trusted.
    """
    rows = load_rows(policy.data.source, spec.model.labels, "train", spec.model.task)
    base = policy.model.folder or spec.model.base
    found = base_digest(resolve_base(base))
    if policy.model.digests and found not in policy.model.digests:
        raise PolicyError(
            f"base model {base!r} has digest {found}; this site allows {', '.join(policy.model.digests)} "
            "(model.digests in the policy)"
        )
    with ExitStack() as on_failure:
        ledger = None
        if spec.privacy.enabled:
            ledger = on_failure.enter_context(Ledger(policy.client.state / "ledger", digest(rows)))
        model = load_model(spec.model.model_copy(update={"base": base}), spec.adapter, policy.client.device)
        trainer = Trainer(model, rows, spec, policy, ledger)
        on_failure.pop_all()  # the ledger stays open with the trainer
    return trainer
