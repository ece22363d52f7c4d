"""Which account a site's data is charged to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedloom.client.data.rows import Rows, digest
from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.anchor import anchors_at, default_anchors
from fedloom.client.privacy.ledger.examples import claim
from fedloom.client.privacy.ledger.file import InUse, stored_accounts
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.privacy.ledger.read_only import Glance
from fedloom.client.tasks.api import task_named

__all__ = [
    "anchors_folder",
    "existing_account",
    "ledger_folder",
    "left_out_folder",
    "open_account",
    "outbox_folder",
    "personal_folder",
]


def ledger_folder(policy: Policy) -> Path:
    """Folder of the site's ledger."""
    return policy.client.state / "ledger"


def outbox_folder(policy: Policy) -> Path:
    """Folder of the site's finished updates."""
    return policy.client.state / "spool"


def personal_folder(policy: Policy) -> Path:
    """Folder of what the site trains and keeps."""
    return policy.client.state / "personal"


def left_out_folder(policy: Policy) -> Path:
    """Folder of what codecs have left out of updates."""
    return policy.client.state / "left-out"


def anchors_folder(policy: Policy) -> Path:
    """Folder of the anchors: the policy's, or this user's."""
    return policy.client.anchors or default_anchors()


def open_account(policy: Policy, rows: Rows) -> Ledger:
    """Open the account that `rows` are charged to: the one of the state folder, or a first one.

    The account keeps its name however the data grows or changes, see decision 010.

    Raises:
        LedgerError: The account is in use or not trusted, or some of the texts, or texts nearly the same as many,
            belong to another account of this machine.
    """
    folder, anchors = ledger_folder(policy), anchors_folder(policy)
    name = next(iter(stored_accounts(folder)), digest(rows))
    ledger = Ledger(folder, name, anchors=anchors)
    try:
        claim(anchors, ledger.account, rows.texts, written=not task_named(rows.task).traits.media)
    except BaseException:
        ledger.close()
        raise
    return ledger


@contextmanager
def existing_account(policy: Policy, *, beside_client: bool = False) -> Iterator[Ledger | None]:
    """The site's open account; None if there is none and never was. Looking makes none.

    Args:
        policy: The site's policy.
        beside_client: Take an account that a client has open as it stands, only to be read.

    Raises:
        LedgerError: It cannot be opened or trusted, or it is gone and its anchor remains.
    """
    folder, anchors = ledger_folder(policy), anchors_folder(policy)
    names = stored_accounts(folder) or [anchor.name for anchor in anchors_at(anchors, folder)]
    if not names:
        yield None
        return
    try:
        opened = Ledger(folder, names[0], anchors=anchors)
    except InUse:
        if not beside_client:
            raise
        opened = Glance(folder, names[0])
    with opened as ledger:
        yield ledger
