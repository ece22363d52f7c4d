"""`fedloom doctor` on this machine: each thing it looks at is broken for real, and named with what to do."""

import csv
import datetime as dt
import json
import platform
import re
import shutil
import sqlite3
import tempfile
import tomllib
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli_w
import torch
from typer.testing import CliRunner, Result

from fedloom.cli.main import app
from fedloom.client.data.rows import Rows
from fedloom.client.doctor import Finding, machine
from fedloom.client.doctor.machine import clock, file_system
from fedloom.client.models.base_folder import base_digest
from fedloom.client.policy import Policy, load_policy
from fedloom.client.privacy.dp_sgd.grad_sample import LAYERS
from fedloom.client.privacy.ledger.account import existing_account, ledger_folder, open_account
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.privacy.accounting import Spend

recording: Any = import_module("fedloom.client.privacy.dp_sgd.grad_sample.recording")
"""The module, whose name its package gives to its function."""


class Home(NamedTuple):
    """A site on disk, in good health."""

    policy: Path
    run: Path
    data: Path
    base: Path

    def examine(self, *words: str, code: int | None = None) -> dict[str, Finding]:
        """What the command says, the worst of each check."""
        done = doctor(self.policy, "--json", "--insecure-loopback", *words)
        report = json.loads(done.stdout)
        assert done.exit_code == report["status"]
        if code is not None:
            assert done.exit_code == code, done.stdout
        order = ["ok", "warning", "failed"]
        found = sorted((Finding(**each) for each in report["findings"]), key=lambda each: order.index(each.level))
        return {each.check: each for each in found}


def doctor(*words: str | Path) -> Result:
    done = CliRunner().invoke(app, ["doctor", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture
def home(tmp_path: Path, policy: Policy, rows: Rows, spec: Spec, tiny_base: Path) -> Home:
    data, base = tmp_path / "data.csv", shutil.copytree(tiny_base, tmp_path / "base")
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *zip(rows.texts, rows.labels, strict=True)])
    tables = policy.model_dump(mode="json", exclude_none=True)
    tables["data"]["source"] = "data.csv"
    tables["client"]["state"] = "state"
    tables["model"] = {"folder": str(base), "digests": [base_digest(base)]}
    tables["compute"]["device"] = "cpu"
    (tmp_path / "client.toml").write_text(tomli_w.dumps(tables))
    run = spec.model_dump(mode="json", exclude_none=True)
    run["model"]["base"] = "elsewhere"
    (tmp_path / "run.toml").write_text(tomli_w.dumps(run))
    return Home(tmp_path / "client.toml", tmp_path / "run.toml", data, base)


def spend(home: Home, rows: Rows, epsilon: float = 50.0) -> Path:
    site = load_policy(home.policy)
    with open_account(site, rows) as account:
        account.reserve("before", 0, Spend(0.3, 1.0, 3), budget=epsilon, delta=1e-5)
        return account.path


def test_a_healthy_site_passes_and_nothing_is_left_behind(home: Home) -> None:
    before = sorted(home.policy.parent.rglob("*"))

    found = home.examine("--run", str(home.run), code=0)

    assert {name for name, each in found.items() if each.level == "failed"} == set()
    checks = {"python", "packages", "device", "state", "disk", "clock", "ledger", "outbox", "data", "base model"}
    assert checks | {"run", "rows", "layers", "sensitivity", "batch"} == found.keys()
    assert found["layers"].text.startswith("all 10 trained tensors")
    assert sorted(home.policy.parent.rglob("*")) == before


def test_the_report_for_people_has_a_line_and_a_remedy(home: Home) -> None:
    home.data.unlink()

    done = doctor(home.policy, "--insecure-loopback", "--set", "data.source=data.csv")

    assert done.exit_code == 2
    at = next(number for number, line in enumerate(done.stdout.splitlines()) if line.startswith(" failed  data "))
    assert "data.csv does not exist" in done.stdout.splitlines()[at]
    assert done.stdout.splitlines()[at + 1].strip() == "correct data.source in the policy"


