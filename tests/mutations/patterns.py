"""Mutations written as code: where a symbol's syntax tree fits `find`, `replace` takes its place.

Only syntax trees are compared, so wrapping, comments and quotes do not matter, nor in which module of its package a
symbol stands. `$name` stands for any expression, the same one wherever the mutation repeats it; with it for local
variables, renaming them does not matter either. `...` as the body of an `if`, `for` or `with` stands for any body.
"""

import ast
import builtins
import copy
import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

__all__ = ["locate", "mutate"]

_ANY = "__any_"
_Bound = dict[str, Any]


def mutate(root: Path, mutation: dict[str, Any]) -> tuple[Path, str]:
    """The path of the module that a mutation changes, relative to `root`, and the module's source after the change.

    Args:
        root: Folder of the repository, whose parts are `PART/fedloom/PART/`.
        mutation: `symbol`, as `locate` takes it, and `find` and `replace`: an expression each, or a keyword argument
            `name=value` each, or statements each. An empty `replace` removes the statements.

    Raises:
        ValueError: `find` fits no place or several, or `replace` has a name that is not bound there.
    """
    path, name = locate(root, mutation["symbol"])
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    body, index = dict(_definitions(tree))[name]
    held = ast.Module(body[index : index + 1], [])
    places = [each for pair in _readings(mutation["find"], mutation["replace"]) for each in _places(held, *pair)]
    if len(places) != 1:
        raise ValueError(
            f"`find` fits {len(places)} places of {mutation['symbol']}, and must fit one; "
            f"write it for what now stands there:\n{ast.unparse(held)}"
        )
    node, field, start, length, new = places[0]
    _check_bound(new, tree, held)
    value = getattr(node, field)
    if isinstance(value, list):
        value[start : start + length] = new
        if not value and field == "body":
            value.append(ast.Pass())
    else:
        setattr(node, field, new[0])
    body[index : index + 1] = held.body
    return path, ast.unparse(tree) + "\n"


def locate(root: Path, symbol: str) -> tuple[Path, str]:
    """The path of the module that defines a symbol, relative to `root`, and the symbol's name in it.

    Args:
        root: Folder of the repository.
        symbol: `PACKAGE:NAME`, such as `fedloom.client:Ledger.reserve`. The package is the module or any package
            above it; the name is that of a function, a class, a method, a field or a constant.

    Raises:
        ValueError: No module in the package defines the symbol, or several do.
    """
    package, _, name = symbol.partition(":")
    part = package.split(".")[1]
    base = root.joinpath(part, *package.split("."))
    modules = sorted(base.rglob("*.py")) or [base.with_suffix(".py")]
    known = [(path, each) for path in modules for each in _names(path)]
    found = [path.relative_to(root) for path, each in known if each == name]
    if len(found) != 1:
        near = get_close_matches(name, {each for _, each in known}, 3)
        raise ValueError(
            f"{symbol} is defined in {', '.join(map(str, found)) or 'no module'}, and must be in one; "
            + ("name a package that holds only one of them" if found else f"near it are {', '.join(near) or 'none'}")
        )
    return found[0], name


@cache
def _names(path: Path) -> frozenset[str]:
    return frozenset(name for name, _ in _definitions(ast.parse(path.read_text(encoding="utf-8"))))


def _definitions(
    holder: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, tuple[list[ast.stmt], int]]]:
    """Each name that a module or a class in it defines, and in which list of statements and where it does."""
    for index, node in enumerate(holder.body):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield prefix + name, (holder.body, index)
            case ast.Assign(targets=targets):
                for each in (each for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)):
                    yield prefix + each.id, (holder.body, index)
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name, (holder.body, index)
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{prefix}{node.name}.")


