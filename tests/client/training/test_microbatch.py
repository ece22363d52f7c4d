"""Memory that runs out changes nothing of what a step computes: the same sample, each example once, one noise draw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedloom.client.data.rows import Indices, Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.load import load_model
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.grad_sample import hooked
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training import device as compute_module
from fedloom.client.training import microbatch as fitting_module
from fedloom.client.training.device import free_bytes, kept_bytes
from fedloom.client.training.microbatch import Microbatch, example_bytes, fitting
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.errors import ModelError
from fedloom.core.privacy.gaussian import Integers
from fedloom.core.schema import Array, Role
from fedloom.proto.messages import Assignment

ALL = frozenset({Role.LORA_A, Role.LORA_B, Role.HEAD})
ORDER = Assignment(round=0, train=ALL, broadcast_roles=ALL, broadcast_digest="0" * 64, broadcast_bytes=0)
ERRORS = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}


class Counting(Seeded):
    """Says how often it was asked."""

    def __init__(self, *key: int) -> None:
        super().__init__(*key)
        self.samples = self.noises = 0

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        self.samples += 1
        return super().uniform(count)

    def normal(self, deviation: int, count: int) -> Integers:
        self.noises += 1
        return super().normal(deviation, count)


class Site:
    """Trains one round whenever it is asked, from the same start and with the same draws."""

    def __init__(self, model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, folder: Path) -> None:
        self.model, self.rows, self.spec, self.policy, self.folder = model, rows, spec, policy, folder
        rng = np.random.default_rng(5)
        self.start = {s.name: rng.normal(0, 0.3, s.shape).astype(np.float32) for s in model.schema.tensors}
        self.entropy = Counting(7)
        self.rounds = 0

    def trainer(self, size: int, private: bool) -> tuple[Trainer, Ledger]:
        self.rounds += 1
        self.entropy = Counting(7)
        tables = self.spec.model_dump()
        tables["privacy"] |= {"enabled": private}
        ledger = Ledger(self.folder / str(self.rounds), "sha256:" + "0" * 64)
        trainer = Trainer(
            *(self.model, self.rows, Spec.model_validate(tables), self.policy, ledger),
            entropy_for=lambda _: self.entropy,
        )
        trainer.microbatch.size = size
        return trainer, ledger

    def train(self, size: int, private: bool, prepare: Callable[[Trainer], Any] = lambda _: None) -> dict[str, Array]:
        trainer, ledger = self.trainer(size, private)
        check_cancelled = prepare(trainer) or (lambda: None)
        try:
            return trainer.train("run", ORDER, self.start, check_cancelled).delta
        finally:
            ledger.close()


@pytest.fixture
def site(tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, tmp_path: Path) -> Site:
    """Steps of about twenty examples, which are four microbatches of five."""
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"sampling_rate": 0.5})})
    return Site(tiny_model, rows, spec, policy, tmp_path)


def failing(at: int, error: BaseException, *, backward: bool = False) -> Callable[[Trainer], None]:
    """Runs out of memory at the microbatch number `at`, counted from 1: in its forward or half-way in its backward."""

    def prepare(trainer: Trainer) -> None:
        whole, calls = trainer._loss, 0

        def loss(indices: Indices, length: int | None = None) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls != at:
                return whole(indices, length)
            if not backward:
                raise error
            layer = next(each for each in trainer.model.model.modules() if type(each).__name__ == "BertLayer")
            handle = layer.register_forward_hook(watch)
            try:
                return whole(indices, length)
            finally:
                handle.remove()

        def watch(_: object, __: object, out: Any) -> None:
            (out[0] if isinstance(out, tuple) else out).register_hook(stop)

        def stop(_: torch.Tensor) -> None:
            raise error

        trainer._loss = loss  # type: ignore[method-assign]

    return prepare


def same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("private", [True, False], ids=["private", "plain"])
@pytest.mark.parametrize(
    ("at", "kind", "backward"),
    [
        (1, "cuda", False),
        (2, "cpu", False),
        (3, "mps", False),
        (2, "python", False),
        (1, "cuda", True),
        (3, "cuda", True),
    ],
)
def test_a_step_that_ran_out_of_memory_is_done_again_bit_for_bit(
    site: Site, private: bool, at: int, kind: str, backward: bool
) -> None:
    expected = site.train(2, private)
    draws = (site.entropy.samples, site.entropy.noises)

    found = site.train(5, private, failing(at, ERRORS[kind], backward=backward))

    assert same(found, expected)
    assert (site.entropy.samples, site.entropy.noises) == draws == (3, 3 if private else 0)
    assert not same(expected, site.train(5, private)), (
        "microbatches of 5 and of 2 round alike, so that nothing is shown"
    )


def test_a_later_step_alone_is_done_again(site: Site) -> None:
    """A step before it keeps its larger microbatches, and is not repeated."""
    sizes = iter([5, 2, 2])

    def scheduled(trainer: Trainer) -> Callable[[], None]:
        return lambda: setattr(trainer.microbatch, "size", next(sizes))

    expected = site.train(5, True, scheduled)
    first = len(np.flatnonzero(Seeded(7).uniform(40) < 0.5))

    found = site.train(5, True, failing(-(-first // 5) + 2, ERRORS["cuda"]))

    assert same(found, expected)
    assert (site.entropy.samples, site.entropy.noises) == (3, 3)


def test_no_example_is_counted_twice_or_lost(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody is sampled, nobody clipped and nothing noised: the step is then the plain sum of all gradients."""
    monkeypatch.setattr(Counting, "uniform", lambda self, count: np.zeros(count))
    monkeypatch.setattr(Counting, "normal", lambda self, deviation, count: np.zeros(count, np.int64))
    tables = site.spec.model_dump()
    tables["train"] |= {"steps": 1, "learning_rate": 1.0}
    tables["privacy"] |= {"clip_norm": 20.0}
    site.spec = Spec.model_validate(tables)
    trainer, ledger = site.trainer(40, True)
    ledger.close()
    site.model.load(site.start)
    parameters = site.model.trainable(ALL)
    gradients = [torch.autograd.grad(trainer._loss(np.array([each])), parameters) for each in range(40)]
    total = [torch.stack(each).sum(0).numpy() for each in zip(*gradients, strict=True)]

    found = site.train(16, True, failing(2, ERRORS["cuda"], backward=True))

    divisor = tables["train"]["sampling_rate"] * 40
    for name, slot in site.model.slots.items():
        place = next(number for number, each in enumerate(parameters) if each is slot.parameter)
        np.testing.assert_allclose(found[name], -total[place] / divisor, rtol=2e-4, atol=2e-5)


