import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TIMEOUT_S = 30.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    program = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        from fedloom.core.config.run import RunConfig
        from fedloom.core.schema import Role, Schema, TensorSpec
        from fedloom.server.coordinator import Coordinator
        from fedloom.server.rpc.server import serve
        from fedloom.server.storage.local import Store
        from fedloom.strategies.fedavg import FedAvg

        schema = Schema((TensorSpec("h", "h", Role.HEAD, (2, 2)),))
        run = RunConfig.model_validate({
            "run": {"name": "t", "rounds": 1}, "model": {"base": "b", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
        })
        class Bias(FedAvg):
            def _trained(self, schema): return schema
        with Store(Path(sys.argv[1])) as store:
            coordinator = Coordinator(run, schema, Bias(), store, starting=schema.zeros())
            asyncio.run(serve(coordinator, "127.0.0.1:0", ready=lambda address: print(address, flush=True)))
        print("closed", flush=True)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    with process, process.stdout as out:
        host, _, port = out.readline().strip().rpartition(":")
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S).close()

        process.send_signal(number)

        assert out.read() == "closed\n"
        assert process.wait(TIMEOUT_S) == 0
