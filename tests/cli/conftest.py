"""A client's policy, the state directory of a run that has just begun, and tables as wide as a test asks."""

from pathlib import Path

import pytest

from fedloom.cli import console
from fedloom.server.rounds.state import RoundOpened, RunCreated, UpdateAccepted
from fedloom.server.storage.audit_log import AuditRecord
from fedloom.server.storage.local import Store


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of pytest-xdist has COLUMNS=80, and a console keeps what it finds when it is made: let it ask anew."""
    monkeypatch.setattr(console.out, "_width", None)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "winter" / "state"
    with Store(folder, durable=False) as store:
        store.append(RunCreated("4f" * 16, "spec", "schema", store.put_blob(b"s0")))
        store.append(RoundOpened(0, 0, store.put_blob(b"s0"), ("ann", "ben"), 60.0))
        store.append(UpdateAccepted(0, "ann", store.put_blob(b"update"), 1.0))
        store.note(AuditRecord("2026-01-01T00:00:00+00:00", 1, "joined", "ann", "said hello"))
    return folder


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "client.toml"
    path.write_text(
        '[client]\nname = "a"\nstate = "mine"\n[data]\nsource = "x.csv"\n[privacy]\nepsilon = 3.0\ndelta = 1e-6\n'
    )
    return path
