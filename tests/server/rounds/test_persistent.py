"""The persistent mapping against plain dicts, one copy for each version."""

import sys
import threading

from hypothesis import given
from hypothesis import strategies as st

from fedloom.server.rounds.persistent import PersistentMap

KEYS = st.sampled_from("abcdef")
STEPS = st.lists(st.tuples(st.integers(0, 1 << 16), KEYS, st.none() | st.integers(0, 9)), max_size=80)


@given(STEPS)
def test_every_version_stays_what_a_dict_would_be(steps: list[tuple[int, str, int | None]]) -> None:
    versions: list[tuple[PersistentMap[int], dict[str, int]]] = [(PersistentMap(), {})]
    for back, key, value in steps:
        held, model = versions[-1 - back % min(3, len(versions))]  # mostly the newest, sometimes an older one
        rest = {other: each for other, each in model.items() if other != key}
        after = held.drop(key) if value is None else held.put(key, value)
        versions.append((after, rest if value is None else {**rest, key: value}))

    for held, model in versions:
        assert list(held.items()) == list(model.items())
        assert len(held) == len(model)
        assert [key in held for key in "abcdef"] == [key in model for key in "abcdef"]
        assert held == PersistentMap(model)
        assert [held.get(key, -1) for key in "abcdef"] == [model.get(key, -1) for key in "abcdef"]


def test_the_next_version_of_the_newest_copies_nothing() -> None:
    held: PersistentMap[int] = PersistentMap()
    logs = set()
    for number in range(1000):
        held = held.put(f"k{number}", number)
        logs.add(id(held._changed))

    assert len(logs) == 1


def test_what_is_put_and_dropped_for_ever_takes_no_more_room() -> None:
    held = PersistentMap({"ann": 0})
    for number in range(10_000):
        held = held.put("ben", number).drop("ben")

    assert dict(held) == {"ann": 0}
    assert len(held._changed) < 100


def test_a_reader_sees_one_version_while_another_thread_makes_more() -> None:
    held = PersistentMap({str(number): 0 for number in range(200)})
    newest, torn, done = [held], list[str](), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen = newest[0]
            values = list(seen.values())
            if len(values) != len(seen) or len(set(values)) > 2 or values != sorted(values):
                torn.append(repr(values))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        reader = threading.Thread(target=read)
        reader.start()
        for value in range(1, 40):
            for number in range(200):
                held = held.put(str(number), value)
                newest[0] = held
        done.set()
        reader.join()
    finally:
        sys.setswitchinterval(before)

    assert not torn
