import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.core.codecs import codec
from fedloom.core.errors import ConfigError, ProtocolError
from fedloom.proto.messages import Finished, UpdateHeader, Wait
from fedloom.server.storage.local import Store
from fedloom.strategies.api import State


def test_a_run_from_join_to_the_final_adapter(federate: Any, store: Store) -> None:
    federation = federate(store)
    commits: list[tuple[int, State]] = []
    woken: list[int] = []
    federation.coordinator.on_commit = lambda rounds, state: commits.append((rounds, state))
    federation.coordinator.wake = lambda: woken.append(federation.coordinator.progress.round)
    start = federation.adapter()

    federation.begin("ann", "ben")
    for _ in range(2):
        assert not federation.send(*federation.update("ann", 1.0))
        assert federation.work("ann") == Wait(0.0)
        assert not federation.send(*federation.update("ben", 3.0))

    final = federation.work("ann")
    assert isinstance(final, Finished)
    payload = federation.coordinator.blob("ann", final.digest, *federation.runs["ann"])
    assert hashlib.sha256(payload).hexdigest() == final.digest
    tensors = codec(final.codec).decode(federation.coordinator.state.schema, payload)
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor.ravel(), np.array(start[name]) + 4.0, rtol=1e-6)
    assert [rounds for rounds, _ in commits] == [1, 2]
    assert commits[-1][1] is federation.coordinator.state
    assert woken == [0, 1, 2]
    assert federation.coordinator.finished


def test_a_committed_round_leaves_only_its_state_on_the_disk(federate: Any, store: Store) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    federation.send(*federation.update("ann", 1.0))
    federation.send(*federation.update("ben", 3.0))

    (blob,) = (store.folder / "blobs").iterdir()
    assert store.get_blob(blob.name)


def test_weights_follow_the_declared_examples(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, configure(1, strategy={"weighting": "examples"}))
    start = federation.adapter()
    federation.join("ann", examples=300)
    federation.join("ben", examples=100)
    federation.work("ann")

    federation.send(*federation.update("ben", 1.0))
    federation.send(*federation.update("ann", 5.0))

    np.testing.assert_allclose(federation.adapter()["head"], np.array(start["head"]) + 4.0, rtol=1e-6)


def test_a_client_that_declares_no_examples_may_look_but_gets_no_work(
    federate: Any, configure: Any, store: Store
) -> None:
    federation = federate(store, configure(strategy={"weighting": "examples"}))
    federation.join("ann")

    with pytest.raises(ConfigError, match="declares no examples"):
        federation.work("ann")
    assert federation.coordinator.progress.live == ()
    federation.coordinator.leave("ann", "only looked", *federation.runs["ann"])


def test_a_client_that_declares_more_examples_than_anybody_has_is_refused(federate: Any, store: Store) -> None:
    with pytest.raises(ConfigError, match="at most"):
        federate(store).join("ann", examples=10**12 + 1)


@pytest.mark.parametrize("name", ["", "a" * 257, "two words", "tab\t", "\x1b[31m"])
def test_a_name_that_is_none_is_refused(federate: Any, store: Store, name: str) -> None:
    with pytest.raises(ProtocolError, match="client name"):
        federate(store).join(name)


def test_another_protocol_version_is_refused(federate: Any, store: Store) -> None:
    with pytest.raises(ProtocolError, match="protocol 2"):
        federate(store).coordinator.join("ann", 2, 0)


def test_a_cohort_smaller_than_the_minimum_is_refused(federate: Any, configure: Any, store: Store) -> None:
    with pytest.raises(ConfigError, match="clients_per_round = 1"):
        federate(store, configure(rounds={"clients_per_round": 1}))


def test_a_strategy_that_trains_a_frozen_head_is_refused(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, configure(model={"head": "frozen"}))

    with pytest.raises(ConfigError, match="head"):
        federation.begin("ann", "ben")


def test_arrival_order_does_not_matter(federate: Any, configure: Any, tmp_path: Path) -> None:
    results = []
    for number, order in enumerate(itertools.permutations(["ann", "ben", "cat"])):
        with Store(tmp_path / str(number), durable=False) as store:
            federation = federate(store, configure(1), expect=3)
            federation.begin(*order)
            for client in order:
                federation.send(*federation.update(client))
            results.append(federation.adapter())

    assert all(result == results[0] for result in results)


