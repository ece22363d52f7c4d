"""What one machine can tell about its ledger: every change but a return to the past of everything at once."""

import json
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedloom.client.privacy.ledger import anchor as anchors_module
from fedloom.client.privacy.ledger import ledger as module
from fedloom.client.privacy.ledger.anchor import default_anchors, read_anchor
from fedloom.client.privacy.ledger.hash_chain import linked
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.privacy.ledger.recover import recover
from fedloom.core.errors import LedgerError
from fedloom.core.privacy.accounting import Spend, epsilon

NAME = "ab" * 16
SPEND = Spend(0.05, 1.0, 20)
MORE = Spend(0.1, 2.0, 7)
DELTA = 1e-5
ROUNDS = 3


@pytest.fixture(autouse=True)
def _no_accountant(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here depends on figures but the two tests that undo this."""
    monkeypatch.setattr(module, "epsilon", lambda *_: 0.0)
    yield
    monkeypatch.undo()


def opened(folder: Path, anchors: Path | None = None) -> Ledger:
    return Ledger(folder / "ledger", NAME, anchors=anchors or folder / "anchors")


def charge(ledger: Ledger, round: int) -> None:
    ledger.release(ledger.reserve("run", round, SPEND, budget=1.0, delta=DELTA), f"digest-{round}")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A closed account of 7 entries: opened, and three rounds charged and released."""
    home = tmp_path / "home"
    with opened(home) as ledger:
        for round in range(ROUNDS):
            charge(ledger, round)
    return home


def file(home: Path) -> Path:
    return home / "ledger" / f"{NAME}.ledger"


def the_anchor(home: Path) -> Path:
    (found,) = (home / "anchors").glob("*.anchor")
    return found


def refusal(home: Path, anchors: Path | None = None) -> str:
    """Why the account is refused, twice in the same words: a refusal leaves neither a lock nor a change."""
    words = []
    for _ in range(2):
        with pytest.raises(LedgerError) as refused:
            opened(home, anchors)
        words.append(str(refused.value))
    assert words[0] == words[1]
    assert "`fedloom ledger recover`" in words[0]
    return words[0]


def edit(home: Path, statement: str) -> None:
    with sqlite3.connect(file(home)) as db:
        assert db.execute(statement).rowcount > 0
    db.close()


@pytest.mark.parametrize("column", ["written", "kind", "body", "hash"])
@pytest.mark.parametrize("number", [1, 2, 4, 2 * ROUNDS + 1])
def test_an_edited_entry_is_refused(home: Path, column: str, number: int) -> None:
    value = {"written": "1.5", "kind": "'adopted'", "body": "'{}'", "hash": f"'{'0' * 64}'"}[column]
    edit(home, f"UPDATE entry SET {column} = {value} WHERE number = {number}")

    assert re.search(f"entry {number} is not the one that was written|does not say whose account", refusal(home))


def test_cheaper_steps_in_an_old_charge_are_refused(home: Path) -> None:
    edit(home, "UPDATE entry SET body = replace(body, '\"steps\":20', '\"steps\":1') WHERE number = 2")

    assert "entry 2 is not the one that was written" in refusal(home)


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("number = 1", "does not say whose account"),
        ("number = 3", "entry 3 is not"),
        ("number > 1", "ends with entry 1, but its anchor knows entry 7"),
        ("number > 0", "all its entries are gone"),
    ],
)
def test_a_deleted_entry_is_refused(home: Path, which: str, words: str) -> None:
    edit(home, f"DELETE FROM entry WHERE {which}")

    assert words in refusal(home)


def test_a_history_that_was_rewritten_with_sound_hashes_is_refused(home: Path, tmp_path: Path) -> None:
    forged = tmp_path / "forged"
    with opened(forged) as ledger:
        for round in range(ROUNDS):
            charge(ledger, 10 + round)
    with sqlite3.connect(file(home)) as db:  # into the same file, so that only the hashes can tell
        db.execute("ATTACH ? AS forged", (str(file(forged)),))
        db.execute("UPDATE forged.entry SET body = (SELECT body FROM main.entry WHERE number = 1) WHERE number = 1")
        before = None
        for kind, body, written in db.execute("SELECT kind, body, written FROM forged.entry ORDER BY number"):
            before = linked(before, kind, json.loads(body), written)
            row = (before.written, before.body, before.hash, before.number)
            db.execute("UPDATE entry SET written = ?, body = ?, hash = ? WHERE number = ?", row)
    db.close()

    assert "entry 7 is not the one its anchor knows: its history was rewritten" in refusal(home)


@pytest.mark.parametrize("size", [0, 1, 100, 4095, 4096, 6000])
def test_a_shortened_file_is_refused(home: Path, size: int) -> None:
    content = file(home).read_bytes()
    file(home).write_bytes(content[:size])

    refusal(home)


