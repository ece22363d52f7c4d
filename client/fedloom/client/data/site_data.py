"""A site's own data, read and checked against its policy alone, before a coordinator has said a word."""

import logging
from dataclasses import dataclass

from fedloom.client.data.load import Tell, load_rows
from fedloom.client.data.rows import Rows
from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.account import open_account
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.send_times import AT_ONCE, Pace
from fedloom.client.training.local_eval import split
from fedloom.core.config.run import Spec
from fedloom.core.errors import DataError, PolicyError

__all__ = ["Own", "own_data", "own_rows"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Own:
    """What a site brings to a run."""

    rows: Rows
    """All training rows of the source, those included that the policy holds out."""
    ledger: Ledger | None
    """Their open account; None where the policy also allows runs without one."""


def own_data(policy: Policy, pace: Pace = AT_ONCE) -> Own | None:
    """Read the site's data and open their account, as far as the policy alone says how.

    Whatever is wrong with the data comes out here, before anything is sent: a client that joined first and then failed
    would answer any question about its rows that a coordinator can put into a run.

    Args:
        policy: The site's policy.
        pace: When the client goes on: a service that is started again and again would tell how long its data are.

    Returns:
        None where only a run can say what the rows are for, which a policy with privacy.allow_non_private may leave
        to it.

    Raises:
        DataError: See `own_rows`.
        LedgerError: See `open_account`.
        PolicyError: The policy does not say what the rows are for.
    """
    if policy.data.own_task is None:
        if policy.privacy.allow_non_private:
            return None
        raise PolicyError(
            'this policy does not say what its rows are for; add `labels = ["...", "..."]` to its section [data], the '
            "label names in the order of the run's model.labels, and `task` unless it is text-classification"
        )
    begun = pace.clock()
    rows = own_rows(policy)
    if policy.privacy.allow_non_private:
        return Own(rows, None)
    own = Own(rows, open_account(policy, rows))
    pace.read(begun)
    return own


def own_rows(policy: Policy, spec: Spec | None = None, tell: Tell = log.log) -> Rows:
    """Read the site's rows by the policy's task and labels, or, where it has none, by those of a run without privacy.

    Args:
        policy: The site's policy.
        spec: The run, where the policy leaves its task and labels to it.
        tell: Gets a line on what was read and on what was passed over, which stays on this machine.

    Raises:
        DataError: The data set is missing or malformed, or leaves no row to train on.
        PolicyError: The policy has no task and labels, and there is no run without privacy either.
    """
    data, task, labels = policy.data, policy.data.own_task, policy.data.labels
    if task is None:
        if spec is None or spec.privacy.enabled:
            raise PolicyError("data.task and data.labels of the policy say how rows are read; add them to [data]")
        task, labels = spec.model.task, spec.model.labels
    rows = load_rows(data.source, labels, "train", task, data, tell=tell)
    if not len(split(rows, data.held_out)[0]):
        raise DataError(f"data.held_out = {data.held_out:g} leaves no example to train on; lower it")
    return rows
