"""The JSON Schema of a run file allows what the parser allows, and knows which options belong to which component."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from fedloom.core.config.json_schema import run_file_schema

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = run_file_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def example(**sections: dict[str, Any]) -> dict[str, Any]:
    return tomllib.loads((EXAMPLES / "sentiment.toml").read_text()) | sections


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_example_is_valid(path: Path, validator: Draft202012Validator) -> None:
    assert list(validator.iter_errors(tomllib.loads(path.read_text()))) == []


@pytest.mark.parametrize(
    ("sections", "where"),
    [
        ({"adapter": {"kind": "lorra"}}, ["adapter", "kind"]),
        ({"adapter": {"kind": "lora", "biases": True}}, ["adapter"]),
        ({"wire": {"upload": "fp33"}}, ["wire", "upload"]),
        ({"strategy": {"name": "fedsvd", "options": {"perod": 3}}}, ["strategy", "options"]),
        ({"strategy": {"name": "fedsvd", "options": {"period": "often"}}}, ["strategy", "options", "period"]),
        ({"strategy": {"options": {"period": 1}}}, ["strategy", "options"]),  # fedavg, the default, has no period
        ({"data": {"source": "x", "partition": "iid", "dirichlet_alpha": 1.0}}, ["data"]),
    ],
)
def test_a_wrong_name_or_option_is_found_where_it_is(
    sections: dict[str, Any], where: list[str], validator: Draft202012Validator
) -> None:
    assert [list(error.absolute_path) for error in validator.iter_errors(example(**sections))] == [where]


def test_an_option_is_allowed_where_its_component_is_named(validator: Draft202012Validator) -> None:
    named = example(
        strategy={"name": "fedsvd", "options": {"period": 2}},
        data={"source": "x", "partition": "dirichlet", "dirichlet_alpha": 1.0},
    )

    assert list(validator.iter_errors(named)) == []
