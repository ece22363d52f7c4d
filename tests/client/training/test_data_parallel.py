"""Several processes of one client against one: the same sums, one charge, one draw of noise, and nothing that hangs."""

import csv
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedloom.client.data.rows import Rows
from fedloom.client.data.site_data import Own
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.prepare import prepare
from fedloom.client.training import data_parallel
from fedloom.client.training.data_parallel import Team
from fedloom.client.training.device import compute_of
from fedloom.client.training.gradients import Gradients
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.errors import ConfigError, DataError, ModelError
from fedloom.core.privacy.gaussian import Integers
from fedloom.core.schema import Array
from tests.client.rounds import ALL, Everyone, assignment, changed, start

Make = Callable[..., Trainer]


class Chosen:
    """Samples the examples of these numbers, by step, and draws noise from a seed."""

    def __init__(self, *steps: tuple[int, ...]) -> None:
        self.steps, self.noises, self._seeded = list(steps), 0, Seeded(11)

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        drawn = np.ones(count)
        drawn[list(self.steps.pop(0))] = 0.0
        return drawn

    def normal(self, deviation: int, count: int) -> Integers:
        self.noises += 1
        return self._seeded.normal(deviation, count)


def write(rows: Rows, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(zip(rows.texts, rows.labels, strict=True))


@pytest.fixture
def site(policy: Policy, rows: Rows, tmp_path: Path) -> Policy:
    """A site with data on disk, which each process reads for itself."""
    source = tmp_path / "data.csv"
    write(rows, source)
    return policy.model_copy(update={"data": policy.data.model_copy(update={"source": str(source)})})


@pytest.fixture
def make(site: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes the trainer of a client with so many processes, and accounts of its own."""
    with ExitStack() as stack:

        def made(processes: int, spec: Spec, own: Own | None = None) -> Trainer:
            monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / f"anchors-{processes}"))
            state = site.client.model_copy(update={"state": tmp_path / f"state-{processes}"})
            compute = site.compute.model_copy(update={"processes": processes})
            trainer = prepare(site.model_copy(update={"client": state, "compute": compute}), spec, own)
            if isinstance(trainer.ledger, Ledger):
                stack.callback(trainer.ledger.close)
            if isinstance(trainer.team, Team):
                stack.callback(trainer.team.close)
            return trainer

        yield made


def others(trainer: Trainer) -> list[data_parallel._Other]:
    assert isinstance(trainer.team, Team)
    return trainer.team._others


def differ(one: dict[str, Array], other: dict[str, Array]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def corrected(trainer: Trainer, values: dict[str, Array]) -> dict[str, Array]:
    """The broadcast with a correction of every frozen weight that has a pair."""
    rng, shapes = np.random.default_rng(3), {each.name: each.shape for each in trainer.schema.tensors}
    added = dict(values)
    for pair in trainer.schema.pairs:
        added[f"{pair.module}.base_A"] = rng.normal(0, 0.1, (1, shapes[pair.a][1])).astype(np.float32)
        added[f"{pair.module}.base_B"] = rng.normal(0, 0.1, (shapes[pair.b][0], 1)).astype(np.float32)
    return added


@pytest.mark.parametrize("private", [True, False], ids=["private", "open"])
def test_a_round_in_three_processes_is_that_of_one(
    private: bool, make: Make, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit where it is private: a row is computed alike whatever is beside it. To rounding otherwise."""
    run = changed(spec, train={"momentum": 0.5, "steps": 4, "sampling_rate": 0.5}, privacy={"enabled": private})
    one, three = make(1, run), make(3, run)
    values = start(one.model)
    failed: list[int | None] = []
    # Everybody; two, so that one process has none; nobody at all; one.
    steps = (tuple(range(40)), (3, 30), (), (7,))
    whole = three._loss

    def loss(indices: npt.NDArray[np.int64], length: int | None = None) -> torch.Tensor:
        if not failed:
            failed.append(length)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(indices, length)

    def rounds(trainer: Trainer) -> Iterator[dict[str, Array]]:
        trainer.microbatch.size = 5
        trainer._entropy_for = lambda number: Chosen(*steps)
        first = trainer.train("run", assignment(), values)
        assert (first.charge is not None) is private
        yield first.delta
        order = assignment(round=1, rank=2, base_rank=1)
        two = {each.name: values[each.name][tuple(map(slice, each.shape))] for each in one.schema.with_rank(2).tensors}
        yield trainer.train("run", order, corrected(trainer, two)).delta

    alone = list(rounds(one))
    together = list(rounds(three))

    for expected, found in zip(alone, together, strict=True):
        assert max(np.abs(value).max() for value in expected.values()) > 1e-2
        assert differ(expected, found) == 0.0 if private else differ(expected, found) < 1e-6
    if private:
        ledgers = [each.ledger for each in (one, three) if isinstance(each.ledger, Ledger)]
        assert [len(each.charges()) for each in ledgers] == [2, 2]
        assert ledgers[0].epsilon(1e-5) == ledgers[1].epsilon(1e-5)
    monkeypatch.setattr(three, "_loss", loss)
    three._entropy_for = lambda number: Chosen(*steps)
    again = three.train("other", assignment(), values).delta
    assert failed
    assert three.microbatch.size < 5
    assert differ(again, alone[0]) < 1e-5


def test_a_process_that_dies_ends_the_round_before_anything_of_the_step_is_noised(make: Make, spec: Spec) -> None:
    trainer, entropy = make(2, spec), Chosen((1, 2), (3, 4), (5, 6))
    trainer._entropy_for, calls = lambda number: entropy, 0

    def kill_before_the_second_step() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(others(trainer)[0]._process.pid, signal.SIGKILL)

    with pytest.raises(
        ModelError, match=r"process 2 of 2 of this client has ended with status -9; nothing of the step"
    ):
        trainer.train("run", assignment(), start(trainer.model), kill_before_the_second_step)

    assert entropy.noises == 1, "only the step before was noised"
    assert isinstance(trainer.ledger, Ledger)
    assert len(trainer.ledger.charges()) == 1
    assert trainer.ledger._released("run", 0) is None
    with pytest.raises(ModelError, match="the other processes of this client have ended"):
        trainer.train("run", assignment(), start(trainer.model))


@pytest.mark.parametrize("within", [True, False], ids=["within a step", "between two"])
def test_the_others_are_not_left_waiting_for_a_sum_that_does_not_come(within: bool, make: Make, spec: Spec) -> None:
    trainer, calls = make(2, spec), 0
    trainer._entropy_for = lambda number: Everyone()
    (other,) = others(trainer)

    def fail(*_: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if within or calls == 2:
            raise InterruptedError
        return torch.zeros(())

    def cancel() -> None:
        fail()

    if within:
        trainer._loss = fail  # type: ignore[assignment,method-assign]
    with pytest.raises(InterruptedError):
        trainer.train("run", assignment(), start(trainer.model), (lambda: None) if within else cancel)

    assert other._process.poll() == (-9 if within else None)
    if not within:  # a round that was cancelled leaves a client that goes on
        trainer.train("run", assignment(round=1), start(trainer.model))


def test_a_process_that_fails_or_hangs_says_so_once_and_the_others_end(make: Make, spec: Spec) -> None:
    trainer = make(3, spec)
    trainer._entropy_for = lambda number: Everyone()
    first, second = others(trainer)
    first.tell({"names": sorted(ALL), "sample": [10_000], "count": 2})
    second.tell({"names": sorted(ALL), "sample": [1], "count": 2})
    trainer.team._send(torch.zeros(trainer.schema.size))  # type: ignore[attr-defined]  # a Team

    with pytest.raises(ModelError, match=r"^process 2 of 3 of this client: \w+: "):
        first.hear()

    assert second.hear() == {}
    os.kill(second._process.pid, signal.SIGSTOP)
    second._line.settimeout(0.05)
    with pytest.raises(ModelError, match=r"process 3 of 3 of this client has not answered"):
        second.hear()
    trainer.team.close()  # type: ignore[attr-defined]
    assert second._process.returncode == -9


def test_other_rows_are_refused_before_anything_is_charged(
    make: Make, spec: Spec, rows: Rows, site: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(rows.take(np.arange(39)), Path(site.data.source))

    with pytest.raises(DataError, match=r"process 2 of 2 of this client has other rows than the first"):
        make(2, spec, Own(rows, None))


def test_another_base_model_is_refused(make: Make, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel, "base_digest", lambda folder: "sha256:" + "0" * 64)

    with pytest.raises(
        ModelError, match=r"process 2 of 2 of this client: base model .* has digest sha256:\w+; the run pins"
    ):
        make(2, spec)


def test_the_others_hold_no_ledger_open_no_port_to_a_network_and_end_with_the_first(make: Make, spec: Spec) -> None:
    trainer = make(2, spec)
    (other,) = others(trainer)
    state = str(trainer.policy.client.state)

    for pid in (other._process.pid, os.getpid()):
        assert {address for address in listening(pid)} <= {"0100007F", "00000000000000000000000001000000"}
    assert listening(other._process.pid), "gloo listens, so that something was looked at"
    assert not [each for each in opened(other._process.pid) if each.startswith(state)]
    assert [each for each in opened(os.getpid()) if each.startswith(state)]

    other._line.shutdown(2)
    assert other._process.wait(60) == 0


def opened(pid: int) -> list[str]:
    """What a process's descriptors are."""
    return [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()]


def listening(pid: int) -> set[str]:
    """Addresses, in hexadecimal, on which a process listens."""
    mine, found = set(opened(pid)), set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.add(fields[1].partition(":")[0])
    return found


def test_only_the_first_process_can_draw(tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy) -> None:
    gradients = Gradients(tiny_model, rows, spec, policy)
    base = torch.optim.SGD(tiny_model.trainable(ALL))

    with gradients.clipping(ALL, base, data_parallel._NoNoise()) as optimizer:
        gradients.accumulate(optimizer, np.arange(3))
        with pytest.raises(ModelError, match="only the first process of a client draws noise"):
            optimizer.release()


def test_parts_are_alike_and_leave_nobody_out() -> None:
    sample, lengths = np.array([2, 3, 5, 8, 9, 11, 20]), np.array([9, 1, 8, 2, 7, 3, 6])

    parts = data_parallel._parts(sample, lengths, 3)

    assert sorted(np.concatenate(parts).tolist()) == sample.tolist()
    assert [len(part) for part in parts] == [3, 2, 2]
    assert [len(part) for part in data_parallel._parts(sample[:1], lengths[:1], 3)] == [1, 0, 0]


def test_each_process_has_a_gpu_of_its_own_or_a_part_of_the_cpu(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = policy.compute.model_copy(update={"processes": 2, "device": "cpu", "memory_mib": None, "threads": 0})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    part = compute_of(compute, 1)
    assert part.threads == 3
    assert part.memory_mib is not None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    on_gpus = compute.model_copy(update={"device": "auto"})
    assert [compute_of(on_gpus, number).device for number in range(2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(ConfigError, match=r"compute.processes = 3: torch sees 2 GPUs here"):
        compute_of(on_gpus.model_copy(update={"processes": 3}), 0)
    with pytest.raises(ValueError, match="processes = 2 with device = 'cuda:1'"):
        type(compute).model_validate({"processes": 2, "device": "cuda:1"})
