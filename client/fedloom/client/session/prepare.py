"""From a joined run and a policy to a trainer: data, base model, adapter and ledger of this site."""

import logging
from collections.abc import Callable
from contextlib import ExitStack, closing

from fedloom.client.adapters.attach import check_private
from fedloom.client.data.site_data import Own, own_rows
from fedloom.client.models.base_folder import allowed_base
from fedloom.client.models.load import load_model
from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.account import open_account, personal_folder
from fedloom.client.privacy.ledger.budget import check_affordable, outlook
from fedloom.client.training.data_parallel import Team
from fedloom.client.training.device import compute_of
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.privacy.spends import faint

__all__ = ["prepare"]


log = logging.getLogger(__name__)


def prepare(
    policy: Policy,
    spec: Spec,
    own: Own | None = None,
    *,
    announce: Callable[[str], None] = log.info,
    run: str | None = None,
    owing: bool = False,
) -> Trainer:
    """Load everything a client needs, the cheapest check first.

    Args:
        policy: The site's policy.
        spec: The run, already checked against it.
        own: The site's data, read before it joined; None reads them here.
        announce: Gets a line on the budget and what it buys of the run, before anything is trained, and what goes on.
        run: The run's name, by which the ledger knows what this client has done in it.
        owing: Whether an update that was paid for still waits to be sent in this run, so that joining is of use
            even if the budget buys nothing more.

    Raises:
        BudgetError: The budget does not buy even one round of the run.
        DataError: The data set is missing or malformed. It never is in a private run whose data were read before.
        PolicyError: The base model is not one this site allows.
        ModelError: The adapter kind is not for private runs, or the base model cannot be loaded.
        LedgerError: The ledger is in use or cannot be trusted, or the data belongs to another account.
    """
    check_private(spec)
    with ExitStack() as on_failure:
        rows = own.rows if own else own_rows(policy, spec)
        ledger = own.ledger if own else None
        if ledger is not None:
            on_failure.enter_context(ledger)
        base, team = allowed_base(policy, spec), None
        if spec.privacy.enabled:
            ledger = ledger or on_failure.enter_context(open_account(policy, rows))
            standing = outlook(ledger, spec, policy.privacy, run)
            announce(str(standing))
            if not owing:
                check_affordable(standing)
            if standing.warning:
                announce(f"warning: {standing.warning}")
            if (drowned := faint(spec, policy.data.declared_examples or 0)) is not None:
                announce(f"warning: {drowned}")
        announce(f"loading {spec.model.base} and trying it on made-up examples, which may take minutes")
        compute = compute_of(policy.compute, 0)
        if compute.processes > 1:
            team = on_failure.enter_context(closing(Team(policy, spec, base)))
        model = load_model(spec.model.model_copy(update={"base": str(base)}), spec.adapter, compute)
        mine = policy.model_copy(update={"compute": compute})
        trainer = Trainer(model, rows, spec, mine, ledger, personal=personal_folder(policy))
        if team is not None:
            team.join(trainer)
            trainer.team = team
        announce("ready; waiting for a round")
        on_failure.pop_all()  # the ledger and the other processes stay with the trainer
    return trainer
