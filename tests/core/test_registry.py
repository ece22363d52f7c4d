import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedloom.core.errors import ConfigError
from fedloom.core.registry import GROUPS, build, entries, faults, load, options_model
from fedloom.strategies.fedpeft import FedPEFT
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA

Install = Callable[..., None]

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
REGISTERED = [(group, name) for group in GROUPS for name in PROJECT["entry-points"].get(f"fedloom.{group}", {})]

MODULE = '''
from dataclasses import dataclass, field
from typing import Annotated, Literal
from pydantic import BaseModel, Field, model_validator
from fedloom.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class Slow(FedAvg):
    """Average slowly.

    More words.

    Args:
        rate: Share of the mean change
            that is applied.
    """

    rate: float = 0.5
    mode: Literal[1, "one"] = 1
    steps: tuple[float, ...] = field(default_factory=tuple)
    few: Annotated[int, Field(ge=1, le=9)] = 1


class Model(BaseModel, extra="forbid"):
    """Check by its own model."""

    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _ordered(self):
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self

    def split(self, rows, clients, draw):
        return []


def refuse(train_head: bool = True) -> FedAvg:
    raise ValueError("not today")


class Empty:
    """Nothing."""

    def __init__(self, need: int) -> None:
        self.need = need


def loose(**options: int) -> FedAvg:
    """Anything."""


NUMBER = 3
'''


@pytest.fixture
def install(install: Install) -> Install:
    return partial(install, code=MODULE)


def strategy(name: str, options: dict[str, Any]) -> Any:
    return build("strategies", name, options)


def test_ours_are_listed_as_the_project_file_says() -> None:
    for group in GROUPS:
        ours = {name: entry.value for name, entry in entries(group).items() if entry.ours}
        assert ours == PROJECT["entry-points"].get(f"fedloom.{group}", {})
        assert {entry.version for entry in entries(group).values() if entry.ours} <= {PROJECT["version"]}
    assert {key.removeprefix("fedloom.") for key in PROJECT["entry-points"]} <= set(GROUPS)


@pytest.mark.parametrize(("group", "name"), REGISTERED)
def test_ours_have_no_faults_and_describe_every_option(group: str, name: str) -> None:
    if group == "recorders":
        pytest.importorskip({"tensorboard": "tensorboard", "mlflow": "mlflow"}[name])

    assert faults(group, name) == []
    properties = options_model(group, name).model_json_schema().get("properties", {})
    assert [key for key, each in properties.items() if len(each.get("description", "")) < 5] == []


