"""`fedloom init`: what it asks, what it writes, and that what it writes runs."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedloom.cli.main import app
from fedloom.client.policy import Policy, check_spec, load_policy
from fedloom.core.config.parsing import Section
from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.errors import ConfigError
from tests.support.preloaded import fedloom

COMMAND = [sys.executable, "-m", "fedloom.cli.main", "init"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def init(*words: str, answers: str | None = None) -> Result:
    done = CliRunner().invoke(app, ["init", *words], input=answers)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_four_questions_are_asked_and_what_cannot_be_is_asked_again() -> None:
    answers = ["a name", "winter", "no", "no, maybe, yes", "model", "-1", "3.5"]

    done = init("--data", "rows", answers="\n".join(answers) + "\n")

    assert done.exit_code == 0
    assert [done.stdout.count(each) for each in ("Name of", "Labels,", "Base model,", "Private")] == [2, 2, 1, 2]
    config = load_run(Path("winter.toml"))
    assert (config.run.name, config.model.base, config.privacy.epsilon) == ("winter", "model", 3.5)
    assert config.model.labels == ("no", "maybe", "yes")
    assert config.data is not None
    assert config.data.source == "rows"


def test_defaults_are_shown_and_taken_in_a_terminal() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(COMMAND, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        os.write(ours, b"\n\n\n\n")
        assert process.wait(60) == 0
    shown = os.read(ours, 65536).decode()
    os.close(ours)

    assert "Name of the run [first]: " in shown
    assert "next: fedloom simulate first.toml" in shown
    assert load_run(Path("first.toml")).privacy.enabled


def test_the_next_step_names_only_folders_that_are_there(tmp_path: Path) -> None:
    absent = init("--labels", "yes,no", "--policy", "client.toml", "--yes").stdout
    assert "next: make the folder data with train.csv and test.csv" in " ".join(absent.split())
    assert "client.toml is for a site" in absent

    Path("data").mkdir()
    Path("data", "train.csv").write_text("text,label\na,yes\nb,no\n")
    present = init("second.toml", "--labels", "yes,no", "--yes").stdout
    assert "next: fedloom simulate second.toml" in present
    assert "make the folder" not in present


def test_options_answer_beforehand() -> None:
    done = init("mine.toml", "--name", "x", "--labels", "none", "--base", "b", "--epsilon", "none", answers="")

    assert (done.exit_code, "Name of" in done.stdout) == (0, False)
    config = load_run(Path("mine.toml"))
    assert (config.model.task, config.model.labels, config.model.head) == ("causal-lm", (), "frozen")
    assert not config.privacy.enabled
    with pytest.raises(ConfigError, match=r"run\.name"):
        init("other.toml", "--name", "a name", "--yes")
    with pytest.raises(ConfigError, match="epsilon 'inf'"):
        init("other.toml", "--epsilon", "inf", "--yes")
    assert not Path("other.toml").exists()


def test_the_layers_of_a_known_architecture_are_named() -> None:
    Path("llm").mkdir()
    Path("llm", "config.json").write_text(json.dumps({"model_type": "llama"}))

    init("--base", "llm", "--yes")

    assert load_run(Path("first.toml")).adapter.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize("existing", ["first.toml", "client.toml"])
def test_nothing_is_overwritten_and_nothing_half_done(existing: str) -> None:
    Path(existing).write_text("mine")

    with pytest.raises(ConfigError, match=f"{existing} exists and is left as it is"):
        init("--yes", "--policy", "client.toml")

    assert [each.name for each in Path().iterdir()] == [existing]
    assert Path(existing).read_text() == "mine"


@pytest.mark.parametrize(
    ("count", "epsilon", "rate", "batch"),
    [
        *((400, "6", 0.5, 50), (1600, "6", 0.2, 80), (40_000, "6", 0.02, 200)),
        *((400, "none", 0.2, 20), (40_000, "none", 0.004, 40)),
    ],
)
def test_steps_are_as_large_as_the_rows_allow(count: int, epsilon: str, rate: float, batch: int) -> None:
    """At the rate of a large data set a step of a small one takes two rows, and learns nothing but noise."""
    Path("rows").mkdir()
    Path("rows/train.csv").write_text("text,label\n" + "".join(f"row {n},negative\n" for n in range(count)))

    shown = init("--yes", "--data", "rows", "--epsilon", epsilon, "--policy", "client.toml").stdout

    assert load_run(Path("first.toml")).train.sampling_rate == rate
    assert f"{count:,} rows to train on" in shown
    assert f"puts about {batch} of them into a step" in shown
    assert load_policy(Path("client.toml")).privacy.max_sampling_rate == max(0.1, rate)


def test_rows_that_cannot_be_read_are_said_and_leave_a_guess() -> None:
    Path("rows").mkdir()
    Path("rows/train.csv").write_text("body,label\ngood,negative\n")

    shown = init("--yes", "--data", "rows").stdout

    assert "rows cannot be counted, so train.sampling_rate is a guess: " in shown
    assert load_run(Path("first.toml")).train.sampling_rate == 0.02


@pytest.mark.parametrize(("epsilon", "noise"), [("6", 0.6), ("none", None)])
def test_the_policy_allows_the_run(epsilon: str, noise: float | None) -> None:
    init("--yes", "--epsilon", epsilon, "--policy", "client.toml")

    config = load_run(Path("first.toml"))
    private = config.privacy.model_copy(update={"noise_multiplier": noise})
    check_spec(load_policy(Path("client.toml")), config.model_copy(update={"privacy": private}).spec)


def test_every_key_is_below_what_its_model_says() -> None:
    """The comments are the models' own, so they cannot grow stale."""
    init("--yes", "--policy", "client.toml")

    models: dict[str, type[Section]] = {"first.toml": RunConfig, "client.toml": Policy}
    for name, model in models.items():
        document = model.model_json_schema()
        section, comment, keys = "", "", 0
        for line in Path(name).read_text().splitlines():
            if line.startswith("["):
                section = line[1:].partition("]")[0]
            elif line.startswith("# "):
                comment += line[1:]
            elif line:
                reference = str(document["properties"][section])
                (about,) = [each for key, each in document["$defs"].items() if f"/{key}'" in reference]
                said = about["properties"][line.partition(" ")[0]]["description"]
                assert comment.split() == said.split()
                keys += 1
            comment = comment if line.startswith("# ") else ""
        assert keys > 8


@pytest.mark.e2e
def test_the_written_file_runs(tmp_path: Path, tiny_base: Path) -> None:
    rows = "text,label\n" + "".join(f"a {word} film number {n},{word}\n" for n in range(20) for word in ("bad", "good"))
    for split in ("train", "test"):
        Path(f"{split}.csv").write_text(rows)
    init("--yes", "--labels", "bad,good", "--base", str(tiny_base), "--data", str(tmp_path))

    small = ("run.rounds=2", "train.steps=1", "train.sampling_rate=0.5", "data.clients=2")
    done = fedloom("simulate", "first.toml", *(word for each in small for word in ("--set", each)))

    assert done.returncode == 0, done.stderr
    assert Path("runs/first/adapter/adapter_model.safetensors").is_file()
    assert "epsilon of client-1" in done.stdout