def test_memory_may_run_out_again_and_again(site: Site) -> None:
    def prepare(trainer: Trainer) -> None:
        whole = trainer._loss

        def loss(indices: Indices, length: int | None = None) -> torch.Tensor:
            if len(indices) > 1:
                raise ERRORS["cuda"]
            return whole(indices, length)

        trainer._loss = loss  # type: ignore[method-assign]

    assert same(site.train(64, True, prepare), site.train(1, True))


def test_one_example_that_does_not_fit_ends_the_training_with_its_charge_kept(site: Site) -> None:
    trainer, ledger = site.trainer(4, True)
    failing_always: Any = lambda *_: (_ for _ in ()).throw(ERRORS["cuda"])  # noqa: E731
    trainer._loss = failing_always  # type: ignore[method-assign]

    with ledger, pytest.raises(ModelError, match=r"one example does not fit into the memory of cpu .*checkpointing"):
        trainer.train("run", ORDER, site.start)

    assert len(ledger.charges()) == 1
    assert site.entropy.noises == 0


def test_another_failure_is_not_tried_again(site: Site) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        site.train(5, True, failing(1, RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


@pytest.mark.parametrize(("size", "count", "after"), [(64, 40, 32), (64, 12, 8), (64, 64, 32), (5, 12, 2), (64, 2, 1)])
def test_sizes_are_halves_whatever_the_sample(size: int, count: int, after: int) -> None:
    microbatch, sizes = Microbatch(size, torch.device("cpu")), []

    def work(now: int) -> None:
        sizes.append(now)
        if len(sizes) == 1:
            raise ERRORS["cuda"]

    microbatch.attempt(count, work)

    assert sizes == [size, after]
    assert microbatch.size == after


def test_hooks_forget_a_pass_that_ended_half_way(tiny_model: AdapterModel, rows: Rows, site: Site) -> None:
    trainer, ledger = site.trainer(5, True)
    ledger.close()
    parameters = tiny_model.trainable(ALL)

    def gradients(broken: bool) -> torch.Tensor:
        with hooked(tiny_model.model, parameters) as tape:
            if broken:
                failing(1, ERRORS["cuda"], backward=True)(trainer)
                tape.begin(7)
                with pytest.raises(torch.cuda.OutOfMemoryError):
                    torch.autograd.backward(trainer._loss(np.arange(7)))
            tape.begin(3)
            torch.autograd.backward(trainer._loss(np.arange(3)))
            tape.finish()
            return tape.flat.clone()

    assert torch.equal(gradients(broken=False), gradients(broken=True))


def test_what_a_forward_pass_keeps_is_counted_once_and_without_parameters() -> None:
    x = torch.ones(1000, requires_grad=True)
    layer = torch.nn.Linear(1000, 2, bias=False).requires_grad_(False)

    assert kept_bytes(lambda: (x.exp() * layer.weight[0]).sum(), layer) == 4000
    assert kept_bytes(lambda: layer(x.exp()).sum(), layer) == 4000  # the weight is kept as a view of it
    assert kept_bytes(lambda: [x.exp().cos() for _ in range(2)], layer) == 8000


def test_the_size_follows_what_is_free(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, ledger = site.trainer(1, True)
    ledger.close()
    one = example_bytes(site.model, trainer._batch_loss, site.spec)
    longer = site.spec.model_copy(update={"model": site.spec.model.model_copy(update={"max_length": 64})})
    assert example_bytes(site.model, trainer._batch_loss, longer) > 2 * one

    for free, size in ((None, 5), (10**12, 5), (4 * one, 3), (one, 1), (0, 1)):
        monkeypatch.setattr(fitting_module, "free_bytes", lambda *_, free=free: free)
        assert fitting(site.model, trainer._batch_loss, site.spec, None) == size

    monkeypatch.setattr(fitting_module, "free_bytes", lambda *_: 4 * one)
    assert fitting(site.model, trainer._batch_loss, site.spec, None, at_once=2) == 1, "each has a half"


def test_the_policys_cap_reaches_the_size(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_module, "_resident", lambda: 64 << 20)
    site.policy = site.policy.model_copy(update={"compute": site.policy.compute.model_copy(update={"memory_mib": 64})})
    _, ledger = site.trainer(1, True)
    ledger.close()
    fresh = Trainer(site.model, site.rows, site.spec, site.policy, ledger)

    assert fresh.microbatch.size == 1


def test_free_memory_is_the_least_of_machine_group_and_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, mib = torch.device("cpu"), 1 << 20
    for name in ("_MEMINFO", "_CGROUP", "_CGROUPS"):
        monkeypatch.setattr(compute_module, name, tmp_path / name)
    monkeypatch.setattr(compute_module, "_resident", lambda: 100 * mib)
    assert free_bytes(cpu, None) is None
    assert free_bytes(cpu, 300) == 200 * mib

    (tmp_path / "_MEMINFO").write_text(f"MemTotal: 9 kB\nMemAvailable: {1000 << 10} kB\n")
    assert free_bytes(cpu, None) == 1000 * mib
    assert free_bytes(cpu, 300) == 200 * mib
    assert free_bytes(cpu, 80) == 0

    unit = tmp_path / "_CGROUPS" / "system.slice" / "client.service"
    unit.mkdir(parents=True)
    (tmp_path / "_CGROUP").write_text("0::/system.slice/client.service\n")
    (unit / "memory.max").write_text("max\n")
    (unit / "memory.current").write_text("5\n")
    (unit.parent / "memory.max").write_text(f"{500 * mib}\n")
    (unit.parent / "memory.current").write_text(f"{350 * mib}\n")
    assert free_bytes(cpu, None) == 150 * mib
    assert free_bytes(cpu, 200) == 100 * mib


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_device_that_is_full_gives_the_same_step(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, tmp_path: Path
) -> None:
    compute = policy.compute.model_copy(update={"device": "cuda"})
    model = load_model(spec.model, spec.adapter, compute)
    site = Site(model, rows, spec, policy.model_copy(update={"compute": compute}), tmp_path)
    assert site.trainer(1, True)[0].microbatch.size >= 1
    expected = site.train(2, True)

    def prepare(trainer: Trainer) -> None:
        whole, calls = trainer._loss, 0

        def loss(indices: Indices, length: int | None = None) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 2:
                torch.empty(torch.cuda.get_device_properties(0).total_memory * 2, dtype=torch.uint8, device="cuda")
            return whole(indices, length)

        trainer._loss = loss  # type: ignore[method-assign]

    assert same(site.train(5, True, prepare), expected)
