"""What a refactor may change without a mutation being written anew, and what is refused."""

import ast
from pathlib import Path

import pytest

from tests.mutations.patterns import mutate

SOURCE = """
from math import inf

class Ledger:
    limit: float = Field(gt=0, le=5)

    def reserve(self, asked, budget):
        after = self.total + asked
        if after > budget:
            raise OverBudget(after)
        self.write(after, flush=True)
        return after
"""


def changed(root: Path, find: str, replace: str, *, source: str = SOURCE, symbol: str = "Ledger.reserve") -> str:
    """The source after the change, parsed and dumped."""
    path = root / "client" / "fedloom" / "client" / "privacy" / "ledger.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    mutation = {"symbol": f"fedloom.client:{symbol}", "find": find, "replace": replace}
    return ast.dump(ast.parse(mutate(root, mutation)[1]))


def expected(old: str, new: str) -> str:
    assert SOURCE.count(old) == 1
    return ast.dump(ast.parse(SOURCE.replace(old, new)))


@pytest.mark.parametrize(
    ("find", "replace", "old", "new"),
    [
        ("$after > $budget", "$after > 2 * $budget", "after > budget", "after > 2 * budget"),
        ("if $after > $budget: ...", "if $after > inf: ...", "after > budget", "after > inf"),
        ("self.write($after, flush=True)", "", "        self.write(after, flush=True)\n", ""),
        ("flush=True", "flush=asked", "flush=True", "flush=asked"),
        ("if after > budget: ...", "...", "        if after > budget:\n            raise", "        raise"),
        ("raise $error", "", "raise OverBudget(after)", "pass"),
        ("$x = self.total + $y", "$x = $y\n$x += self.total", "= self.total + asked", "= asked; after += self.total"),
    ],
)
def test_what_fits_is_replaced_and_nothing_else(tmp_path: Path, find: str, replace: str, old: str, new: str) -> None:
    assert changed(tmp_path, find, replace) == expected(old, new)


def test_a_field_is_a_symbol_too(tmp_path: Path) -> None:
    assert changed(tmp_path, "gt=0", "ge=0", symbol="Ledger.limit") == expected("gt=0", "ge=0")


def test_wrapping_comments_and_names_of_variables_do_not_matter(tmp_path: Path) -> None:
    source = SOURCE.replace("after", "sum_").replace("sum_ > budget", "(\n  sum_  # with this\n  > budget)")

    found = changed(tmp_path, "$after > $budget", "False", source=source)

    assert found == expected("after > budget", "False").replace("'after'", "'sum_'")


@pytest.mark.parametrize(
    ("find", "replace", "symbol", "told"),
    [
        ("$after >= $budget", "False", "Ledger.reserve", "fits 0 places"),
        ("$after", "False", "Ledger.reserve", r"fits \d\d places"),
        ("$after > $budget", "$most > 1", "Ledger.reserve", r"\$most is in `replace` and not in `find`"),
        ("$after > $budget", "most > 1", "Ledger.reserve", "`replace` has most, which nothing binds"),
        ("$after > $budget", "False", "Ledger.reserved", "near it are Ledger.reserve"),
    ],
)
def test_what_fits_not_once_or_would_fail_by_itself_is_refused(
    tmp_path: Path, find: str, replace: str, symbol: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        changed(tmp_path, find, replace, symbol=symbol)


def test_a_symbol_of_two_modules_needs_a_longer_package(tmp_path: Path) -> None:
    changed(tmp_path, "$after > $budget", "False")
    other = tmp_path / "client" / "fedloom" / "client" / "other.py"
    other.write_text(SOURCE)

    with pytest.raises(ValueError, match="name a package that holds only one"):
        mutate(tmp_path, {"symbol": "fedloom.client:Ledger.reserve", "find": "x", "replace": "y"})
    path, _ = mutate(tmp_path, {"symbol": "fedloom.client.other:Ledger.limit", "find": "gt=0", "replace": "ge=0"})

    assert tmp_path / path == other
