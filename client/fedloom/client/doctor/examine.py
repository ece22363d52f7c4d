"""The whole examination, the cheapest check first."""

import datetime as dt
import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from fedloom.client.adapters.attach import check_private
from fedloom.client.data.rows import Rows
from fedloom.client.data.site_data import own_rows
from fedloom.client.doctor import machine, network, site
from fedloom.client.doctor.finding import Finding, failed, ok, warning
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.load import load_model
from fedloom.client.policy import Policy, check_spec
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.ledger.account import existing_account
from fedloom.client.privacy.ledger.budget import check_affordable, outlook
from fedloom.client.training.trainer import Trainer
from fedloom.client.transport.tls import MEMBER_FILE
from fedloom.core.config.run import Spec
from fedloom.core.errors import FedloomError, LedgerError
from fedloom.core.privacy.spends import faint
from fedloom.core.security.address import host_of

__all__ = ["examine"]


def examine(
    policy: Policy, *, server: str | None = None, certs: Path | None = None, spec: Spec | None = None
) -> Iterator[Finding]:
    """Look at everything that a client needs; one finding after the other, as they are made.

    Args:
        policy: The site's policy.
        server: HOST:PORT of the coordinator; None leaves the network out.
        certs: This site's folder of certificates; None is for a coordinator without, on the loopback interface.
        spec: The run to be joined, with its noise multiplier; None leaves out what only a run can tell.

    Raises:
        ConfigError: `server` is not HOST:PORT.
    """
    yield machine.python()
    yield from machine.packages()
    named = (None, None) if spec is None else (spec.model.base, spec.model.digest)
    model, weights_bytes = site.base_model(policy, *named)
    yield machine.device(policy.compute, weights_bytes)
    yield machine.state_folder(policy.client.state)
    yield machine.disk(policy.client.state)
    known = {"these files were installed": dt.datetime.fromtimestamp(Path(__file__).stat().st_mtime, dt.UTC)}
    if certs is not None:
        found, begins = site.certificate(policy, certs)
        yield found
        known |= {} if begins is None else {"this site's certificate was made": begins}
    books, written = site.ledger(policy)
    yield from books
    known |= {} if written is None else {"the ledger was last written": written}
    if server is not None:
        yield from _network(policy, server, certs, known)
    yield machine.clock(dt.datetime.now(dt.UTC), known)
    yield site.data(policy.data.source)
    yield model
    if spec is not None:
        yield from _run(policy, spec, model.level != "failed")
    elif policy.data.own_task is not None:
        yield _rows(policy, None)[0]


def _network(policy: Policy, server: str, certs: Path | None, known: dict[str, dt.datetime]) -> Iterator[Finding]:
    found, line = network.reach(server)
    yield found
    if line is None:
        return
    shown = None
    with closing(line):
        if certs is not None:
            trouble, shown = network.server_certificate(line, host_of(server), certs)
            if trouble is not None:
                yield trouble
                return
    if shown is not None:
        known["the coordinator's certificate was made"] = shown.not_valid_before_utc
    if certs is not None and not (certs / MEMBER_FILE).exists():
        yield warning("coordinator", f"{server} speaks TLS; it is asked no more before this site has a certificate")
        return
    yield from network.answer(server, policy.client.name, certs, shown)


def _run(policy: Policy, spec: Spec, loadable: bool) -> Iterator[Finding]:
    """What only a run can tell: whether the policy allows it, the data fits, and the model can be trained privately."""
    name = spec.run.name
    try:
        check_spec(policy, spec)
        yield ok("run", f"the policy allows {name}")
    except FedloomError as error:
        yield failed("run", str(error), "change the policy if you may, or do not join")
    try:
        if spec.privacy.enabled and spec.privacy.noise_multiplier is not None:
            with existing_account(policy, beside_client=True) as account:
                if account is not None:
                    check_affordable(standing := outlook(account, spec, policy.privacy))
                    yield (
                        warning("budget", str(standing), standing.warning)
                        if standing.warning
                        else ok("budget", str(standing))
                    )
    except LedgerError:
        pass  # said before, as the ledger's own finding
    except FedloomError as error:
        yield failed("budget", str(error))
    if (drowned := faint(spec, policy.data.declared_examples or 0)) is not None:
        yield warning("size", drowned)
    found, rows = _rows(policy, spec)
    yield found
    if rows is None or not loadable:
        return
    base = policy.model.folder or spec.model.base
    try:
        check_private(spec)
        model = load_model(spec.model.model_copy(update={"base": base}), spec.adapter, policy.compute)
        # Without a ledger nothing can be charged. What a private run would check at its start is checked here too.
        bare = spec.model_copy(update={"privacy": spec.privacy.model_copy(update={"enabled": False})})
        trainer = Trainer(model, rows, bare, policy, None)
        if model.adapter.traits.private:
            yield from _private(model)
            trainer.check_sensitivity()
            yield ok("sensitivity", "one example moves the clipped sum by no more than the noise covers")
        size = trainer.microbatch.size
        yield ok("batch", f"{size} examples at a time ({spec.train.microbatch} asked for)")
    except FedloomError as error:
        yield failed("model", str(error))


def _rows(policy: Policy, spec: Spec | None) -> tuple[Finding, Rows | None]:
    """The rows by the policy's own task and labels, as a client reads them before it joins."""
    said: list[tuple[int, str]] = []
    try:
        rows = own_rows(policy, spec, lambda *line: said.append(line))
        text = "; ".join([f"every row fits {rows.task}", *(line for _, line in said)])
        if max(level for level, _ in said) >= logging.WARNING:
            return warning("rows", text, "see that every file and row that you believe is read"), rows
        return ok("rows", text), rows
    except FedloomError as error:
        return failed("rows", str(error)), None


def _private(model: AdapterModel) -> Iterator[Finding]:
    with recording(model.model, model.trainable(model.schema.roles)):
        yield ok("layers", f"all {len(model.slots)} trained tensors have per-example gradients")
