"""A live coordinator with its dashboard, for tests that only look."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dashboard.stage import Stage, stage


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Stage]:
    """No client has come yet."""
    with stage(tmp_path / "runs") as made:
        yield made
