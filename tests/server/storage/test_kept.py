"""What rounds.keep leaves in a state directory, and how it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, StoreError
from fedloom.core.schema import Tensors
from fedloom.server.build import build_strategy
from fedloom.server.storage.kept import KeptRound, kept_rounds
from fedloom.server.storage.local import Store
from fedloom.server.storage.verify import verify
from fedloom.server.validate_config import check_config

Configure = Callable[..., RunConfig]
Sent = list[dict[str, Tensors]]


def blobs(store: Store) -> set[str]:
    return {path.name for path in (store.folder / "blobs").iterdir()}


def play(federation: Any, rounds: int) -> Sent:
    """What each client sent in each of so many rounds, as numbers."""
    sent: Sent = []
    for _ in range(rounds):
        sent.append({})
        for client in ("ann", "ben"):
            header, payload = federation.update(client)
            asked, schema, *_ = federation.coordinator._history.draft(header, 0)
            sent[-1][client] = codec(asked.upload_codec).decode(schema, payload)
            federation.send(header, payload)
    return sent


def same(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def check(kept: list[KeptRound], numbers: list[int], sent: Sent) -> None:
    assert [each.number for each in kept] == numbers
    for each in kept:
        assert (each.before.round, each.after.round) == (each.number - 1, each.number)
        assert [update.client for update in each.updates] == ["ann", "ben"]
        for update in each.updates:
            assert same(update.delta, sent[each.number - 1][update.client])
            assert all(np.array_equal(update.start[name], each.before.adapter[name]) for name in update.delta)


def test_the_newest_rounds_are_there_and_give_the_states_between_them(
    federate: Callable[..., Any], store: Store, configure: Configure
) -> None:
    config = configure(5, rounds={"keep": 2}, wire={"upload": "fp16"})
    federation = federate(store, config)
    federation.begin("ann", "ben")
    sent = play(federation, 1)
    check(list(kept_rounds(store.folder, config)), [1], sent)
    sent += play(federation, 3)

    kept = list(kept_rounds(store.folder, config))

    check(kept, [3, 4], sent)
    assert same(kept[0].after.adapter, kept[1].before.adapter)
    assert same(kept[1].after.adapter, federation.coordinator.state.adapter)
    mean = {name: (sent[3]["ann"][name] + sent[3]["ben"][name]) / 2 for name in sent[3]["ann"]}
    for name, moved in mean.items():
        np.testing.assert_allclose(kept[1].after.adapter[name], kept[1].before.adapter[name] + moved, atol=1e-6)
    # Three states, two rounds of two updates, and the schema.
    assert len(blobs(store)) == 3 + 4 + 1


def test_a_coordinator_that_is_started_again_keeps_them_too(
    federate: Callable[..., Any], tmp_path: Path, configure: Configure
) -> None:
    config = configure(5, rounds={"keep": 2})
    with Store(tmp_path / "state", durable=False) as store:
        federation = federate(store, config)
        federation.begin("ann", "ben")
        sent = play(federation, 3)
    with Store(tmp_path / "state", durable=False) as store:
        federation = federate(store, config)
        check(list(kept_rounds(store.folder, config)), [2, 3], sent)
        federation.begin("ann", "ben")
        sent += play(federation, 1)
        check(list(kept_rounds(store.folder, config)), [3, 4], sent)
    verify(tmp_path / "state")
    fewer = configure(5, rounds={"keep": 1})  # not agreed with anybody: another figure from now on
    with Store(tmp_path / "state", durable=False) as store:
        federate(store, fewer)
        check(list(kept_rounds(store.folder, fewer)), [4], sent)


def test_nothing_is_kept_unless_it_is_asked_for(
    federate: Callable[..., Any], store: Store, configure: Configure
) -> None:
    federation = federate(store, configure(3))
    federation.begin("ann", "ben")
    play(federation, 2)

    assert list(kept_rounds(store.folder, configure(3))) == []
    assert len(blobs(store)) == 1


def test_a_buffered_round_has_updates_made_from_older_states(
    federate: Callable[..., Any], store: Store, configure: Configure
) -> None:
    section = {"mode": "buffered", "min_clients": 1, "clients_per_round": 1, "keep": 1}
    config = configure(4, rounds=section)
    federation = federate(store, config)
    federation.begin("ann", "ben")
    slow = federation.update("ben")
    federation.send(*federation.update("ann"))
    federation.send(*slow)

    (kept,) = kept_rounds(store.folder, config)

    assert (kept.number, [(each.client, each.staleness) for each in kept.updates]) == (2, [("ben", 1)])
    assert kept.before.round == 1
    assert not np.array_equal(kept.updates[0].start["m.B"], kept.before.adapter["m.B"])


def test_what_is_not_what_was_written_is_named(
    federate: Callable[..., Any], store: Store, configure: Configure
) -> None:
    config = configure(3, rounds={"keep": 1})
    federation = federate(store, config)
    federation.begin("ann", "ben")
    play(federation, 1)

    with pytest.raises(ConfigError, match="of another run file; give the run folder as the run left it"):
        list(kept_rounds(store.folder, configure(4, rounds={"keep": 1})))
    for name in blobs(store):
        path = store.folder / "blobs" / name
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="does not have the bytes its name promises"):
        list(kept_rounds(store.folder, config))


def test_updates_without_noise_of_whole_clients_are_not_kept(configure: Configure) -> None:
    user = {
        "enabled": True,
        "epsilon": 8.0,
        "delta": 1e-5,
        "cohort": 2,
        "noise_multiplier": 1.0,
        "max_participations": 1,
    }
    config = configure(2, rounds={"keep": 1}, user_level=user, privacy={"enabled": False})

    with pytest.raises(ConfigError, match=r"rounds.keep = 1 with user_level.enabled = true"):
        check_config(config, build_strategy(config))