def test_warnings_alone_fail_only_when_strict(home: Home) -> None:
    alone = ("--set", "model.folder=minilm-l6", "--set", "model.digests=[]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLOOM_CACHE", str(home.policy.parent / "no-cache"))
        assert home.examine(*alone, code=0)["base model"].level == "warning"
        assert home.examine(*alone, "--strict", code=1)["base model"].remedy == "run `fedloom assets minilm-l6`"


def _no_data(home: Home) -> None:
    home.data.write_text("")


def _damaged_row(home: Home) -> None:
    home.data.write_text("text,label\nfine,perhaps\n")


def _other_weights(home: Home) -> None:
    with (home.base / "config.json").open("a") as file:
        file.write("\n")


def _no_weights(home: Home) -> None:
    (home.base / "model.safetensors").unlink()


def _half_weights(home: Home) -> None:
    path = home.base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


BROKEN: dict[str, tuple[Callable[[Home], None], tuple[str, ...], str, str]] = {
    "empty data": (_no_data, (), "data", "is empty"),
    "a row of another label": (_damaged_row, (), "rows", "line 2: a label is not among"),
    "another base": (_other_weights, (), "base model", "this site allows"),
    "no base": (_no_weights, (), "base model", r"no \*\.safetensors"),
    "a base cut short": (_half_weights, ("model.digests=[]",), "base model", "cannot be read"),
    "no such device": (lambda _: None, ("compute.device=cuda:63",), "device", "sees 0 CUDA devices"),
    "state below a file": (lambda _: None, ("client.state=data.csv/state",), "state", "cannot be written"),
    "more noise wanted": (lambda _: None, ("privacy.min_noise_multiplier=3",), "run", "noise multiplier 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(home: Home, name: str) -> None:
    breaks, overrides, check, words = BROKEN[name]
    breaks(home)
    settings = [word for each in overrides for word in ("--set", each)]

    found = home.examine("--run", str(home.run), *settings, code=2)[check]

    assert found.level == "failed"
    assert re.search(words, found.text)


def test_a_base_that_does_not_fit_into_memory_is_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda *_: 1 << 20)

    found = home.examine(code=2)["device"]

    assert "the base model alone takes" in found.text
    assert "bfloat16" in found.remedy
    half = home.examine("--set", "compute.dtype=bfloat16", code=None)["device"]
    assert half.text != found.text


def test_a_ledger_that_was_tampered_with_is_named(home: Home, rows: Rows) -> None:
    path = spend(home, rows)
    assert "entries, sound; epsilon" in home.examine(code=0)["ledger"].text
    db = sqlite3.connect(path)
    db.execute("UPDATE entry SET body = replace(body, '0.3', '0.1') WHERE number = 2")
    db.commit()
    db.close()

    found = home.examine(code=2)["ledger"]

    assert found.level == "failed"
    assert "cannot be trusted" in found.text


def test_a_ledger_that_is_gone_is_named(home: Home, rows: Rows) -> None:
    path = spend(home, rows)
    shutil.rmtree(path.parent)

    assert "is gone or empty" in home.examine(code=2)["ledger"].text
    assert not ledger_folder(load_policy(home.policy)).exists() or not path.exists()


def test_a_spent_budget_is_named(home: Home, rows: Rows) -> None:
    spend(home, rows)
    little = ("--set", "privacy.epsilon=0.1")

    assert "raise privacy.epsilon" in home.examine(*little, code=2)["ledger"].remedy
    assert "not even one" in home.examine(*little, "--run", str(home.run), code=2)["budget"].text


def test_a_ledger_in_use_is_a_warning(home: Home, rows: Rows) -> None:
    spend(home, rows)
    with existing_account(load_policy(home.policy)):
        assert home.examine(code=0)["ledger"].level == "warning"


def test_a_layer_outside_the_list_is_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LAYERS, torch.nn.Linear)
    monkeypatch.setattr(recording, "HOOKED", frozenset())

    found = home.examine("--run", str(home.run), code=2)["model"]

    assert re.search(
        r"^layer '.*' \(Linear\) owns the trained parameter '.*' but has no per-example gradient", found.text
    )


