"""What a real client asks of the operating system, in which order: nothing leaves before it is on disk."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedloom.core.config.run import RunConfig
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (1, 8)), TensorSpec("m.B", "m", Role.LORA_B, (8, 1))))
CONFIG = RunConfig.model_validate(
    {
        "run": {"name": "traced", "rounds": 1},
        "model": {"base": "none", "labels": ["a", "b"]},
        "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
        "privacy": {"enabled": False},
        "rounds": {"min_clients": 1},
    }
)
MARK = "UPDATE!!"

# A client whose update is a text that can be found among the bytes of a system call. It charges a ledger as a private
# one does; what its round trains is of no interest here.
CLIENT = """
import sys
from pathlib import Path
import numpy as np
from fedloom.client.policy import Policy
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.client.session.participant import Participant
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.api import Trained
from fedloom.core.privacy.accounting import Spend

class Marked:
    declared_examples = 1

    def __init__(self, ledger, schema):
        self.ledger, self.schema, self.release, self.drop = ledger, schema, ledger.release, ledger.drop

    def train(self, run, assignment, broadcast, check_cancelled):
        charge = self.ledger.reserve(run, assignment.round, Spend(1.0, 9.0, 1), budget=9.0, delta=1e-5)
        values = np.frombuffer(sys.argv[3].encode() * 4, np.float32)
        return Trained({spec.name: values.reshape(spec.shape) for spec in self.schema.tensors}, charge)

folder = Path(sys.argv[2])
policy = Policy.model_validate(
    {"client": {"name": "a"}, "data": {"source": "none"}, "privacy": {"allow_non_private": True}}
)
with Ledger(folder / "ledger", "ab", anchors=folder / "anchors") as ledger:
    connection = GrpcConnection(sys.argv[1])
    Participant(connection, policy, lambda joined: Marked(ledger, joined.schema), outbox=folder / "outbox").run()
"""


def traced(folder: Path, trace: Path) -> list[str]:
    """System calls of a client of one round, in their order."""
    with Store(folder / "server", durable=False) as store:
        coordinator = Coordinator(CONFIG, SCHEMA, FedAvg(), store, starting=starting_adapter(SCHEMA, 1), expect=1)
        with serving(coordinator, "127.0.0.1:0") as address:
            calls = "mkdir,fsync,fdatasync,rename,sendmsg,sendto,write,writev"
            command = ["strace", "-f", "-yy", "-s", "4096", "-o", str(trace), "-e", f"trace={calls}"]
            command += [sys.executable, "-c", CLIENT, address, str(folder / "client"), MARK]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return trace.read_text(errors="replace").splitlines()


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (apt-get install strace)")
def test_every_write_is_synced_before_the_first_byte_of_the_update_leaves(tmp_path: Path) -> None:
    calls = traced(tmp_path, tmp_path / "trace")
    outbox, anchors, ledger = (f"{tmp_path}/client/{name}" for name in ("outbox", "anchors", "ledger"))

    sends = [i for i, call in enumerate(calls) if MARK in call and re.search(r"(send\w+|writev?)\(\d+<TCP", call)]
    before = calls[: sends[0]]

    def all_of(pattern: str) -> list[int]:
        return [i for i, call in enumerate(before) if re.search(pattern, call)]

    last = [
        all_of(pattern)[-1]
        for pattern in (
            rf"write\(\d+<{outbox}/\w+\.update\.tmp>.*{MARK}",
            rf"fsync\(\d+<{outbox}/\w+\.update\.tmp>",
            rf"rename\(.*{outbox}/\w+\.update\"",
            rf"fsync\(\d+<{outbox}>",
            rf"(fsync|fdatasync)\(\d+<{ledger}/ab\.ledger-wal>",
            rf"fsync\(\d+<{anchors}/\w+\.anchor\.tmp>",
            rf"rename\(.*{anchors}/\w+\.anchor\"",
            rf"fsync\(\d+<{anchors}>",
        )
    ]
    assert last == sorted(last)
    # The names of the folders too, or all of it is lost with them.
    for folder in (outbox, anchors, ledger):
        (made,) = all_of(rf"mkdir\(\"{folder}\".* = 0")
        assert any(made < synced for synced in all_of(rf"fsync\(\d+<{tmp_path}/client>"))
    # Opened, charged, released: each is synced, in the ledger and in the anchor.
    assert len(all_of(rf"(fsync|fdatasync)\(\d+<{ledger}/ab\.ledger-wal>")) >= 3
    assert len(all_of(rf"fsync\(\d+<{anchors}>")) == 3
