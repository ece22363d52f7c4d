"""The tutorial's adapter kind, installed beside fedloom, is found everywhere that kinds are looked for.

`tests/docs/test_snippets.py` trains it; here nothing of fedloom is edited and no model is loaded.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

import fedloom.api as fl
from docs import make_reference
from fedloom.cli.main import app
from fedloom.client.policy import Policy, check_spec
from fedloom.core.config.run import RunConfig, Spec
from fedloom.core.errors import ConfigError, PolicyError
from fedloom.core.registry import load
from tests.docs.blocks import blocks

RUN: dict[str, dict[str, Any]] = {
    "run": {"name": "demo", "rounds": 1},
    "model": {"base": "x", "labels": ["a", "b"]},
    "adapter": {"kind": "norms", "biases": False},
    "train": {"steps": 1, "sampling_rate": 0.1, "learning_rate": 1.0},
    "privacy": {"enabled": False},
}
SITE: dict[str, dict[str, Any]] = {
    "client": {"name": "ada"},
    "data": {"source": "rows"},
    "privacy": {"allow_non_private": True},
}


@pytest.fixture
def norms(install: Callable[..., None]) -> None:
    (code,) = (each.text for each in blocks("tutorial-adapter.md") if each.mark == "file=norms/src/fedloom_norms.py")
    install("fedloom-norms", "norms", "slow_federation:Norms", "adapters", code=code)


def components(*words: str) -> str:
    done = CliRunner().invoke(app, ["components", *words], env={"COLUMNS": "220"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.usefixtures("norms")
def test_it_is_listed_with_its_package_and_checked() -> None:
    (found,) = (row for row in json.loads(components("list", "adapters", "--json")) if row["name"] == "norms")

    assert (found["distribution"], found["version"]) == ("fedloom-norms", "1.5")
    assert found["summary"] == "The layer norms of the base model, and nothing else."
    assert "fedloom-norms" in components("list", "adapters")
    assert ", 0 faults" in components("check", "adapters")


@pytest.mark.usefixtures("norms")
def test_its_options_have_a_schema_a_page_and_a_place_in_the_run_file() -> None:
    schema = json.loads(components("show", "adapters", "norms", "--json"))["options"]["properties"]
    assert schema["biases"] == {
        "default": True,
        "description": "Whether the norms' biases are trained too.",
        "title": "Biases",
        "type": "boolean",
    }
    page = " ".join(components("show", "adapters", "norms").split())
    assert "Whether the norms' biases are trained too." in page
    assert "slow_federation:Norms, of fedloom-norms 1.5" in page

    run_file = Draft202012Validator(json.loads(components("schema")))
    assert list(run_file.iter_errors(RUN)) == []
    assert [error.absolute_path[-1] for error in run_file.iter_errors(RUN | {"adapter": {"kind": "norms", "bias": 1}})]

    config = RunConfig.model_validate(RUN)
    config.check_components()
    assert config.adapter.built().biases is False
    wrong = RunConfig.model_validate(RUN | {"adapter": {"kind": "norms", "bias": False}})
    with pytest.raises(ConfigError, match=r"unknown key 'adapter\.bias'; did you mean 'biases'\?"):
        wrong.check_components()


@pytest.mark.usefixtures("norms")
def test_as_an_object_it_is_an_installed_kind() -> None:
    run = fl.Run(
        model="x",
        task=fl.TextClassification(labels=("a", "b")),
        adapter=load("adapters", "norms")(biases=False),
        train=fl.Train(steps=1, sampling_rate=0.1),
    )

    assert run.local == {}
    assert 'kind = "norms"\nbiases = false' in run.to_toml()


@pytest.mark.usefixtures("norms")
def test_a_site_refuses_it_until_its_policy_names_it() -> None:
    spec = Spec.model_validate(RUN)
    refused = (
        r"adapter 'norms' of the package fedloom-norms "
        r'\(components\.adapters = \["fedloom"\]; add "norms" to allow it\)'
    )

    with pytest.raises(PolicyError, match=refused):
        check_spec(Policy.model_validate(SITE), spec)
    for allowed in (["fedloom", "norms"], ["norms"], ["*"]):
        check_spec(Policy.model_validate(SITE | {"components": {"adapters": allowed}}), spec)


@pytest.mark.usefixtures("norms")
def test_the_reference_is_that_of_fedloom_whatever_else_is_installed() -> None:
    assert make_reference.reference() == make_reference.TARGET.read_text(encoding="utf-8")


def test_without_its_package_a_run_file_that_names_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"kind = 'norms': no such adapter; allowed: bias, "):
        RunConfig.model_validate(RUN)
