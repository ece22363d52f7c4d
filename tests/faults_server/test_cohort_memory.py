"""The coordinator's memory does not grow with its cohort: updates wait on disk, not in memory.

`FEDLOOM_PROVE=1` compares 200 clients with 10.
"""

import os
from pathlib import Path

import pytest

from fedloom.proto.messages import Assignment
from tests.faults_server.serving import schema_of, served, update

# Four megabytes an update: ten of them fill what the coordinator keeps for speed, 200 could not be overlooked.
WIDTH = 1 << 18
MANY = 200 if os.environ.get("FEDLOOM_PROVE") == "1" else 60


def peak_mib(folder: Path, clients: int) -> float:
    """Most memory that a coordinator process holds in a round of so many clients."""
    config = {"run": {"name": "crowd", "rounds": 1}, "rounds": {"min_clients": clients, "lease_s": 3600.0}}
    names = [f"client-{number}" for number in range(clients)]
    with served(folder, *names, config=config, width=WIDTH) as crowd:
        for client in crowd:
            client.join()
        asked = [client.ask() for client in crowd]
        for client, each in zip(crowd, asked, strict=True):
            answer = client.answer(each)
            assert isinstance(answer, Assignment)
            assert client.submit(*update(client.name, answer, schema=schema_of(WIDTH))) is False
        crowd[0].final()
        return crowd[0].peak_mib()


@pytest.mark.e2e
@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_many_clients_take_hardly_more_memory_than_ten(tmp_path: Path) -> None:
    few, many = peak_mib(tmp_path / "few", 10), peak_mib(tmp_path / "many", MANY)

    print(f"peak of 10 clients {few:.0f} MiB, of {MANY} clients {many:.0f} MiB")
    assert many < 1.2 * few
