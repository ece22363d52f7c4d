import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.core.errors import ConfigError
from fedloom.strategies.fedpeft import FedPEFT
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.registry import available, factory, load

Install = Callable[[str, str, str], None]

MODULE = '''
from dataclasses import dataclass
from typing import Literal
from fedloom.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class Slow(FedAvg):
    """Average slowly.

    More words.
    """

    rate: float = 0.5
    mode: Literal[1, "one"] = 1


def refuse(train_head: bool = True) -> FedAvg:
    raise ValueError("not today")


class Empty:
    def __init__(self, need: int) -> None:
        self.need = need


NUMBER = 3
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution with one entry point on the path, as an installer would."""
    (tmp_path / "slow_federation.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "slow_federation", raising=False)

    def write(distribution: str, name: str, target: str) -> None:
        folder = tmp_path / f"{distribution}-1.5.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        with (folder / "entry_points.txt").open("a") as file:
            file.write(f"[fedloom.strategies]\n{name} = {target}\n")

    return write


def test_ours_are_listed_as_the_project_file_says() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    registered = project["entry-points"]["fedloom.strategies"]

    ours = {entry.name: entry for entry in available() if entry.distribution == "fedloom"}

    assert ours.keys() == registered.keys()
    for name, entry in ours.items():
        assert entry.version == project["version"]
        made_by = factory(name)
        assert f"{made_by.__module__}:{made_by.__name__}" == registered[name]
        assert entry.summary == (made_by.__doc__ or "").partition("\n")[0]
        assert callable(load(name, {}).commit)


def test_options_reach_the_strategy() -> None:
    assert load("ffa", {"orthonormal": True, "train_head": False}) == FFA(orthonormal=True, train_head=False)
    assert load("fedsvd", {"period": 5}) == FedSVD(period=5)
    assert load("fedpeft", {"kind": "bias"}) == FedPEFT(kind="bias")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fedsdv", {}, "unknown strategy 'fedsdv'; did you mean 'fedsvd'\\? available: .*fedavg"),
        ("fedloom.strategies.ffa:FFA", {}, "unknown strategy"),
        ("os:system", {}, "unknown strategy 'os:system'; available"),
        ("fedsvd", {"periods": 1}, "no option 'periods'; did you mean 'period'\\?.*period: int = 1, train_head: bool"),
        ("fedsvd", {"period": "1"}, "option 'period' of strategy 'fedsvd' is '1'; allowed: period: int = 1"),
        ("fedsvd", {"period": True}, "is True"),
        ("fedsvd", {"period": 1.0}, "is 1.0"),
        ("fedsvd", {"period": 0}, "period is 0; set a number of rounds from 1 up"),
        ("ffa", {"orthonormal": 1}, "is 1; allowed: orthonormal: bool = False"),
        ("fedpeft", {"kind": "prompt"}, "kind: 'lora' \\| 'bias' \\| 'head' = 'lora'"),
        ("fedpeft", {"kind": "head", "train_head": False}, "trains nothing"),
    ],
)
def test_what_is_wrong_is_named(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(name, options)


def test_a_third_party_strategy_is_listed_and_loaded_like_ours(install: Install) -> None:
    install("slow-federation", "slow", "slow_federation:Slow")

    entry = next(each for each in available() if each.name == "slow")

    assert (entry.distribution, entry.version, entry.summary) == ("slow-federation", "1.5", "Average slowly.")
    # A whole number is fine where a float is meant: TOML writers drop the point.
    for rate in (0.25, 1):
        assert load("slow", {"rate": rate}).rate == rate  # type: ignore[attr-defined]  # the plugin's own option


def test_one_name_from_two_distributions_is_refused(install: Install) -> None:
    install("slow-federation", "fedavg", "slow_federation:Slow")

    for call in (available, lambda: load("ffa", {})):
        with pytest.raises(ConfigError, match=r"'fedavg' is registered by both .*uninstall one"):
            call()


def test_a_broken_plugin_is_shown_and_does_not_stop_the_others(install: Install) -> None:
    install("slow-federation", "absent", "no_such_module_here:Slow")

    summary = next(each.summary for each in available() if each.name == "absent")

    assert "cannot be imported" in summary
    assert "reinstall" in summary
    with pytest.raises(ConfigError, match="cannot be imported"):
        load("absent", {})
    assert load("ffa", {}) == FFA()


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("Missing", {}, "cannot be imported"),
        ("NUMBER", {}, "is not callable; register its class"),
        ("refuse", {}, "refuses its options {}: not today"),
        ("Empty", {}, "needs option 'need'; allowed: need: int"),
        ("Empty", {"need": 1}, "is no strategy: it lacks init, plan, fold, commit, result, traits; subclass"),
    ],
)
def test_what_is_registered_must_be_a_strategy(
    install: Install, target: str, options: dict[str, object], words: str
) -> None:
    install("slow-federation", "odd", f"slow_federation:{target}")

    with pytest.raises(ConfigError, match=words):
        load("odd", options)


def test_true_does_not_pass_for_the_choice_one(install: Install) -> None:
    install("slow-federation", "slow", "slow_federation:Slow")

    assert load("slow", {"mode": 1}).mode == 1  # type: ignore[attr-defined]  # the plugin's own option
    with pytest.raises(ConfigError, match=r"is True; allowed: .*mode: 1 \| 'one' = 1"):
        load("slow", {"mode": True})
