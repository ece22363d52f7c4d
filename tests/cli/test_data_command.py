"""`fedloom data check` as a data owner meets it."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.preloaded import fedloom

POLICY = """
client = { name = "hospital", state = "state", anchors = "anchors" }
[data]
source = "notes.tsv"
columns = { text = "note", label = "mood" }
labels = ["no", "yes"]
declared_examples = 20
[privacy]
delta = 1e-3
"""
RUN = """
run = { name = "flu", rounds = 4 }
model = { base = "BASE", labels = ["no", "yes"] }
train = { steps = 5, sampling_rate = 0.4, learning_rate = 0.1 }
privacy = { epsilon = 5.0, delta = 1e-3 }
"""


@pytest.fixture
def home(tmp_path: Path, tiny_base: Path) -> Path:
    lines = [f"note {number}\t{('no', 'yes')[number % 2]}\n" for number in range(20)]
    (tmp_path / "notes.tsv").write_text("note\tmood\n" + "".join(lines))
    (tmp_path / "client.toml").write_text(POLICY)
    (tmp_path / "run.toml").write_text(RUN.replace("BASE", str(tiny_base)))
    return tmp_path


def data_check(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return fedloom("data", "check", home / "client.toml", *arguments)


def test_sound_data_pass_with_their_cost(home: Path) -> None:
    done = data_check(home, "--run", str(home / "run.toml"))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 rows for text-classification, 20 of them usable" in done.stdout
    assert "the run's 4 rounds bring it to 4.9" in done.stdout
    assert done.stdout.endswith("training would take this data\n")
    assert not (home / "state").exists()


def test_a_fault_is_exit_status_one_and_json_says_it_too(home: Path) -> None:
    with (home / "notes.tsv").open("a") as file:
        file.write("note\tmaybe\n")

    done = data_check(home, "--run", str(home / "run.toml"), "--json")

    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    document = json.loads(line)
    assert document["sound"] is False
    assert document["unknown_labels"] == {"maybe": 1}
    assert document["usable"] == 20


def test_a_missing_file_is_one_line(home: Path) -> None:
    (home / "notes.tsv").unlink()

    done = data_check(home)

    assert done.returncode == 2
    assert done.stderr.startswith("error: data source 'notes.tsv' does not exist")