def test_the_same_update_twice_is_taken_once(federate: Any, store: Store) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    update = federation.update("ann")

    assert federation.send(*update) is False
    assert federation.coordinator.check_header(update[0], *federation.runs["ann"]) is None
    assert federation.send(*update) is True
    federation.send(*federation.update("ben"))
    assert federation.coordinator.progress.round == 1
    assert federation.send(*update) is True


def test_another_update_for_the_same_round_is_refused(federate: Any, store: Store) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    first, second = federation.update("ann", 1.0), federation.update("ann", 2.0)
    federation.send(*first)

    with pytest.raises(ProtocolError, match="already sent another update"):
        federation.send(*second)
    federation.send(*federation.update("ben"))
    with pytest.raises(ProtocolError, match="already sent another update"):
        federation.send(*second)


def changed(header: UpdateHeader, **changes: object) -> UpdateHeader:
    return replace(header, **changes)  # type: ignore[arg-type]  # the table below names real fields


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"round": 1}, "is for round 2, but round 1 is open"),
        ({"round": 2**32 - 1}, "but round 1 is open"),
        ({"schema_digest": "ab" * 32}, "exactly the trained roles"),
        ({"codec": "fp16"}, "takes 'fp32'"),
        ({"payload_bytes": 0}, "announces 0 bytes"),
        ({"payload_bytes": 2**32}, "announces 4294967296 bytes"),
    ],
)
def test_a_header_that_does_not_fit_is_refused_before_its_payload(
    federate: Any, store: Store, changes: dict[str, object], text: str
) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    header, _ = federation.update("ann")

    with pytest.raises(ProtocolError, match=text):
        federation.coordinator.check_header(changed(header, **changes), *federation.runs["ann"])


@pytest.mark.parametrize("spoil", [lambda p: p[:-1], lambda p: p + b"\0", lambda p: b""])
def test_a_payload_of_another_length_is_refused(federate: Any, store: Store, spoil: Callable[[bytes], bytes]) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    header, payload = federation.update("ann")

    with pytest.raises(ProtocolError, match="its header and the schema say"):
        federation.send(header, spoil(payload))


def test_a_payload_with_another_digest_is_refused_and_may_be_sent_again(federate: Any, store: Store) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    header, payload = federation.update("ann")

    with pytest.raises(ProtocolError, match="digest"):
        federation.send(header, payload[:-1] + bytes([payload[-1] ^ 1]))
    assert federation.send(header, payload) is False


def test_messages_of_another_run_epoch_or_client_are_refused(federate: Any, store: Store) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    run, epoch = federation.runs["ann"]
    header, payload = federation.update("ann")

    with pytest.raises(ProtocolError, match="is not the one served here"):
        federation.coordinator.work("ann", "other", epoch)
    with pytest.raises(ProtocolError, match="epoch 0"):
        federation.coordinator.submit(header, payload, run, epoch - 1)
    with pytest.raises(ProtocolError, match="'eve' is not known"):
        federation.coordinator.heartbeat("eve", run, epoch)
    with pytest.raises(ProtocolError, match="'eve' is not known"):
        federation.coordinator.check_header(replace(header, client="eve"), run, epoch)


def test_a_client_outside_the_cohort_gets_nothing(federate: Any, store: Store) -> None:
    federation = federate(store)
    federation.begin("ann", "ben", "eve")
    assignment = federation.assignment("ann")
    header, _ = federation.update("ann")

    assert federation.work("eve") == Wait(0.0)
    with pytest.raises(ProtocolError, match="may not fetch"):
        federation.coordinator.blob("eve", assignment.broadcast_digest, *federation.runs["eve"])
    with pytest.raises(ProtocolError, match="not asked to train"):
        federation.coordinator.check_header(replace(header, client="eve"), *federation.runs["eve"])


def test_a_blob_is_fetched_by_its_digest_and_offset_only(federate: Any, store: Store) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    assignment = federation.assignment("ann")
    at = assignment.broadcast_digest

    federation.coordinator.blob("ann", at, *federation.runs["ann"], 60)
    with pytest.raises(ProtocolError, match="offset"):
        federation.coordinator.blob("ann", at, *federation.runs["ann"], assignment.broadcast_bytes + 1)
    with pytest.raises(ProtocolError, match="may not fetch"):
        federation.coordinator.blob("ann", "ab" * 32, *federation.runs["ann"])

    assert federation.coordinator.progress.bytes_by_client["ann"] == (assignment.broadcast_bytes - 60, 0)