@pytest.mark.parametrize("group", ["strategies", "codecs"])
def test_a_coordinator_lists_and_builds_without_torch(group: str) -> None:
    code = (
        "import sys\n"
        "from fedloom.core.registry import GROUPS, build, entries\n"
        "found = [entries(each) for each in GROUPS]\n"
        "assert not {'numpy', 'torch', 'grpc'} & set(sys.modules), 'listing imports'\n"
        f"for name, each in entries({group!r}).items():\n"
        f"    each.ours and build({group!r}, name, {{}})\n"
        "assert 'numpy' in sys.modules\n"
        "assert not {'torch', 'transformers', 'peft', 'opacus'} & set(sys.modules)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 0, done.stderr


def test_options_reach_the_component() -> None:
    assert strategy("ffa", {"orthonormal": True, "train_head": False}) == FFA(orthonormal=True, train_head=False)
    assert strategy("fedsvd", {"period": 5}) == FedSVD(period=5)
    assert strategy("fedpeft", {"kind": "bias"}) == FedPEFT(kind="bias")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fedsdv", {}, "unknown strategy 'fedsdv'; did you mean 'fedsvd'\\? available: .*fedavg"),
        ("fedloom.strategies.ffa:FFA", {}, "unknown strategy"),
        ("os:system", {}, "unknown strategy 'os:system'; available"),
        ("fedsvd", {"periods": 1}, "no option 'periods'; did you mean 'period'\\?.*period: int = 1, singular_values: "),
        ("fedsvd", {"period": "1"}, "option 'period' of strategy 'fedsvd' is '1'; allowed: period: int = 1"),
        ("fedsvd", {"period": True}, "is True"),
        ("fedsvd", {"period": 1.0}, "is 1.0"),
        ("fedsvd", {"period": 0}, "period is 0; set a number of rounds from 1 up"),
        ("ffa", {"orthonormal": 1}, "is 1; allowed: orthonormal: bool = False"),
        ("fedpeft", {"kind": "prompt"}, "kind: 'lora' \\| 'bias' \\| 'adapter' \\| 'head' = 'lora'"),
        ("fedpeft", {"kind": "head", "train_head": False}, "trains nothing"),
        ("fedsvd", {"period": object()}, "strategy 'fedsvd' got options that no run file can hold.*plain values"),
    ],
)
def test_what_is_wrong_is_named(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        strategy(name, options)


def test_an_unknown_group_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown group of components 'codec'; did you mean 'codecs'\\? available:"):
        entries("codec")


def test_a_third_party_component_is_listed_and_built_like_ours(install: Install) -> None:
    install("slow-federation", "slow", "slow_federation:Slow")

    entry = entries("strategies")["slow"]

    assert (entry.distribution, entry.version, entry.ours) == ("slow-federation", "1.5", False)
    assert (load("strategies", "slow").__doc__ or "").startswith("Average slowly.")
    assert "slow_federation" in sys.modules
    # A whole number is fine where a float is meant: TOML writers drop the point.
    for rate in (0.25, 1):
        assert strategy("slow", {"rate": rate}).rate == rate
    assert strategy("slow", {"steps": [0.5, 1]}).steps == (0.5, 1.0)
    properties = options_model("strategies", "slow").model_json_schema()["properties"]
    assert properties["rate"]["description"] == "Share of the mean change that is applied."
    assert properties["mode"]["enum"] == [1, "one"]
    assert properties["few"]["maximum"] == 9


def test_listing_does_not_import(install: Install) -> None:
    install("slow-federation", "slow", "slow_federation:Slow")

    assert "slow" in entries("strategies")
    assert "slow_federation" not in sys.modules


def test_a_pydantic_model_checks_its_own_options(install: Install) -> None:
    install("slow-federation", "odd", "slow_federation:Model", "partitioners")

    assert build("partitioners", "odd", {"high": 3}).high == 3.0
    for options, words in (
        ({"hihg": 1}, "partitioner 'odd' has no option 'hihg'; did you mean 'high'\\?"),
        ({"high": "1"}, "option 'high' of partitioner 'odd' is '1'; allowed: low: float = 0.0, high: float = 1.0"),
        ({"low": 2}, "partitioner 'odd' refuses its options {'low': 2}: low 2.0 is above high 1.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            build("partitioners", "odd", options)


def test_a_value_out_of_range_says_the_range(install: Install) -> None:
    install("slow-federation", "slow", "slow_federation:Slow")

    with pytest.raises(ConfigError, match=r"'few' of strategy 'slow' is 0 \(input should be greater than or equal to"):
        strategy("slow", {"few": 0})
    with pytest.raises(ConfigError, match=r"is inf \(input should be a finite number\); allowed: "):
        strategy("slow", {"rate": float("inf")})


def test_one_name_from_two_distributions_is_refused(install: Install) -> None:
    install("slow-federation", "fedavg", "slow_federation:Slow")

    for call in (lambda: entries("strategies"), lambda: strategy("ffa", {})):
        with pytest.raises(ConfigError, match=r"'fedavg' is registered by both .*uninstall one"):
            call()
    assert entries("codecs") is not None


def test_a_broken_plugin_is_shown_and_does_not_stop_the_others(install: Install) -> None:
    install("slow-federation", "absent", "no_such_module_here:Slow")

    (fault,) = faults("strategies", "absent")

    assert "strategy 'absent' of slow-federation cannot be imported: No module named 'no_such_module_here'" in fault
    assert "reinstall" in fault
    with pytest.raises(ConfigError, match="cannot be imported"):
        strategy("absent", {})
    assert strategy("ffa", {}) == FFA()


def test_an_extra_of_the_components_name_is_what_to_install(install: Install) -> None:
    install("slow-federation", "absent", "no_such_module_here:Slow", extra="absent")

    with pytest.raises(ConfigError, match=r"no_such_module_here'; install slow-federation\[absent\]"):
        strategy("absent", {})


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("Missing", {}, "cannot be imported"),
        ("NUMBER", {}, "is not callable; register its class"),
        ("refuse", {}, "refuses its options {}: not today"),
        ("loose", {}, r"strategy 'odd' takes \*options; name every option"),
        ("Empty", {}, "needs option 'need'; allowed: need: int"),
        ("Empty", {"need": 1}, "is no strategy: it lacks init, plan, check, fold, commit, result, traits"),
    ],
)
def test_what_is_registered_must_be_a_component(
    install: Install, target: str, options: dict[str, object], words: str
) -> None:
    install("slow-federation", "odd", f"slow_federation:{target}")

    with pytest.raises(ConfigError, match=words):
        strategy("odd", options)
    assert faults("strategies", "odd")


def test_true_does_not_pass_for_the_choice_one(install: Install) -> None:
    install("slow-federation", "slow", "slow_federation:Slow")

    assert strategy("slow", {"mode": 1}).mode == 1
    with pytest.raises(ConfigError, match=r"is True; allowed: .*mode: 1 \| 'one' = 1"):
        strategy("slow", {"mode": True})
