"""`fedloom certs` and `fedloom operate`, around a coordinator on a real socket."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import FedloomError
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (2, 3)), TensorSpec("m.B", "m", Role.LORA_B, (3, 2))))
CONFIG = RunConfig.model_validate(
    {
        "run": {"name": "trial", "rounds": 1},
        "model": {"base": "tiny", "labels": ["no", "yes"]},
        "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1},
    }
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a command is typed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(*arguments: str, given: str | None = None) -> str:
    done = CliRunner().invoke(app, arguments, input=given)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def refused(*arguments: str, given: str | None = None) -> str:
    done = CliRunner().invoke(app, arguments, input=given)
    assert isinstance(done.exception, FedloomError), done.output
    return str(done.exception)


def test_from_an_authority_to_a_run_that_is_stopped(tmp_path: Path) -> None:
    told("certs", "init", "--host", "fl.example.org")
    assert "has an authority already" in refused("certs", "init")
    told("certs", "invite", "op", "--role", "operator")
    token = told("certs", "invite", "hospital-a", "--out", "-")
    assert (tmp_path / "op.token").stat().st_mode & 0o777 == 0o600
    policy = tmp_path / "client.toml"
    policy.write_text('[client]\nname = "hospital-a"\nstate = "mine"\n[data]\nsource = "x.csv"\n')

    with (
        Store(tmp_path / "state", durable=False) as store,
        serving(
            Coordinator(CONFIG, SCHEMA, FedAvg(), store, starting=SCHEMA.zeros()), certs=tmp_path / "certs"
        ) as address,
    ):
        line = told("certs", "enrol", "op.token", "--server", address, "--certs", "op")
        assert line == "enrolled as operator op; key and certificate in op\n"
        told("certs", "enrol", "-", "--server", address, "--policy", "client.toml", given=token)
        assert (tmp_path / "mine" / "certs" / "member.pem").stat().st_mode & 0o777 == 0o600
        again = refused("certs", "enrol", "op.token", "--server", address, "--certs", "thief")
        assert "has been used" in again
        told("certs", "renew", "--server", address, "--certs", "op")

        assert re.search(r"^round +1 of 1, not open *$", told("operate", "status", *to(address)), re.M)
        told_json = json.loads(told("operate", "status", *to(address), "--json"))
        assert (told_json["round"], told_json["rounds"], told_json["open"], told_json["live"]) == (0, 1, False, [])
        mine = ("--server", address, "--certs", "mine/certs")
        assert "does not allow" in refused("operate", "stop", *mine)
        assert told("certs", "revoke", "hospital-a") == "hospital-a: 2 certificates and invites revoked\n"
        assert "not accepted" in refused("operate", "stop", *mine)
        assert told("operate", "stop", *to(address)) == "the coordinator is stopping\n"

    ended = refused("operate", "status", *to(address))
    assert "a coordinator whose run is over has ended too: `fedloom runs list` on its machine tells" in ended
    assert "runs/NAME/adapter" in ended
    listed = told("certs", "list")
    states = re.findall(r"^(\S+) +(\S+) +(\S+) +\d{4}-\d\d-\d\d \d\d:\d\d +[0-9a-f]{16}$", listed, re.M)
    assert states == [
        ("hospital-a", "client", "revoked"),
        ("hospital-a", "client", "revoked"),
        ("op", "operator", "used"),
        ("op", "operator", "valid"),
        ("op", "operator", "valid"),
    ]
    assert token.strip() not in listed
    rows = json.loads(told("certs", "list", "--json"))
    assert [(each["name"], each["role"], each["state"]) for each in rows] == states
    assert all(re.fullmatch(r"[0-9a-f]{64}", each["fingerprint"]) for each in rows)


def test_a_run_that_is_over_is_said_to_be_and_where_its_result_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = pb.StatusReply(run="4f", epoch=1, round=3, rounds=10, over=True)
    monkeypatch.setattr("fedloom.client.transport.admin.status", lambda server, certs: reply)

    said = told("operate", "status", *to("127.0.0.1:1"))

    assert re.search(r"^opened +once *$", said, re.M)
    assert re.search(r"^over +with 3 of 10 rounds *$", said, re.M)
    assert "runs/NAME/adapter" in said
    assert "not open" not in said


def to(address: str) -> tuple[str, str, str, str]:
    return "--server", address, "--certs", "op"


def test_the_coordinators_certificate_is_renewed_in_place(tmp_path: Path) -> None:
    told("certs", "init")
    before = (tmp_path / "certs" / "server.pem").read_bytes()

    assert "is good until" in told("certs", "renew")

    assert (tmp_path / "certs" / "server.pem").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("invite", "a b"), "1 to 64 letters"),
        (("invite", "ann", "--role", "invite"), "client, operator, observer are allowed"),
        (("revoke", "ann"), "nobody named 'ann'"),
        (("enrol", "none.token", "--server", "127.0.0.1:1", "--certs", "x"), "cannot read the join token"),
        (("enrol", "bad.token", "--server", "127.0.0.1:1", "--certs", "x"), "not a whole join token"),
        (("enrol", "bad.token", "--server", "127.0.0.1:1"), "where are the certificates?"),
        (("renew", "--server", "127.0.0.1:1", "--certs", "x"), "cannot be read"),
        (("list", "--certs", "nowhere"), "no authority in nowhere; `fedloom certs init` makes one"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    told("certs", "init")
    (tmp_path / "bad.token").write_text("fedloom-join-1.SECRETSECRET.0")

    line = refused("certs", *arguments)

    assert words in line
    assert "SECRETSECRET" not in line
