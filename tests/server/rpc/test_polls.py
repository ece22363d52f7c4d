"""How the pace is steered: long polls while there is room, and beyond that a time to come back."""

import asyncio
import threading
from pathlib import Path

import pytest

from fedloom.client.policy import Policy
from fedloom.client.session.participant import Participant
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.config.run import RunConfig
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.proto.messages import Answer, Finished, Wait
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc import long_poll as polls
from fedloom.server.rpc.load_shedding import Lane
from fedloom.server.rpc.long_poll import Polls
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter
from tests.support.trainers import Steady

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (1, 8)), TensorSpec("m.B", "m", Role.LORA_B, (8, 1))))
EVERY_S = 10.0


def test_who_comes_when_too_many_wait_is_told_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polls, "_MOST_WAITING", 2)
    ready: set[str] = set()

    async def main() -> None:
        lane = Lane("test", 2, 8)
        waiting = Polls(lane, lambda *_: None, EVERY_S)

        def poll(name: str, *, may_be_sent_away: bool = True) -> "asyncio.Task[str | float]":
            def call() -> str | float:
                return name if name in ready else ""

            later = (lambda pause_s: pause_s) if may_be_sent_away else None
            return asyncio.create_task(waiting.poll((name, "run", 1), call, lambda answer: answer == "", later))

        async def held(count: int) -> None:
            while len(waiting._waiting) < count:
                await asyncio.sleep(0.001)

        first = [poll("ann"), poll("ben")]
        await held(2)
        told = [await poll(f"c{number}") for number in range(50)]
        assert all(isinstance(pause, float) and EVERY_S / 2 <= pause <= EVERY_S for pause in told)
        assert len(set(told)) == 50, "they come back at different times"
        step = poll("dan", may_be_sent_away=False)  # a step of a secure sum, of a cohort that is small
        await held(3)
        ready.update({"ann", "ben", "dan", "eve"})
        assert await poll("eve") == "eve", "who has something to do is never sent away"
        waiting.stir()
        assert await asyncio.gather(*first, step) == ["ann", "ben", "dan"]
        last = poll("fay")
        await held(1)  # there is room again
        ready.add("fay")
        waiting.stir()
        assert await last == "fay"
        waiting.close()
        lane.close()

    asyncio.run(main())


class Noting(GrpcConnection):
    """The real line, with a note of every time to come back."""

    told: list[float]

    def work(self, held: str = "") -> Answer:
        answer = super().work()
        if isinstance(answer, Wait):
            self.told.append(answer.retry_after_s)
        return answer


@pytest.mark.e2e
def test_a_run_whose_clients_are_all_told_to_come_back_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polls, "_MOST_WAITING", 0)
    lease_s, ends, told = 1.5, list[Finished](), list[float]()
    run = RunConfig.model_validate(
        {
            "run": {"name": "pace", "rounds": 2},
            "model": {"base": "none", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
            "privacy": {"enabled": False},
            "rounds": {"min_clients": 2, "lease_s": lease_s},
        }
    )

    def life(address: str, name: str) -> None:
        line = Noting(address)
        line.told = told
        policy = Policy.model_validate(
            {"client": {"name": name}, "data": {"source": "none"}, "privacy": {"allow_non_private": True}}
        )
        ends.append(Participant(line, policy, lambda _: Steady(SCHEMA, 0.0)).run(patience_s=60))
        line.close()

    with Store(tmp_path, durable=False) as store:
        coordinator = Coordinator(run, SCHEMA, FedAvg(), store, starting=starting_adapter(SCHEMA, 0))
        with serving(coordinator) as address:
            threads = [threading.Thread(target=life, args=(address, name), daemon=True) for name in ("ann", "ben")]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)

    assert [end.rounds for end in ends] == [2, 2]
    assert told
    assert all(lease_s / 6 <= pause_s <= lease_s / 3 for pause_s in told), "within its lease"
