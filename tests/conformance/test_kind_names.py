"""Components are told apart by what they say of themselves: no branch outside them is on a name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.core.registry import GROUPS, entries

ROOT = Path(__file__).parents[2]
PARTS = ("core", "proto", "strategies", "server", "client", "simulation", "flower", "cli", "conformance")
MODULES = {
    str(path.relative_to(ROOT / part)).removesuffix(".py").replace("/", "."): path
    for part in PARTS
    for path in sorted((ROOT / part / "fedloom").rglob("*.py"))
    if "_pb2" not in path.name
}
CLOSED = ("adapters", "optimizers", "codecs", "partitioners")
OTHER_THINGS = {
    # A column of a data file, and the coordinator's own optimiser (Reddi et al., 2021).
    "fedloom.core.config.file_format": {"group"},
    "fedloom.strategies.transforms.server_optimizer": {"adam"},
}
"""Words that are names of kinds, but mean something else there."""


def names() -> set[str]:
    """What our components of these groups are called."""
    return {name for group in CLOSED for name, entry in entries(group).items() if entry.ours}


def branches(tree: ast.AST, words: set[str]) -> Iterator[str]:
    """Where one of `words` decides something: comparisons, cases, and types of these words alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts: list[ast.expr] = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal"):
            parts = [node.slice]
        else:
            continue
        found = {each.value for part in parts for each in ast.walk(part) if isinstance(each, ast.Constant)}
        if found & words:
            yield f"line {getattr(node, 'lineno', 0)}: {', '.join(map(str, found & words))}"


def test_there_is_something_to_look_for_and_at() -> None:
    assert {"lora", "bias", "head", "sgd", "adam", "fp32", "iid"} <= names()
    assert len(MODULES) > 150
    assert OTHER_THINGS.keys() <= MODULES.keys()


def test_no_component_is_told_apart_by_its_name() -> None:
    own = {entry.value.partition(":")[0] for group in GROUPS for entry in entries(group).values() if entry.ours}
    found = [
        f"{module} {line}"
        for module, path in MODULES.items()
        if module not in own
        for line in branches(ast.parse(path.read_text(encoding="utf-8")), names() - OTHER_THINGS.get(module, set()))
    ]

    assert not found


@pytest.mark.parametrize(
    "code",
    ["x.kind == 'lora'", "kind in ('sgd', 'adam')", "match k:\n    case 'fp16': pass", "x: Literal['lora', 'other']"],
)
def test_a_branch_on_a_name_is_seen(code: str) -> None:
    assert list(branches(ast.parse(code), names()))