@pytest.mark.parametrize("start", [0, 4096], ids=["header", "pages"])
def test_a_damaged_file_is_refused(home: Path, start: int) -> None:
    content = bytearray(file(home).read_bytes())
    content[start : start + 1000] = b"\xa5" * 1000
    file(home).write_bytes(content)

    refusal(home)


@pytest.mark.parametrize("rounds", [1, 2])
def test_an_older_copy_of_the_file_is_refused(home: Path, rounds: int) -> None:
    older = file(home).read_bytes()
    with opened(home) as ledger:
        for round in range(rounds):
            charge(ledger, 10 + round)
    file(home).write_bytes(older)

    assert f"ends with entry 7, but its anchor knows entry {7 + 2 * rounds}" in refusal(home)


def test_an_older_copy_of_the_anchor_is_refused(home: Path) -> None:
    older = the_anchor(home).read_bytes()
    with opened(home) as ledger:
        charge(ledger, 10)
    the_anchor(home).write_bytes(older)

    assert "it has 9 entries, but its anchor knows only 7" in refusal(home)


def test_an_anchor_one_entry_behind_is_what_a_crash_leaves(home: Path) -> None:
    with opened(home) as ledger:
        older = the_anchor(home).read_bytes()
        ledger.reserve("run", 10, SPEND, budget=1.0, delta=DELTA)
    the_anchor(home).write_bytes(older)

    with opened(home) as ledger:
        assert len(ledger.charges()) == ROUNDS + 1
    known = read_anchor(the_anchor(home))
    assert known is not None
    assert (known.sequence, known.steps) == (8, {(0.05, 1.0): 80})


def test_a_deleted_ledger_is_missed(home: Path) -> None:
    file(home).unlink()

    assert f"the ledger {NAME} of {home / 'ledger'}, of 7 entries, is gone" in refusal(home)
    with pytest.raises(LedgerError, match="is gone"):
        Ledger(home / "ledger", "other data", anchors=home / "anchors")
    assert not file(home).exists()


def test_a_deleted_folder_is_missed_when_its_anchor_is_elsewhere(home: Path) -> None:
    shutil.rmtree(home / "ledger")

    assert "is gone" in refusal(home)


def test_a_deleted_anchor_is_missed(home: Path) -> None:
    the_anchor(home).unlink()

    assert "its anchor is missing" in refusal(home)


@pytest.mark.parametrize("position", [0, 40, -1])
def test_a_damaged_anchor_is_refused(home: Path, position: int) -> None:
    content = bytearray(the_anchor(home).read_bytes())
    content[position] ^= 1
    the_anchor(home).write_bytes(content)

    assert "anchor" in refusal(home)
    assert "is damaged" in refusal(home)


def test_a_clone_in_another_folder_is_refused_and_the_original_goes_on(home: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(home / "ledger", clone / "ledger")

    assert f"it was kept in {home / 'ledger'}: it is a copy or was moved" in refusal(clone, home / "anchors")
    assert "its anchor is missing" in refusal(clone, tmp_path / "no anchors")
    with opened(home) as ledger:
        charge(ledger, 10)


def test_a_clone_with_its_anchor_is_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "clone")

    assert f"it was kept in {home / 'ledger'}" in refusal(tmp_path / "clone")


def test_a_clone_on_another_machine_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "machine-id"
    other.write_text("another\n")
    monkeypatch.setattr(anchors_module, "_MACHINE_ID", (other,))

    assert "it was kept on another machine" in refusal(home)


def test_a_copy_put_back_under_the_same_name_is_refused(home: Path) -> None:
    copy = home / "copy"
    shutil.copy(file(home), copy)
    copy.replace(file(home))

    assert "its file is another one than was written" in refusal(home)


def test_another_accounts_file_is_refused(home: Path, tmp_path: Path) -> None:
    other = "cd" * 16
    Ledger(tmp_path / "other", other).close()
    (tmp_path / "other" / f"{other}.ledger").write_bytes(file(home).read_bytes())

    with pytest.raises(LedgerError, match=f"it is the account {NAME}"):
        Ledger(tmp_path / "other", other)


def test_a_folder_has_one_account(home: Path) -> None:
    with pytest.raises(LedgerError, match=f"holds the account {NAME}, not cdcd.* set client.state to another folder"):
        Ledger(home / "ledger", "cd" * 16, anchors=home / "anchors")

    opened(home).close()  # the refusal left no file


def test_a_file_of_other_tables_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    folder.mkdir()
    with sqlite3.connect(folder / f"{NAME}.ledger") as db:
        db.execute("CREATE TABLE charge (steps INTEGER)")
    db.close()

    assert "it has the tables charge instead of entry" in refusal(tmp_path)


def test_an_entry_that_no_client_writes_is_refused(home: Path) -> None:
    with opened(home) as ledger, pytest.raises(LedgerError, match="entry 8 is none that a client writes"):
        ledger.append("charged", {"run": "run", "round": 0, "sampling_rate": 2.0, "noise_multiplier": 1, "steps": 1})

    assert "entry 8 is none that a client writes" in refusal(home)


