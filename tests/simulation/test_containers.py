"""Seats of a federation of containers: never two of one, and everybody comes back to their own."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from docker import client
from docker.coordinator import OVER, SLOTS, close, offer, settled
from fedloom.client.policy import load_policy
from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.accounting import Spend, epsilon
from fedloom.core.security.certificates import Token
from fedloom.server.auth.ca import Authority
from fedloom.server.rounds.state import AdapterCommitted, RoundClosed, RoundOpened, RunCreated, RunEnded, UpdateAccepted
from fedloom.server.storage.local import Store
from fedloom.simulation.containers import SPARE_ROUNDS, furnish
from fedloom.simulation.federation import build, completed
from fedloom.simulation.slots import take_seat
from tests.support.cuda import pretend_cuda

NAMES = ("client-0", "client-1", "client-2")
WORDS = ("good", "bad", "fine", "awful", "great", "poor", "happy", "sad")

TAKE = """
import sys
from pathlib import Path
from fedloom.simulation.slots import take_seat
print(take_seat(Path(sys.argv[1]), sys.argv[3:], sys.argv[2]), flush=True)
sys.stdin.read()
"""


class Container:
    """A process that takes a slot and keeps it until it is killed."""

    def __init__(self, folder: Path, holder: str) -> None:
        command = [sys.executable, "-c", TAKE, str(folder), holder, *NAMES]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @property
    def slot(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_each_container_has_a_seat_of_its_own_and_comes_back_to_it(tmp_path: Path) -> None:
    containers = {holder: Container(tmp_path, holder) for holder in "abcd"}  # at once, and one too many
    slots = {holder: container.slot for holder, container in containers.items()}
    try:
        assert sorted(slots.values()) == sorted(("None", *NAMES))

        (left_out,) = (holder for holder, slot in slots.items() if slot == "None")
        sitting = [holder for holder in slots if holder != left_out]
        for holder in sitting:
            containers[holder].kill()
        for holder in reversed(sitting):
            containers[holder] = Container(tmp_path, holder)
            assert containers[holder].slot == slots[holder]
    finally:
        for container in containers.values():
            container.kill()


def test_a_new_container_takes_a_seat_nobody_had_before_one_that_was_left(tmp_path: Path) -> None:
    for index, holder in enumerate("ab"):
        (tmp_path / NAMES[index]).mkdir()
        (tmp_path / NAMES[index] / "holder").write_text(holder)

    assert take_seat(tmp_path, NAMES, "new") == "client-2"
    assert take_seat(tmp_path, NAMES, "newer") == "client-0"


def test_a_seat_is_kept_by_what_the_process_becomes(tmp_path: Path) -> None:
    assert take_seat(tmp_path, NAMES[:1], "a") == "client-0"
    with pytest.raises(BlockingIOError), (tmp_path / "client-0" / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (held,) = (
        int(handle) for handle in os.listdir("/proc/self/fd") if _points_to(handle, tmp_path / "client-0" / "lock")
    )
    assert os.get_inheritable(held)


def _points_to(handle: str, path: Path) -> bool:
    try:
        return Path(os.readlink(f"/proc/self/fd/{handle}")) == path
    except OSError:  # the one that lists the folder is closed by now
        return False


@pytest.fixture
def run(tmp_path: Path, tiny_base: Path) -> Path:
    """A run file of a private run with a folder of data."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 60), ("test", 8)):
        rows = [{"text": f"{WORDS[i % 8]} film {i}", "label": ("no", "yes")[i % 2]} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
        run = {{ name = "tiny", rounds = 3, seed = 4 }}
        model = {{ base = "{tiny_base}", labels = ["no", "yes"] }}
        adapter = {{ rank = 4, alpha = 8 }}
        train = {{ steps = 2, sampling_rate = 0.2, learning_rate = 0.1 }}
        privacy = {{ epsilon = 8.0, delta = 1e-4 }}
        rounds = {{ min_clients = 4 }}
        data = {{ source = "{folder}", clients = 4, partition = "dirichlet", max_examples = 50 }}
        """
    )
    return path


def test_a_seat_has_what_a_simulation_gives_the_client(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_run(run)
    federation = build(completed(config), tmp_path / "simulated")
    pretend_cuda(monkeypatch, 16 << 30)

    texts: list[str] = []
    for name, rows in federation.clients.items():
        policy = load_policy(furnish(config, name, tmp_path / name, device="cuda"))

        lines = Path(policy.data.source).read_text().splitlines()
        assert tuple(json.loads(line)["text"] for line in lines) == rows.texts
        texts += rows.texts
        assert (policy.client.name, policy.client.state, policy.compute.device) == (name, tmp_path / name, "cuda")
        assert 3 << 10 < (policy.compute.memory_mib or 0) < 4 << 10  # four share sixteen GiB
        assert policy.client.anchors == tmp_path / name / "ledger"
        theirs = federation.policies[name]
        assert policy.model == theirs.model
        assert policy.limits == theirs.limits
        assert policy.data.declared_examples == theirs.data.declared_examples
    assert len(set(texts)) == len(texts) == 50


def test_a_seat_pays_for_a_few_rounds_that_are_lost(run: Path, tmp_path: Path) -> None:
    config = load_run(run)

    policy = load_policy(furnish(config, "client-0", tmp_path / "client-0"))

    each = Spend(0.2, policy.privacy.min_noise_multiplier, 2)
    costs = [epsilon([each] * rounds, 1e-4) for rounds in (3, 3 + SPARE_ROUNDS, 4 + SPARE_ROUNDS)]
    assert costs[0] <= 8.0 < costs[1] <= policy.privacy.epsilon < costs[2]


def test_a_name_that_is_no_seat_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no client 'client-9' among 4; they are client-0, client-1, client-2"):
        furnish(load_run(run), "client-9", tmp_path / "client-9")


def _offer(run: Path, folder: Path, clients: int, *overrides: str) -> RunConfig:
    offer(run, overrides, folder / "shared", folder / "certs", lambda: clients)
    return load_run(folder / "shared" / "run.toml")


def test_as_many_seats_are_offered_as_there_are_clients(run: Path, tmp_path: Path) -> None:
    config = _offer(run, tmp_path, 11, "run.rounds=7")

    names = json.loads((tmp_path / "shared" / SLOTS).read_bytes())
    assert names == [f"client-{index:02d}" for index in range(11)]
    for name in names:
        token = Token.from_text((tmp_path / "shared" / f"{name}.token").read_text())
        assert token.invite.certificate.subject.rfc4514_string() == f"CN={name}"
        furnish(config, name, tmp_path / name)
    assert config.data is not None
    assert (config.run.rounds, config.data.clients, config.rounds.min_clients) == (7, 11, 4)
    assert not {path.name for path in (tmp_path / "shared").iterdir()} & {"authority.pem", "server.pem"}


def test_rounds_do_not_wait_for_more_clients_than_there_are(run: Path, tmp_path: Path) -> None:
    assert _offer(run, tmp_path, 2).rounds.min_clients == 2


def test_what_was_offered_stays(run: Path, tmp_path: Path) -> None:
    _offer(run, tmp_path, 3)
    (tmp_path / "shared" / "client-1.token").unlink()  # used
    before = {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()}

    _offer(run, tmp_path, 5, "run.rounds=9")

    assert {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()} == before


def test_an_offer_that_was_cut_off_is_made_again_by_the_same_authority(run: Path, tmp_path: Path) -> None:
    _offer(run, tmp_path, 3)
    (tmp_path / "shared" / SLOTS).unlink()

    _offer(run, tmp_path, 3)

    authority = Authority(tmp_path / "certs")
    try:
        token = Token.from_text((tmp_path / "shared" / "client-1.token").read_text())
        token.invite.certificate.verify_directly_issued_by(token.ca)
        assert {entry.identity.name for entry in authority.identities.entries()} == set(NAMES)
    finally:
        authority.close()


@pytest.mark.parametrize(
    ("override", "message"),
    [("secure_aggregation.enabled=true", "pinned each other's keys"), ("run.rounds=0", "rounds")],
)
def test_a_run_that_containers_cannot_do_is_refused_before_anything_is_made(
    run: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _offer(run, tmp_path, 3, override)

    assert not (tmp_path / "shared").exists()
    assert not (tmp_path / "certs").exists()


def test_clients_are_counted_once_no_more_come() -> None:
    seen = iter([*[0] * 12, 1, 2, 4, *[3] * 9, *[4] * 10, 9])

    assert settled(lambda: next(seen), lambda: None) == 4
    assert next(seen) == 9


def test_the_end_of_a_run_is_marked_and_a_stop_is_not(run: Path, tmp_path: Path) -> None:
    config, shared = _offer(run, tmp_path, 2), tmp_path / "shared"
    close(shared, tmp_path / "state")  # it never came to be
    with Store(tmp_path / "state") as store:
        store.append(RunCreated("r", "{}", "{}", "s"))
        store.append(RoundOpened(0, 0, "s", ("client-0", "client-1"), 60.0))
        close(shared, tmp_path / "state")
        assert not (shared / OVER).exists()
        for event in (
            UpdateAccepted(0, "client-0", "d", 1.0),
            RoundClosed(0, ("client-0",), "deadline"),
            AdapterCommitted(0, "t"),
            RunEnded(1, "told"),
        ):
            store.append(event)

    close(shared, tmp_path / "state")
    assert (shared / OVER).exists()
    assert config.run.rounds > 1


def test_a_client_that_comes_back_when_the_run_is_over_ends_and_nobody_starts_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / SLOTS).write_text(json.dumps(NAMES))
    (shared / OVER).touch()
    for name, value in {"SHARED": shared, "HOME": tmp_path / "home", "SERVER": "127.0.0.1:1"}.items():
        monkeypatch.setenv(f"FEDLOOM_{name}", str(value))

    client.main()  # with exit status 0, after which the engine leaves it alone

    assert "this run is over" in capsys.readouterr().out
    # One that was loading its model meanwhile waits for a coordinator that is gone.
    statuses: list[int] = []
    client.until_over(shared, "client-1", statuses.append, 0.0)
    assert statuses == [0]
