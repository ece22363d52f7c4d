"""Tensors that a client trains and keeps: durable, bound to their run, and never uploaded once they were personal."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.personal_tensors import Personal, kept_personal
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.errors import LedgerError, PolicyError
from fedloom.core.schema import Role
from tests.client.rounds import assignment, start

HEAD = frozenset({Role.HEAD})
KEEPING = assignment(personal=HEAD)
LATER = assignment(round=1)
"""A plan that calls nothing personal any more."""


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger", "ab") as opened:
        yield opened


@pytest.fixture
def make(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger, tmp_path: Path
) -> Callable[..., Trainer]:
    """Makes the client's trainer, as a process of its own would."""
    return lambda folder=tmp_path / "personal": Trainer(tiny_model, rows, spec, policy, ledger, personal=folder)


@pytest.mark.parametrize("restarted", [False, True])
def test_what_was_personal_is_never_uploaded_whatever_a_later_plan_says(
    make: Callable[..., Trainer], ledger: Ledger, tiny_model: AdapterModel, restarted: bool
) -> None:
    trainer = make()
    trainer.train("run", KEEPING, start(tiny_model))
    trainer = make() if restarted else trainer

    with pytest.raises(PolicyError, match="asks for an update of head in round 2; that was personal"):
        trainer.train("run", LATER, start(tiny_model, seed=6))
    assert [charge.round for charge in ledger.charges()] == [0]

    # Another run has nothing of it, and without a folder the same holds while the process lives.
    assert trainer.personal("another") == {}
    trainer.train("another", LATER, start(tiny_model, seed=6))
    forgetful = make(None)
    forgetful.train("run", replace(KEEPING, round=1), start(tiny_model))
    with pytest.raises(PolicyError, match="that was personal"):
        forgetful.train("run", replace(LATER, round=0), start(tiny_model))


def test_a_client_that_is_started_again_goes_on_with_what_it_kept(
    make: Callable[..., Trainer], tiny_model: AdapterModel
) -> None:
    first = make()
    first.train("run", KEEPING, start(tiny_model))
    mine = first.personal("run")
    assert {name for name, _ in mine.items()} == {s.name for s in tiny_model.schema.select(HEAD).tensors}

    again = make()
    for name, value in again.personal("run").items():
        np.testing.assert_array_equal(value, mine[name])
    # What is not trained this time is used as it is, and not as it is broadcast.
    again.train("run", assignment(train=frozenset({Role.LORA_B}), round=1), start(tiny_model, seed=6))
    for name, value in tiny_model.read(tiny_model.schema.select(HEAD)).items():
        np.testing.assert_array_equal(value, mine[name])


@pytest.mark.parametrize("at", [0, 30, 100, -1])
def test_damaged_personal_tensors_are_named_and_nothing_is_trained(
    make: Callable[..., Trainer], ledger: Ledger, tiny_model: AdapterModel, tmp_path: Path, at: int
) -> None:
    make().train("run", KEEPING, start(tiny_model))
    (path,) = (tmp_path / "personal").iterdir()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)

    with pytest.raises(LedgerError, match=r"personal tensors .* cannot be read: .*; restore the file, or remove it"):
        make().train("run", replace(KEEPING, round=1), start(tiny_model))
    assert len(ledger.charges()) == 1


def test_the_file_of_another_run_or_adapter_is_refused(
    make: Callable[..., Trainer], tiny_model: AdapterModel, tmp_path: Path
) -> None:
    folder = tmp_path / "personal"
    make().train("run", KEEPING, start(tiny_model))
    (path,) = folder.iterdir()
    make().train("other", replace(KEEPING, round=1), start(tiny_model))
    (other,) = set(folder.iterdir()) - {path}
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    with pytest.raises(LedgerError, match="another run's or client's"):
        kept_personal(folder, "run", "site-a")

    path.write_bytes(content)
    fewer = replace(tiny_model.schema, tensors=tiny_model.schema.tensors[:2])
    wider = replace(
        tiny_model.schema, tensors=tuple(replace(t, shape=(*t.shape, 1)) for t in tiny_model.schema.tensors)
    )
    for schema in (fewer, wider):
        with pytest.raises(LedgerError, match="personal tensors of run 'run' are not this adapter's"):
            Personal(folder, "site-a", schema).of("run")
