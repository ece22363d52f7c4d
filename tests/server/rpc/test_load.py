"""What is refused for being too much, and what those who are refused are told."""

import asyncio
import threading
from itertools import pairwise

import pytest

from fedloom.core.errors import Overloaded
from fedloom.server.rpc import load_shedding as load
from fedloom.server.rpc.load_shedding import CLIENT_BURST, CLIENT_CALLS, CLIENT_CALLS_PER_S, Clients, Lane


def test_one_client_makes_so_many_calls_at_a_time_and_others_are_not_touched() -> None:
    clients = Clients(clock=lambda: 0.0)
    under_way = [clients.call("ann") for _ in range(CLIENT_CALLS)]
    for call in under_way:
        call.__enter__()

    with pytest.raises(Overloaded, match=f"{CLIENT_CALLS} calls of this client"), clients.call("ann"):
        pytest.fail("it is let in")
    with clients.call("ben"):
        pass
    under_way[0].__exit__(None, None, None)
    with clients.call("ann"):
        pass


def test_one_client_makes_so_many_calls_a_second_after_its_burst() -> None:
    now_s = 0.0
    clients = Clients(clock=lambda: now_s)

    told: set[float] = set()

    def made(tries: int) -> int:
        done = 0
        for _ in range(tries):
            try:
                with clients.call("ann"):
                    done += 1
            except Overloaded as error:
                told.add(error.retry_after_s)
        return done

    assert made(1000) == CLIENT_BURST
    now_s = 0.5
    assert made(1000) == CLIENT_CALLS_PER_S / 2
    now_s = 1000.0
    assert made(1000) == CLIENT_BURST
    assert told == {1.0}


def test_made_up_names_cost_bounded_memory_and_shut_nobody_out_who_is_calling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_MOST_KNOWN", 10)
    now_s = 0.0
    clients = Clients(clock=lambda: now_s)
    with clients.call("ann"):
        for number in range(9):
            with clients.call(f"{number} {'x' * 100_000}"):
                pass
        with pytest.raises(Overloaded, match="10 clients are calling"):
            clients.call("one more").__enter__()
        assert sum(len(name) for name in clients._known) < 10 * 300
        with clients.call("ann"):
            pass
        now_s = 60.0  # those who asked a minute ago and wait for nothing are forgotten
        with clients.call("ben"):
            pass
        assert set(clients._known) == {"ann", "ben"}


def crowd(refused: int, waiting: int = 2) -> list[float]:
    """The times told to so many calls, made while as many as fit are held up."""

    async def main() -> list[float]:
        lane, gate = Lane("test", 1, waiting), threading.Event()
        held = [asyncio.create_task(lane.run(gate.wait)) for _ in range(1 + waiting)]
        await asyncio.sleep(0)
        told = []
        for _ in range(refused):
            with pytest.raises(Overloaded, match="too much to do") as caught:
                await lane.run(gate.wait)
            told.append(caught.value.retry_after_s)
        taken = asyncio.create_task(lane.run(lambda: True, always=True))  # the coordinator's own work
        gate.set()
        assert await asyncio.gather(*held, taken) == [True] * (2 + waiting)
        assert await lane.run(lambda: 7) == 7
        lane.close()
        return told

    return asyncio.run(main())


def test_what_does_not_fit_is_refused_and_told_different_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_START_S", 0.05)
    told = crowd(100)

    assert told[0] == pytest.approx(0.1 + 3 * 0.05 + 0.05, abs=0.02)
    assert all(later > sooner + 0.02 for sooner, later in pairwise(told))


def test_nobody_is_told_to_stay_away_for_longer_than_a_third_of_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_START_S", 1.0)
    told = crowd(100)

    assert max(told) <= 10.0
    late = told[20:]
    assert len(set(late)) == len(late)
    assert min(late) >= 5.0


def test_a_failing_call_fails_its_caller_and_makes_room() -> None:
    def fail() -> None:
        raise ValueError("no")

    async def main() -> None:
        lane = Lane("test", 1, 0)
        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                await lane.run(fail)
        lane.close()

    asyncio.run(main())
