"""A federation of containers survives the death of any of them, and leaves what it promised."""

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedloom.client.assets.fetch import fetch
from fedloom.client.data.load import load_rows
from fedloom.client.data.tokens import encode
from fedloom.client.models.exports.loading import load_exported, predict
from fedloom.client.models.load import load_base
from fedloom.core.config.run import RunConfig
from fedloom.simulation.federation import shares
from tests.compose.conftest import CLIENTS, Containers, run, until

# The images are built, and the run goes on for some minutes, in the first test.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

KILL_ALL = "import os; os.kill(-1, 9)"


def _training(containers: Containers, round: int) -> bool:
    """Whether this round is open, and somebody is yet to answer."""
    text = containers.standing()
    waiting = re.search(r"waiting for ([1-9]\d*)", text)
    standing = rf"^{round - 1}( of \d+)? rounds committed; round {round} is open$"
    return re.search(standing, text, re.MULTILINE) is not None and waiting is not None


@pytest.fixture(scope="module")
def finished(containers: Containers) -> Containers:
    """The federation at its end, after its coordinator and two of its clients were killed within a round."""
    (coordinator,) = containers.ids("coordinator")
    until("the coordinator is healthy", lambda: containers.state(coordinator, "State.Health.Status") == "healthy")
    until("the second round is open", lambda: _training(containers, 2))
    slots = containers.slots()
    assert len(slots) == CLIENTS

    run("docker", "kill", "--signal", "KILL", coordinator)
    assert containers.state(coordinator, "State.Status") == "exited"
    run("docker", "start", coordinator)
    until("the third round is open", lambda: _training(containers, 3))
    first, second, *_ = containers.ids("client")
    run("docker", "kill", "--signal", "KILL", first)
    # Not by the engine but as a crash, all but the init process: this one must come back by itself.
    run("docker", "exec", second, "python", "-c", KILL_ALL, check=False)
    run("docker", "start", first)

    everybody = containers.ids()
    until("all have ended", lambda: {containers.state(each, "State.Status") for each in everybody} == {"exited"})
    assert containers.ids() == everybody
    assert containers.state(second, "RestartCount") == "1"
    assert containers.slots() == slots, "a client came back as another"
    return containers


def _file(containers: Containers, volume: str, path: str) -> str:
    image = "fedloom-server" if volume == "coordinator" else "fedloom-client"
    return containers.look(image, volume, "cat", path)


def _config(containers: Containers) -> RunConfig:
    return RunConfig.model_validate(tomllib.loads(_file(containers, "federation", "run.toml")))


def test_there_is_one_container_for_each_member(finished: Containers) -> None:
    assert len(finished.ids()) == 1 + CLIENTS
    assert len(finished.ids("client")) == CLIENTS
    assert {finished.state(each, "State.ExitCode") for each in finished.ids()} == {"0"}


def test_nobody_is_root_or_writes_to_its_image(finished: Containers) -> None:
    for each in finished.ids():
        assert finished.state(each, "Config.User") == "10001:10001"
        assert finished.state(each, "HostConfig.ReadonlyRootfs") == "true"
        assert finished.state(each, "HostConfig.CapDrop") == "[ALL]"


def test_the_coordinators_log_is_whole_and_complete(finished: Containers) -> None:
    shown = finished.look("fedloom-server", "coordinator", "fedloom", "runs", "show", "state")

    assert re.search(r"^3( of \d+)? rounds committed", shown, re.MULTILINE)
    assert "opened 2 times" in shown
    assert "files: as named" in finished.look("fedloom-server", "coordinator", "fedloom", "runs", "verify", "state")


def test_every_ledger_is_sound_and_released_every_round_once(finished: Containers) -> None:
    lost, accounts = 0, set()
    for index in range(CLIENTS):
        policy = f"client-{index}/policy.toml"
        finished.look("fedloom-client", "clients", "fedloom", "ledger", "verify", policy)
        stated = json.loads(finished.look("fedloom-client", "clients", "fedloom", "ledger", "export", policy))
        released = [charge["round"] for charge in stated["charges"] if charge["released"]]
        assert released == [0, 1, 2]
        lost += len(stated["charges"]) - len(released)
        accounts.add(stated["account"])
    # Only those that were killed while they trained have paid for a round twice.
    assert lost <= 2
    assert len(accounts) == CLIENTS


def test_no_two_clients_share_an_example(finished: Containers) -> None:
    config = _config(finished)
    assert config.data is not None
    expected = shares(config, config.data)
    assert len(expected) == CLIENTS

    for name, rows in expected.items():
        lines = _file(finished, "clients", f"{name}/train.jsonl").splitlines()
        assert tuple(json.loads(line)["text"] for line in lines) == rows.texts


def test_the_tokens_are_gone_and_no_key_is_where_others_look(finished: Containers) -> None:
    seen = finished.look("fedloom-client", "federation", "ls").split()

    assert sorted(seen) == ["over", "run.schema.json", "run.toml", "slots.json"]


def test_the_adapter_is_the_coordinators_and_predicts(finished: Containers, tmp_path: Path) -> None:
    adapter = finished.out / "adapter"
    for name in ("run.toml", "run.schema.json"):
        (tmp_path / name).write_text(_file(finished, "federation", name))
    (coordinator,) = finished.ids("coordinator")
    run("docker", "cp", f"{coordinator}:/var/lib/fedloom/state", str(tmp_path / "state"))
    run("fedloom", "export", f"{tmp_path}/run.toml", "--state", f"{tmp_path}/state", "--out", f"{tmp_path}/own")

    saved, own = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "own"))
    assert saved.keys() == own.keys()
    assert all(np.array_equal(saved[name], own[name]) for name in saved)
    known = json.loads((adapter / "fedloom.json").read_text())
    assert known["rounds"] == known["privacy"]["rounds"] == 3

    base, config = fetch("minilm-l3-mean"), _config(finished)
    _, tokenizer, *_ = load_base(base, config.model.built())
    assert config.data is not None
    rows = load_rows(config.data.source, config.model.labels, "test").take(np.arange(50))
    classes = predict(
        load_exported(base, adapter, 2), config.model.built(), encode(rows, tokenizer, 48), tokenizer.pad_token_id
    )
    assert classes.shape == (50,)
    assert set(classes) <= {0, 1}


def test_started_again_all_say_that_it_is_over(finished: Containers) -> None:
    finished.compose("up", "--detach", "--scale", f"client={CLIENTS}")

    clients = finished.ids("client")
    until("the clients have ended again", lambda: {finished.state(c, "State.Status") for c in clients} == {"exited"})
    assert {finished.state(each, "State.ExitCode") for each in clients} == {"0"}
    for each in clients:
        assert "this run is over" in run("docker", "logs", "--tail", "1", each)