def test_columns_are_read_by_the_names_that_the_policy_gives(home: Home) -> None:
    home.data.write_text(home.data.read_text().replace("text,label", "note,kind", 1))
    assert home.examine("--run", str(home.run), code=2)["rows"].level == "failed"

    tables = tomllib.loads(home.policy.read_text())
    tables["data"]["columns"] = {"text": "note", "label": "kind"}
    home.policy.write_text(tomli_w.dumps(tables))

    assert home.examine("--run", str(home.run), code=0)["rows"].level == "ok"


def test_a_target_that_is_not_there_is_named(home: Home) -> None:
    text = home.run.read_text()
    home.run.write_text(text.replace('targets = "auto"', 'targets = ["word_embeddings", "value"]'))

    found = home.examine("--run", str(home.run), code=2)["model"]

    assert "adapter.targets word_embeddings" in found.text


def test_a_model_that_mixes_examples_is_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Trainer._batch_loss
    monkeypatch.setattr(Trainer, "_batch_loss", lambda self, batch: whole(self, batch) / len(batch["labels"]))

    found = home.examine("--run", str(home.run), code=2)["model"]

    assert found.text.startswith("sensitivity probe: ")


def test_packages_outside_the_tested_ranges_are_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(machine, "version", lambda name: "1.0" if name == "opacus" else real(name))
    found = home.examine(code=2)["packages"]
    assert "opacus 1.0 is outside the tested range" in found.text
    assert found.remedy.startswith("pip install 'opacus")

    def absent(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(machine, "version", absent)
    assert home.examine(code=2)["packages"].text == "peft is not installed"


def test_another_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.4")
    assert machine.python().level == "failed"


@pytest.mark.parametrize(("free", "level"), [(1 << 20, "failed"), (1 << 30, "warning"), (1 << 40, "ok")])
def test_a_full_disk_is_named(tmp_path: Path, free: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))

    assert machine.disk(tmp_path / "not" / "yet").level == level


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:20 / /srv rw,nosuid shared:2 - nfs4 nas:/export rw
24 23 0:21 / /srv/my\\040data rw shared:3 - xfs /dev/vdb rw
25 22 0:22 / /mnt rw shared:4 - ext4 /dev/vdc rw
26 25 0:23 / /mnt rw shared:5 - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/state", "nfs4"),
        ("/srv/my data/state", "xfs"),
        ("/srvstate", "ext4"),
        ("/mnt/state", "tmpfs"),
        ("/", "ext4"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == kind


@pytest.mark.parametrize(
    ("kind", "words"), [("nfs4", "network file system"), ("cifs", "network"), ("tmpfs", "in memory")]
)
def test_a_state_folder_that_would_not_last_is_named(
    home: Home, kind: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mounts").write_text(f"22 1 254:0 / / rw,relatime shared:1 - {kind} somewhere rw\n")
    monkeypatch.setattr(machine, "_MOUNTS", tmp_path / "mounts")

    found = home.examine(code=2)["state"]

    assert words in found.text
    assert found.remedy == "set client.state to a folder on a local disk"


def test_a_disk_without_room_is_no_disk_to_leave(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    found = home.examine(code=2)["state"]

    assert "has no room" in found.text
    assert found.remedy == "free the disk, and start the client again"


def test_a_folder_of_the_policy_that_is_not_there_is_named_by_its_key(home: Home) -> None:
    shutil.rmtree(home.base)
    found = home.examine(code=2)["base model"]

    assert "model.folder" in found.text
    assert "model.base" not in found.text
    assert "correct model.folder in the policy" in found.remedy


def test_a_clock_that_is_behind_is_named(home: Home, rows: Rows) -> None:
    now = dt.datetime(2026, 5, 1, tzinfo=dt.UTC)
    day = dt.timedelta(days=1)
    assert clock(now, {"x was made": now - day}).level == "ok"
    assert "before x was made" in clock(now, {"y was made": now - day, "x was made": now + day}).text
    path = spend(home, rows)
    assert home.examine(code=0)["clock"].level == "ok"
    assert path.exists()