def test_anchors_lie_where_the_system_keeps_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_anchors() == tmp_path / "fedloom"

    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_anchors() == tmp_path / ".local" / "state" / "fedloom"


def adopted(home: Path, *spent: Spend) -> Ledger:
    recover(home / "ledger", home / "anchors", reason="the disk died", spent=spent or None)
    return opened(home)


def spends(ledger: Ledger) -> dict[tuple[str, Spend], int]:
    counts: dict[tuple[str, Spend], int] = {}
    for each in ledger.charges():
        counts[each.run, each.spend] = counts.get((each.run, each.spend), 0) + 1
    return counts


LOST: dict[str, Callable[[Path], object]] = {
    "deleted": lambda home: file(home).unlink(),
    "cut to nothing": lambda home: file(home).write_bytes(b""),
    "cut": lambda home: file(home).write_bytes(file(home).read_bytes()[:5000]),
    "edited": lambda home: edit(home, "UPDATE entry SET body = '{}' WHERE number = 2"),
    "emptied": lambda home: edit(home, "DELETE FROM entry"),
}


@pytest.mark.parametrize("how", LOST)
def test_an_adoption_charges_what_the_anchor_knows_of_a_lost_ledger(home: Path, how: str) -> None:
    account = the_anchor(home).stem
    LOST[how](home)

    with adopted(home, MORE) as ledger:
        assert spends(ledger) == {("adopted", Spend(0.05, 1.0, 60)): 1, ("adopted", MORE): 1}
        assert ledger.account == account
        assert '"reason":"the disk died"' in ledger.entries[1].body
    assert sorted(path.name for path in (home / "ledger").glob("*.refused-1*")) == (
        [] if how == "deleted" else [f"{NAME}.ledger.refused-1"]
    )


def test_an_adoption_of_an_older_copy_charges_the_difference(home: Path) -> None:
    older = file(home).read_bytes()
    with opened(home) as ledger:
        charge(ledger, 10)
        ledger.reserve("run", 11, MORE, budget=1.0, delta=DELTA)
    file(home).write_bytes(older)

    with adopted(home) as ledger:
        assert spends(ledger) == {("run", SPEND): ROUNDS, ("adopted", SPEND): 1, ("adopted", MORE): 1}
        assert [each.digest for each in ledger.charges()][:ROUNDS] == [f"digest-{i}" for i in range(ROUNDS)]


def test_an_adopted_clone_goes_on_and_the_original_no_longer(home: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(home / "ledger", clone / "ledger")

    done = recover(clone / "ledger", home / "anchors", reason="moved", spent=None)

    assert done.found.startswith(f"{clone}")
    assert (done.restored, done.declared, done.aside) == ((), (), None)
    with opened(clone, home / "anchors") as ledger:
        assert spends(ledger) == {("run", SPEND): ROUNDS}
        assert ledger.entries[-1].kind == "adopted"
    assert "is a copy or was moved" in refusal(home)


def test_an_adoption_without_any_knowledge_needs_a_declaration(home: Path) -> None:
    file(home).unlink()
    the_anchor(home).unlink()

    with pytest.raises(LedgerError, match="declare it with --spent RATE:NOISE:STEPS"):
        adopted(home)
    done = recover(home / "ledger", home / "anchors", reason="the disk died", spent=[MORE, SPEND])
    with Ledger(home / "ledger", done.path.stem, anchors=home / "anchors") as ledger:
        assert spends(ledger) == {("adopted", MORE): 1, ("adopted", SPEND): 1}


def test_a_sound_ledger_takes_a_declaration_but_no_adoption(home: Path) -> None:
    with pytest.raises(LedgerError, match="is sound; there is nothing to recover"):
        adopted(home)

    with adopted(home, MORE) as ledger:
        assert spends(ledger) == {("run", SPEND): ROUNDS, ("adopted", MORE): 1}


@pytest.mark.parametrize("how", ["older", "edited"])
def test_a_crash_in_an_adoption_loses_no_charge(home: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    from fedloom.client.privacy.ledger import recover as adoption

    older = file(home).read_bytes()
    with opened(home) as ledger:
        charge(ledger, 10)
    if how == "older":
        file(home).write_bytes(older)
    else:
        LOST[how](home)
    for name in ("connect", "add", "Anchor"):  # before the new ledger, before its entries, before the anchor
        with monkeypatch.context() as crash:
            crash.setattr(adoption, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            if name == "connect" and how == "older":
                continue  # nothing was begun
            with pytest.raises(KeyboardInterrupt):
                adopted(home)
        refusal(home)

    with adopted(home) as ledger:
        monkeypatch.undo()
        assert ledger.epsilon(DELTA) == epsilon([SPEND] * (ROUNDS + 1), DELTA)
