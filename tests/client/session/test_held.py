"""The adapter that a client holds between rounds, alone and beside others of its process."""

import gc
from weakref import WeakValueDictionary

import numpy as np
import pytest

from fedloom.client.session.api import RoundCancelled
from fedloom.client.session.held import HeldAdapter, Leg, Shared
from fedloom.core.codecs.changes import held_digest
from fedloom.core.schema import Array, Tensors
from fedloom.proto.messages import Assignment

VALUES = np.arange(3, dtype=np.float32)


def asked(adapter: str) -> Assignment:
    """An assignment to train from the adapter with this digest."""
    everything = frozenset({"A"})
    return Assignment(0, everything, everything, "0" * 64, VALUES.nbytes, adapter=adapter)


def leg(read: list[bytes]) -> Leg:
    """A payload that holds one tensor, whole."""

    def decode(before: Tensors, payload: bytes) -> dict[str, Array]:
        read.append(payload)
        return {"w": np.frombuffer(payload, np.float32)}

    return Leg("payload", 12, decode)


def test_clients_of_one_process_hold_one_copy_that_is_decoded_once() -> None:
    shared: Shared = WeakValueDictionary()
    clients, read, fetched = [HeldAdapter(shared), HeldAdapter(shared)], list[bytes](), list[str]()

    def fetch(digest: str, size: int) -> bytes:
        fetched.append(digest)
        return VALUES.tobytes()

    digest = held_digest({"w": VALUES})
    found = [client.follow(asked(digest), [leg(read)], fetch) for client in clients]
    np.testing.assert_array_equal(found[0]["w"], VALUES)
    assert found[1] is found[0]
    assert len(read) == 1
    assert fetched == ["payload", "payload"]  # each has asked for its own, as over a socket
    assert [client.digest for client in clients] == [digest, digest]


def test_what_no_client_holds_any_more_is_gone() -> None:
    shared: Shared = WeakValueDictionary()
    client = HeldAdapter(shared)
    for step in range(3):
        value = VALUES + step
        client.follow(asked(held_digest({"w": value})), [leg([])], lambda *_, value=value: value.tobytes())
    gc.collect()
    assert list(shared) == [client.digest]


def test_another_adapter_than_the_one_named_is_neither_held_nor_shared() -> None:
    shared: Shared = WeakValueDictionary()
    client = HeldAdapter(shared)
    with pytest.raises(RoundCancelled, match="fetched whole"):
        client.follow(asked("0" * 64), [leg([])], lambda *_: VALUES.tobytes())
    assert client.digest == ""
    assert not shared


def test_clients_of_different_processes_share_nothing() -> None:
    one, other, read = HeldAdapter(), HeldAdapter(), list[bytes]()
    for client in (one, other):
        client.follow(asked(held_digest({"w": VALUES})), [leg(read)], lambda *_: VALUES.tobytes())
    assert len(read) == 2
