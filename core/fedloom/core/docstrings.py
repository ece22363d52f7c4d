"""What a Google-style docstring says: its summary, its text and its arguments."""

import ast
import re
from importlib.machinery import PathFinder

__all__ = ["arguments", "prose", "summary", "summary_of"]


def summary(text: str) -> str:
    """The first line."""
    return text.strip().partition("\n")[0]


def prose(text: str) -> str:
    """All that comes before the parts called "Args:" and "Raises:"."""
    return re.split(r"\n\s*(?:Args|Raises):\n", text)[0].strip()


def arguments(text: str) -> dict[str, str]:
    """What the "Args:" part says of each argument, each in one line."""
    _, _, part = text.partition("\nArgs:\n")
    part = re.split(r"\n\S", part)[0]
    return {name: " ".join(about.split()) for name, about in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", part, re.M)}


def summary_of(value: str) -> str:
    """The summary of `module:object`, read from its source: nothing is imported; "" where it cannot be found."""
    module, _, name = value.partition(":")
    path: list[str] | None = None
    spec = None
    for end in range(len(parts := module.split("."))):
        spec = PathFinder.find_spec(".".join(parts[: end + 1]), path)
        if spec is None:
            return ""
        path = list(spec.submodule_search_locations or ())
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return ""
    with open(spec.origin, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = [node for node in tree.body if isinstance(node, kinds) and node.name == name]
    return summary(ast.get_docstring(found[0]) or "") if found else ""
