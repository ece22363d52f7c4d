"""The identity key, and the memory of what was revealed: both on a client's disk."""

import os
from pathlib import Path

import pytest

from fedloom.client.secagg.identity_key import load_identity, public_text
from fedloom.client.secagg.unmasked import remember
from fedloom.core.errors import ConfigError, LedgerError, PolicyError

REST = frozenset({"ann", "ben", "cat", "dan"})


def test_an_identity_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    first = load_identity(tmp_path / "state")

    assert public_text(load_identity(tmp_path / "state")) == public_text(first)
    assert public_text(load_identity(tmp_path / "other")) != public_text(first)
    (path,) = (tmp_path / "state").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_identity_that_others_can_read_is_refused(tmp_path: Path) -> None:
    load_identity(tmp_path)
    os.chmod(tmp_path / "identity.key", 0o640)

    with pytest.raises(ConfigError, match="chmod 600"):
        load_identity(tmp_path)


@pytest.mark.parametrize("text", ["", "00", "zz" * 32])
def test_a_damaged_identity_is_refused(tmp_path: Path, text: str) -> None:
    load_identity(tmp_path)
    (tmp_path / "identity.key").write_text(text)

    with pytest.raises(ConfigError, match="holds no identity key"):
        load_identity(tmp_path)


def test_what_was_revealed_is_remembered_by_round_and_update(tmp_path: Path) -> None:
    remember(tmp_path, "run", 3, "ab", REST)
    remember(tmp_path, "run", 3, "ab", REST)
    remember(tmp_path, "../run", 0, "ab", REST)

    for round, update, survivors in ((3, "cd", REST), (3, "ab", REST | {"eve"}), (2, "ab", REST)):
        with pytest.raises(PolicyError, match="round 4 was"):
            remember(tmp_path, "run", round, update, survivors)
    remember(tmp_path, "run", 4, "cd", REST | {"eve"})
    assert len(list((tmp_path / "revealed").iterdir())) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "revealed"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '["x"]', "3"])
def test_a_damaged_memory_is_refused(tmp_path: Path, text: str) -> None:
    remember(tmp_path, "run", 3, "ab", REST)
    (path,) = (tmp_path / "revealed").iterdir()
    path.write_text(text)

    with pytest.raises(LedgerError, match="cannot be read"):
        remember(tmp_path, "run", 4, "ab", REST)