def _readings(find: str, replace: str) -> Iterator[tuple[list[ast.AST], list[ast.AST]]]:
    """What the two may be: two expressions, or else statements, which may also be keyword arguments."""
    old, new = (re.sub(r"\$(\w+)", rf"{_ANY}\1", dedent(code).strip()) for code in (find, replace))
    try:
        yield [ast.parse(old, mode="eval").body], [ast.parse(new, mode="eval").body]
    except SyntaxError:
        statements = ast.parse(old).body, ast.parse(new).body
        yield [*statements[0]], [*statements[1]]
        keywords = [_keyword(each) for each in (*statements[0], *statements[1])]
        if len(keywords) == 2 and all(keywords):
            yield [keywords[0]], [keywords[1]]  # type: ignore[list-item]  # none of them is None


def _keyword(node: ast.stmt) -> ast.keyword | None:
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return ast.keyword(name, value)
    return None


def _places(
    tree: ast.AST, find: list[ast.AST], replace: list[ast.AST]
) -> Iterator[tuple[ast.AST, str, int, int, list[ast.AST]]]:
    """Where consecutive nodes of one field fit: the node, its field, the first index, how many, and what replaces."""
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            several = value if isinstance(value, list) else [value]
            for start in range(len(several) - len(find) + 1):
                bound: _Bound = {}
                if all(_fits(each, several[start + i], bound) for i, each in enumerate(find)):
                    new = _Filled(bound).visit(ast.Module(copy.deepcopy(replace), []))  # type: ignore[arg-type]
                    yield node, field, start, len(find), new.body


def _fits(pattern: object, node: object, bound: _Bound) -> bool:
    match pattern:
        case ast.Name(id=name) if name.startswith(_ANY):
            return isinstance(node, ast.expr) and ast.unparse(bound.setdefault(name, node)) == ast.unparse(node)
        case ast.AST():
            fields = [each for each in pattern._fields if each != "ctx"]
            return type(pattern) is type(node) and all(
                _fits(getattr(pattern, each, None), getattr(node, each, None), bound) for each in fields
            )
        case [ast.Expr(ast.Constant(value=value))] if value is ...:
            bound["..."] = node
            return True
        case list():
            return (
                isinstance(node, list)
                and len(pattern) == len(node)
                and all(_fits(*pair, bound) for pair in zip(pattern, node, strict=True))
            )
    return type(pattern) is type(node) and pattern == node


class _Filled(ast.NodeTransformer):
    """Puts what each `$name` and `...` stands for in its place."""

    def __init__(self, bound: _Bound) -> None:
        self.bound = bound

    def visit_Name(self, node: ast.Name) -> Any:
        if not node.id.startswith(_ANY):
            return node
        if node.id not in self.bound:
            raise ValueError(f"${node.id.removeprefix(_ANY)} is in `replace` and not in `find`; only both may have it")
        return self.bound[node.id]

    def visit_Expr(self, node: ast.Expr) -> Any:
        if isinstance(node.value, ast.Constant) and node.value.value is ... and "..." in self.bound:
            return self.bound["..."]
        return self.generic_visit(node)


def _check_bound(new: list[ast.AST], module: ast.Module, symbol: ast.Module) -> None:
    """A name that is bound nowhere would raise, and any test kill the mutation for that."""
    imports = [each for each in module.body if isinstance(each, ast.Import | ast.ImportFrom)]
    names = {each for each, _ in _definitions(module)} | set(dir(builtins))
    names |= {each.id for each in ast.walk(symbol) if isinstance(each, ast.Name)}
    names |= {name for code in (*new, symbol, *imports) for each in ast.walk(code) for name in _binds(each)}
    used = {each.id for code in new for each in ast.walk(code) if isinstance(each, ast.Name)}
    if unbound := sorted(used - names):
        raise ValueError(f"`replace` has {', '.join(unbound)}, which nothing binds there; use what the symbol has")


def _binds(node: ast.AST) -> list[str]:
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
            return [name]
        case ast.alias(name=name, asname=other):
            return [(other or name).partition(".")[0]]
    return []
