"""Two sites of one name are told apart in words."""

from pathlib import Path
from typing import Any

from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.limits import MAX_CLIENTS
from fedloom.server.rounds.duplicates import Doubles
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store


def heard(*peers: str) -> list[tuple[str, str]]:
    doubles = Doubles()
    return [both for peer in peers if (both := doubles.heard("ann", peer))]


def test_who_connects_anew_is_one_and_who_takes_turns_are_two() -> None:
    assert heard("a", "a", "b", "b", "c", "d") == [], "a line that breaks again and again"
    assert heard("a", "look", "a", "look2", "a") == [], "a doctor that looks in while the client runs"
    assert heard("a", "b", "a", "b", "a", "b") == [("a", "b")], "said once"


def test_names_that_strangers_make_up_are_not_kept_for_ever() -> None:
    doubles = Doubles()
    for number in range(2 * MAX_CLIENTS):
        doubles.heard(f"name{number}", "a")

    assert len(doubles._names) == MAX_CLIENTS


def test_two_sites_of_one_name_are_named_on_the_console_and_on_record(federate: Any, tmp_path: Path) -> None:
    said: list[str] = []
    with Store(tmp_path, durable=False) as store:
        coordinator = federate(store).coordinator
        coordinator.say = said.append
        with serving(coordinator) as address:
            # A cap gives the second a connection of its own; two of one process would share theirs.
            sites = GrpcConnection(address), GrpcConnection(address, download=1 << 30)
            for site in sites:
                site.join("ann", 0)
            for _ in range(2):
                for site in sites:
                    site.heartbeat()
            for site in sites:
                site.close()
        noted = [record for record in store.audit() if record.kind == "doubled"]

    (line,) = [each for each in said if "two processes" in each]
    assert line.startswith("two processes call themselves 'ann', at 127.0.0.1:")
    assert "an invite of its own" in line
    assert [(record.client, record.detail) for record in noted] == [("ann", line)]
