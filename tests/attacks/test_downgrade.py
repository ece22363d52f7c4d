"""A coordinator that asks for a finished update under weaker terms than it was made under.

The coordinator is scripted; the participant, its outbox, ledger, keys and secure sum are the real ones. What it would
win is `SECRET`: the update as it lies in the outbox before it is masked.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.secagg.identity_key import load_identity, public_text
from fedloom.client.secagg.participant import Attempt, membership
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.session.heartbeat import Timing
from fedloom.client.session.outbox import keep, kept
from fedloom.client.session.participant import Participant
from fedloom.core.codecs import codec
from fedloom.core.codecs.auto import chosen
from fedloom.core.config.run import Spec
from fedloom.core.errors import FedloomError, PolicyError, ProtocolError
from fedloom.core.privacy.accounting import Spend
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.core.secagg.keys import Advert, Place, check_advert
from fedloom.core.secagg.steps import ALL, MASKED, Step
from fedloom.flower.messages import Request
from fedloom.flower.resident_trainer import Resident
from fedloom.proto.messages import Answer, Assignment, Joined, RoundStatus, StepMessage, StepResult, UpdateHeader

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (1, 8)),))
BROADCAST = codec("fp32").encode(SCHEMA, SCHEMA.zeros())
DELTA = {"m.A": np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 8)}
ROLES = frozenset({Role.LORA_A})
PEERS = ("ben", "cat", "dan", "eve")
RUN = "run-1"


class Kill(BaseException):
    """The process is gone."""


def spec_of(**sections: dict[str, Any]) -> Spec:
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "secure", "rounds": 9},
        "model": {"base": "none", "labels": ("no", "yes")},
        "train": {"steps": 1, "sampling_rate": 0.1, "learning_rate": 1.0},
        "privacy": {"noise_multiplier": 1.0},
        "secure_aggregation": {"enabled": True, "threshold": 0.9},
    }
    return Spec.model_validate({name: tables.get(name, {}) | sections.get(name, {}) for name in tables | sections})


SECURE = spec_of()
OPEN = spec_of(secure_aggregation={"enabled": False})
SECRET = SECURE.secure_aggregation.integers.encode(SCHEMA, DELTA, b"", b"")


def order(round: int, upload: str) -> Assignment:
    digest = hashlib.sha256(BROADCAST).hexdigest()
    return Assignment(round, ROLES, ROLES, digest, len(BROADCAST), upload_codec=upload)


@dataclass
class Coordinator:
    """Describes the run as it likes, and keeps all that it gets."""

    spec: Spec
    run: str = RUN
    dies: bool = False
    """Whether the client is killed when it sends the first byte of an update."""
    refuses: int = 0
    """Steps of a sum that it refuses before it goes on."""
    cohort: Callable[[bytes], dict[str, bytes]] | None = None
    """Makes the cohort's keys from this client's."""
    sent: list[bytes] = field(default_factory=list)
    steps: list[StepMessage] = field(default_factory=list)

    def join(self, client: str, declared_examples: int) -> Joined:
        return Joined(self.run, 1, self.spec, SCHEMA)

    def work(self, held: str = "") -> Answer:
        return order(0, MASKED if self.spec.secure_aggregation.enabled else chosen(self.spec.wire.upload, SCHEMA))

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        return BROADCAST

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        self._maybe_die()
        self.sent.append(payload)
        return False

    def exchange(self, message: StepMessage) -> StepResult | None:
        self._maybe_die()
        self.steps.append(message)
        if self.refuses:
            self.refuses -= 1
            raise ProtocolError("this sum is over")
        if self.cohort is None or message.step is not Step.ADVERTISE:
            return None
        return StepResult(1, self.cohort(message.parts[ALL]))

    def heartbeat(self) -> RoundStatus:
        return RoundStatus(0, True, 0)

    def leave(self, reason: str, score: tuple[float, ...] = ()) -> None:
        pass

    def _maybe_die(self) -> None:
        if self.dies:
            raise Kill


@dataclass
class Trainer:
    """Always makes the same update, and charges it to a real ledger if the run is private."""

    account: Ledger
    private: bool = True
    score: tuple[float, ...] = ()
    schema: Schema = SCHEMA
    declared_examples: int = 40

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        charge = None
        if self.private:
            charge = self.account.reserve(run, assignment.round, Spend(0.1, 1.0, 1), budget=50, delta=1e-5)
        return Trained(DELTA, charge, self.score)

    def release(self, charge: int | None, digest: str) -> None:
        if charge is not None:
            self.account.release(charge, digest)

    def drop(self, why: str | None) -> bool:
        return self.account.drop(why)


@dataclass
class Site:
    """One machine with a policy that forbids as little as it can; each `start` is a new process there."""

    folder: Path
    ledger: Ledger

    def policy(self, **sections: dict[str, Any]) -> Policy:
        tables: dict[str, dict[str, Any]] = {
            "client": {"name": "ann", "state": self.folder / "ann"},
            "data": {"source": "none", "labels": ["no", "yes"], "declared_examples": 40, "held_out": 0.1},
            "privacy": {"allow_non_private": True},
            "secure_aggregation": {"peers": {name: public_text(self.key(name)) for name in PEERS}},
        }
        return Policy.model_validate({name: table | sections.get(name, {}) for name, table in tables.items()})

    def key(self, name: str) -> Any:
        return load_identity(self.folder / name)

    def start(self, coordinator: Coordinator, policy: Policy | None = None, **trainer: Any) -> Participant:
        made = Trainer(self.ledger, coordinator.spec.privacy.enabled, **trainer)
        timing = Timing(backoff_s=(0.0, 0.0))
        return Participant(coordinator, policy or self.policy(), lambda _: made, outbox=self.outbox, timing=timing)

    @property
    def outbox(self) -> Path:
        return self.folder / "ann" / "outbox"

    def finished(self, spec: Spec, policy: Policy | None = None, **trainer: Any) -> None:
        """An update is made under `spec`, and the client killed before a byte of it has left."""
        with pytest.raises(Kill):
            live(self.start(Coordinator(spec, dies=True), policy, **trainer))
        assert kept(self.outbox, RUN, "ann") is not None

    def refuses(self, coordinator: Coordinator, text: str, policy: Policy | None = None, **trainer: Any) -> None:
        """Started again it sends nothing, and has the update still for whoever keeps the promise."""
        with pytest.raises(PolicyError, match=text):
            live(self.start(coordinator, policy, **trainer))
        assert (coordinator.sent, coordinator.steps) == ([], [])
        assert kept(self.outbox, RUN, "ann") is not None

    def cohort(self, names: tuple[str, ...], spec: Spec) -> Callable[[bytes], dict[str, bytes]]:
        """Genuine peers of a genuine sum."""

        def adverts(mine: bytes) -> dict[str, bytes]:
            made = {"ann": mine}
            for name in names:
                client = self.policy().client.model_copy(update={"name": name, "state": self.folder / name})
                member = membership(self.policy().model_copy(update={"client": client}), spec, None)
                made[name] = Attempt(member, Place(RUN, 1, 0), SECRET, "ab").message.parts[ALL]
            return made

        return adverts


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Ledger(tmp_path / "ledger", "ab") as ledger:
        yield Site(tmp_path, ledger)


def test_a_coordinator_that_comes_back_without_secure_aggregation_gets_no_unmasked_update(site: Site) -> None:
    site.finished(SECURE)

    site.refuses(Coordinator(OPEN), r"describes the run otherwise .* round 1 was made, in secure_aggregation\.enabled")


def test_neither_does_it_when_the_site_no_longer_requires_secure_sums(site: Site) -> None:
    site.finished(SECURE, site.policy(secure_aggregation={"required": True, "peers": peers(site)}))

    site.refuses(Coordinator(OPEN), "secure_aggregation.enabled", site.policy())


@pytest.mark.parametrize(
    ("made", "asked", "key"),
    [
        (SECURE, spec_of(secure_aggregation={"threshold": 0.51}), "secure_aggregation.threshold"),
        (SECURE, spec_of(secure_aggregation={"max_change": 1e6}), "secure_aggregation.max_change"),
        (SECURE, spec_of(secure_aggregation={"max_clients": 1000}), "secure_aggregation.max_clients"),
        (SECURE, spec_of(run={"name": "other"}), "run.name"),
        (SECURE, spec_of(privacy={"noise_multiplier": 0.5}), "privacy.noise_multiplier"),
        (OPEN, SECURE, "secure_aggregation.enabled"),
        (OPEN, spec_of(secure_aggregation={"enabled": False}, wire={"upload": "fp16"}), "wire.upload"),
        (
            OPEN,
            spec_of(secure_aggregation={"enabled": False}, federated_evaluation={"enabled": True}),
            "federated_evaluation.enabled",
        ),
    ],
)
def test_an_update_leaves_for_the_run_as_it_was_described_or_not_at_all(
    site: Site, made: Spec, asked: Spec, key: str
) -> None:
    site.finished(made)

    site.refuses(Coordinator(asked), key)


@pytest.mark.parametrize("private_then", [True, False])
def test_privacy_is_not_taken_off_or_put_on_afterwards(site: Site, private_then: bool) -> None:
    made, asked = (spec_of(secure_aggregation={"enabled": False}, privacy={"enabled": on}) for on in (True, False))
    if not private_then:
        made, asked = asked, made
        asked = asked.model_copy(update={"privacy": SECURE.privacy})
    site.finished(made)

    site.refuses(Coordinator(asked), "privacy.enabled")


def test_figures_of_an_evaluation_leave_for_the_run_that_has_one_only(site: Site) -> None:
    site.finished(
        spec_of(secure_aggregation={"enabled": False}, federated_evaluation={"enabled": True}), score=(1.0, 2.0, 3.0)
    )

    site.refuses(Coordinator(OPEN), "federated_evaluation.enabled")


def test_an_update_that_the_first_release_has_spooled_leaves_masked_if_it_was_made_to_be(site: Site) -> None:
    site.finished(SECURE)
    forget_terms(site)

    site.refuses(Coordinator(OPEN), "secure_aggregation.enabled")
    honest = Coordinator(SECURE, dies=True)
    with pytest.raises(Kill):
        live(site.start(honest))


@pytest.mark.parametrize(
    ("made", "asked", "score", "key"),
    [
        (OPEN, SECURE, (), "secure_aggregation.enabled"),
        (
            spec_of(secure_aggregation={"enabled": False}, federated_evaluation={"enabled": True}),
            OPEN,
            (1.0, 2.0, 3.0),
            "federated_evaluation.enabled",
        ),
        (
            spec_of(secure_aggregation={"enabled": False}, privacy={"enabled": False}),
            OPEN,
            (),
            "privacy.enabled",
        ),
    ],
)
def test_an_update_that_the_first_release_has_spooled_leaves_as_its_header_says(
    site: Site, made: Spec, asked: Spec, score: tuple[float, ...], key: str
) -> None:
    site.finished(made, score=score)
    forget_terms(site)

    site.refuses(Coordinator(asked), key)


def test_what_is_promised_still_is_delivered_after_a_restart(site: Site) -> None:
    site.finished(OPEN)
    coordinator = Coordinator(OPEN)
    client = site.start(coordinator)
    client.join()

    client.step()

    assert coordinator.sent == [codec("fp32").encode(SCHEMA, DELTA)]
    assert kept(site.outbox, RUN, "ann") is None


@pytest.mark.parametrize("changed", ["spec", "run"])
def test_nor_does_it_within_one_process(site: Site, changed: str) -> None:
    """It refuses a step of the sum, and is another run when the client joins again.

    A sum of the same update under another run's name would be remembered as that run's: revealed twice, for two lists
    of survivors, whose difference is a single update.
    """
    coordinator = Coordinator(SECURE)
    client = site.start(coordinator)
    client.join()
    client.step()
    assert len(coordinator.steps) == 1
    coordinator.refuses = 1
    coordinator.spec, coordinator.run = (OPEN, RUN) if changed == "spec" else (SECURE, "run-2")

    for _ in range(5):
        with suppress(FedloomError):
            client.step()

    assert coordinator.sent == []
    mine = site.key("ann").public_key().public_bytes_raw()
    for message in coordinator.steps:
        advert = Advert.from_bytes("ann", message.parts[ALL])
        check_advert(advert, Place(RUN, 1, 0), "ann", mine)
        with pytest.raises(PolicyError):
            check_advert(advert, Place("run-2", 1, 0), "ann", mine)


def test_a_smaller_sum_than_the_site_allowed_when_it_made_the_update_is_refused(site: Site) -> None:
    site.finished(SECURE, site.policy(secure_aggregation={"min_clients": 5, "peers": peers(site)}))
    coordinator = Coordinator(SECURE, cohort=site.cohort(("ben", "cat"), SECURE))

    with pytest.raises(PolicyError, match="has 3 clients; this site's policy needs at least 5"):
        live(site.start(coordinator))

    assert [message.step for message in coordinator.steps] == [Step.ADVERTISE]


@pytest.mark.parametrize("then", ["absent", "another key"])
def test_a_peer_that_was_not_pinned_when_the_update_was_made_shares_no_sum_with_it(site: Site, then: str) -> None:
    known = peers(site)
    if then == "absent":
        del known["cat"]
    else:
        known["cat"] = public_text(load_identity(site.folder / "cat of old"))
    site.finished(SECURE, site.policy(secure_aggregation={"peers": known}))
    coordinator = Coordinator(SECURE, cohort=site.cohort(("ben", "cat"), SECURE))

    with pytest.raises(PolicyError, match="peer 'cat' is in the cohort but not in this site's policy, or was not"):
        live(site.start(coordinator))

    assert [message.step for message in coordinator.steps] == [Step.ADVERTISE]


def test_nor_does_a_coordinator_inside_flower(site: Site) -> None:
    """No secure sum exists there, so the update stays in the outbox; and then the next message says that there is none.

    Another process of the site, and the same one.
    """
    asked = Request(Joined(RUN, 1, SECURE, SCHEMA), order(0, MASKED))
    weaker = replace(asked, joined=replace(asked.joined, spec=OPEN), assignment=order(0, "fp32"))
    resident = Resident(site.policy(), lambda joined: Trainer(site.ledger), site.outbox)
    anew = Resident(site.policy(), lambda joined: Trainer(site.ledger), site.outbox)
    site.finished(SECURE)

    answers = [anew.answer(weaker, BROADCAST)]
    answers += [resident.answer(each, BROADCAST) for each in (asked, weaker, weaker)]

    assert [payload for _, payload in answers] == [b""] * 4
    assert all(reply.refusal for reply, _ in answers)


def live(client: Participant) -> None:
    """A few steps: a client that is not stopped by then will not be."""
    client.join()
    for _ in range(3):
        client.step()


def peers(site: Site) -> dict[str, str]:
    return {name: public_text(site.key(name)) for name in PEERS}


def forget_terms(site: Site) -> None:
    """As the first release has written it."""
    update = kept(site.outbox, RUN, "ann")
    assert update is not None
    keep(site.outbox, replace(update, terms=None))
    (path,) = site.outbox.glob("*.update")
    assert b"terms" not in path.read_bytes()
