import ast
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedloom.cli.main import app
from fedloom.core.errors import ConfigError
from fedloom.core.registry import GROUPS

CODE = """
class Broken:
    '''A codec without a single method.'''

class Silent:
    name, largest, traits = "silent", 1.0, None
    def encoded_size(self, schema): ...
    def encode(self, schema, tensors): ...
    def decode(self, schema, payload): ...
"""


def fedloom(*words: str) -> Result:
    done = CliRunner().invoke(app, ["components", *words], env={"COLUMNS": "220"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_strategies_are_listed_and_shown() -> None:
    listed = fedloom("list", "strategies")
    shown = fedloom("show", "strategies", "fedsvd")

    names = {line.split()[1] for line in listed.stdout.splitlines() if f" {version('fedloom')} " in line}
    assert names >= {"fedavg", "ffa", "fedsvd", "fedpeft"}
    assert "Train every tensor and average each by itself." in " ".join(listed.stdout.split())
    assert shown.stdout.startswith("Train B (and the head), average exactly")
    assert re.search(r"^period\s+integer\s+1\s+Rewrite after every so many rounds", shown.stdout, re.M)
    choices = fedloom("show", "strategies", "fedpeft").stdout
    assert re.search(r'^kind\s+"lora" or "bias" or "adapter" or "head"\s+"lora"', choices, re.M)
    assert re.search(r"^shares\s+array\s+\[\]", fedloom("show", "partitioners", "size").stdout, re.M)


def test_every_group_is_listed_and_nothing_is_imported() -> None:
    code = (
        "import sys\nfrom fedloom.cli.main import app\n"
        "try:\n    app(['components', 'list'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'grpc', 'scipy', 'tensorboard', 'mlflow'} & set(sys.modules) or 'nothing heavy')"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)

    assert done.stdout.endswith("nothing heavy\n"), done.stdout[-200:]
    assert {line.split()[0] for line in done.stdout.splitlines() if "fedloom" in line.split()} == set(GROUPS)


def test_an_unknown_name_or_group_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown strategy 'fedsdv'; did you mean 'fedsvd'\?"):
        fedloom("show", "strategies", "fedsdv")
    with pytest.raises(ConfigError, match=r"unknown group of components 'codec'; did you mean 'codecs'\?"):
        fedloom("list", "codec")


def test_check_has_a_line_for_each_fault(install: Callable[..., None]) -> None:
    assert fedloom("check", "codecs").exit_code == 0
    install("bad", "broken", "slow_federation:Broken", "codecs", code=CODE)
    install("worse", "silent", "slow_federation:Silent", "codecs", code=CODE)
    install("gone", "gone", "no_such_module:Codec", "codecs", code=CODE)

    done = fedloom("check", "codecs")

    assert done.exit_code == 1
    faults = done.stderr.splitlines()
    assert len(faults) == 3
    assert "is no codec: it lacks encoded_size, encode, decode, name, largest, traits" in faults[0]
    assert "codec 'gone' of gone cannot be imported" in faults[1]
    assert "codec 'silent' has no docstring" in faults[2]


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_a_new_package_is_whole_and_fails_its_battery(group: str, tmp_path: Path) -> None:
    said = fedloom("new", group, "my-own", "--out", str(tmp_path)).stdout

    home = tmp_path / "fedloom-my-own"
    assert f"pip install --no-deps -e {home}" in said
    assert f'[project.entry-points."fedloom.{group}"]\nmy-own = "fedloom_my_own:MyOwn"' in (
        (home / "pyproject.toml").read_text()
    )
    methods = [
        node
        for node in ast.walk(ast.parse((home / "fedloom_my_own.py").read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert methods
    assert all("is not written yet" in ast.unparse(each.body[-1]) for each in methods)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(home)]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 1, done.stdout
    assert "NotImplementedError" in done.stdout
    with pytest.raises(ConfigError, match="exists; move it away"):
        fedloom("new", group, "my-own", "--out", str(tmp_path))


@pytest.mark.parametrize(
    ("group", "name", "words"),
    [
        ("codecs", "fp16", "there is a codec 'fp16' already, of fedloom"),
        ("codecs", "Four Bits", "'Four Bits' cannot name a codec; lower-case letters"),
        ("codecs", "../up", "cannot name a codec"),
    ],
)
def test_a_name_that_cannot_be_is_refused(group: str, name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        fedloom("new", group, name, "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())
