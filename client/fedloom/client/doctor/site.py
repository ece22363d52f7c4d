"""What this site has: its certificate, its ledger, its data and its base model."""

import datetime as dt
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedloom.client.assets.fetch import ASSETS, cache_dir
from fedloom.client.doctor.finding import Finding, failed, ok, warning
from fedloom.client.models.base_folder import base_digest, resolve_base
from fedloom.client.policy import ComputePolicy, Policy
from fedloom.client.privacy.ledger.account import existing_account, ledger_folder, outbox_folder
from fedloom.client.privacy.ledger.read_only import Glance
from fedloom.client.session.outbox import check_outbox
from fedloom.client.transport.enrollment import due
from fedloom.client.transport.tls import MEMBER_FILE, member, member_pair
from fedloom.core.errors import FedloomError, IdentityError, LedgerError
from fedloom.core.registry import entries

__all__ = ["base_model", "certificate", "data", "ledger"]


def certificate(policy: Policy, certs: Path) -> tuple[Finding, dt.datetime | None]:
    """Whether this site's certificate is a client's of its name, and for how long; and when it was made."""
    name = policy.client.name
    if not (certs / MEMBER_FILE).exists():
        return failed(
            "certificate", f"{certs} has none", "have the operator invite this site, and run `fedloom certs enrol`"
        ), None
    try:
        held, who, soon = member_pair(certs).certificate, member(certs), due(certs)
    except IdentityError as error:
        # A clock that is weeks ahead ends every certificate, and enrolling again would not help.
        shown = f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M}"
        remedy = f"first see that the clock is right: it shows {shown} UTC" if "ended on" in str(error) else ""
        return failed("certificate", str(error), remedy), None
    begins, ends, now = held.not_valid_before_utc, held.not_valid_after_utc, dt.datetime.now(dt.UTC)
    text = f"{who.role} {who.name}, {(ends - now).days} days left"
    if (who.role, who.name) != ("client", name):
        remedy = f"enrol with a join token for the client {name}, or correct client.name"
        return failed("certificate", f"it is for the {text}; the policy is for the client {name}", remedy), begins
    if soon:
        remedy = "run `fedloom certs renew`, or let `fedloom client` run, which renews it by itself"
        return warning("certificate", f"{text}: less than a third of its life", remedy), begins
    return ok("certificate", text), begins


def ledger(policy: Policy) -> tuple[list[Finding], dt.datetime | None]:
    """Whether the ledger can be trusted, what is left of the budget, and when the ledger was last written."""
    mine, written = policy.privacy, None
    try:
        with existing_account(policy, beside_client=True) as account:
            if account is None:
                found = [ok("ledger", f"none yet in {ledger_folder(policy)}; epsilon {mine.epsilon:g} is free")]
            else:
                spent = account.epsilon(mine.delta)
                written = dt.datetime.fromtimestamp(account.entries[-1].written, dt.UTC)
                text = f"{account.sequence} entries, sound; epsilon {spent:.4f} of {mine.epsilon:g} is spent"
                remedy = "raise privacy.epsilon if you may; no private round can be paid any more"
                found = [ok("ledger", text) if spent < mine.epsilon else failed("ledger", text, remedy)]
                if stopped := account.stopped():
                    what = (
                        f"the last charges for {', '.join(map(repr, stopped))} came to nothing: the rounds failed here"
                    )
                    found.append(
                        failed("ledger", what, "look in the client's log for why; then `fedloom ledger recover`")
                    )
                if isinstance(account, Glance):
                    remedy = "it checked the ledger when it started; stop it to check the anchor again"
                    found.append(warning("ledger", "a client has it open", remedy))
    except LedgerError as error:
        return [failed("ledger", str(error))], None
    try:
        waiting = len(check_outbox(outbox_folder(policy)))
    except LedgerError as error:
        return [*found, failed("outbox", str(error))], written
    return [*found, ok("outbox", f"{waiting} updates wait to be sent")], written


def data(source: str) -> Finding:
    """Whether the data is there, not empty and readable."""
    if source in entries("data"):
        return ok("data", f"packaged data set {source}")
    path = Path(source)
    if not path.exists():
        return failed("data", f"{source} does not exist", "correct data.source in the policy")
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    try:
        if not sum(each.stat().st_size for each in files):
            return failed("data", f"{source} is empty", "put the site's data there, or correct data.source")
        for each in files:
            os.close(os.open(each, os.O_RDONLY))
    except OSError as error:
        return failed("data", f"{source} cannot be read: {error}", "make it readable for this user")
    return ok("data", f"{source} is there and readable")


def base_model(policy: Policy, base: str | None, pinned: str | None) -> tuple[Finding, int | None]:
    """Whether the base model lies here, as the policy or the run pins it; and the bytes that its weights will take.

    Args:
        policy: The site's policy.
        base: What the run names; None without one.
        pinned: The digest that the run pins.
    """
    check, wanted = "base model", policy.model.folder or base
    if wanted is None:
        return warning(check, "neither model.folder nor a run names one", "give --run, or set model.folder"), None
    if wanted in ASSETS and not (cache_dir() / wanted).is_dir():
        return warning(check, f"{wanted} is not here yet", f"run `fedloom assets {wanted}`"), None
    try:
        folder = resolve_base(wanted)
        found, size = base_digest(folder), _weights_bytes(folder, policy.compute)
    except (FedloomError, OSError) as error:
        text = str(error).replace("model.base", "model.folder") if policy.model.folder else str(error)
        remedy = (
            "correct model.folder in the policy, which is taken whatever a run names" if policy.model.folder else ""
        )
        return failed(check, text, remedy), None
    except SafetensorError as error:
        return failed(check, f"weights in {wanted} cannot be read: {error}", "copy the files again"), None
    if policy.model.digests and found not in policy.model.digests:
        remedy = "put the files back that the digest was taken of, or correct model.digests"
        allowed = ", ".join(policy.model.digests)
        return failed(check, f"{wanted} has digest {found}; this site allows {allowed}", remedy), size
    if pinned is not None and found != pinned:
        return failed(check, f"{wanted} has digest {found}; the run pins {pinned}", "get the same files"), size
    return ok(check, f"{wanted}, {found}"), size


def _weights_bytes(folder: Path, compute: ComputePolicy) -> int:
    """What the weights take once they are loaded as `compute` says."""
    values = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                size = 1
                for side in tensors.get_slice(name).get_shape():
                    size *= side
                values += size
    if compute.quantization != "none":
        return values // {"8bit": 1, "4bit": 2}[compute.quantization]
    return values * (2 if compute.dtype == "bfloat16" else 4)
