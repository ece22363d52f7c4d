"""A run without privacy, and a ledger of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.core.config.run import Spec
from tests.client.rounds import changed


@pytest.fixture
def plain(spec: Spec) -> Spec:
    """The same run without privacy."""
    return changed(spec, privacy={"enabled": False})


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger", "sha256:" + "0" * 64) as opened:
        yield opened
