"""[compute] of a policy: each key does what it says, and what this machine cannot do is refused."""

import datetime as dt
import importlib.util
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.load import load_model
from fedloom.client.policy import ComputePolicy, Policy, load_policy
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.training_hours import until_open_s
from fedloom.client.training.device import choose_device, kept_bytes, prepare_device, shared
from fedloom.client.training.trainer import Trainer
from fedloom.client.transport import rate_limit as bandwidth_module
from fedloom.client.transport.rate_limit import Bucket
from fedloom.core.config.run import AdapterSection, EngineSection, ModelSection, Spec
from fedloom.core.errors import ConfigError, ModelError
from fedloom.core.schema import Array, Role
from fedloom.proto.messages import Assignment
from tests.support.cuda import pretend_cuda

ALL = frozenset({Role.LORA_A, Role.LORA_B, Role.HEAD})
LORA = AdapterSection(rank=4, alpha=8)
QUANTIZED = importlib.util.find_spec("bitsandbytes") is not None


def compute(**keys: Any) -> ComputePolicy:
    return ComputePolicy.model_validate({"device": "cpu"} | keys)


def trained(model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, folder: Path) -> dict[str, Array]:
    """What a private round changes, with noise that is always the same and small."""
    rng = np.random.default_rng(5)
    start = {s.name: rng.normal(0, 0.3, s.shape).astype(np.float32) for s in model.schema.tensors}
    order = Assignment(round=0, train=ALL, broadcast_roles=ALL, broadcast_digest="0" * 64, broadcast_bytes=0)
    folder.mkdir()
    with Ledger(folder, "sha256:" + "0" * 64) as ledger:
        trainer = Trainer(model, rows, spec, policy, ledger, entropy_for=lambda _: Seeded(7))
        return trainer.train("run", order, start).delta


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    path = tmp_path / "client.toml"
    path.write_text('[client]\nname = "a"\n[data]\nsource = "x.csv"\n')
    return path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("compute.device=gpu", "compute.device"),
        ("compute.device=cuda:x", "compute.device"),
        ("compute.dtype=float16", "'float32' or 'bfloat16'"),
        ("compute.quantization=2bit", "'none', '8bit' or '4bit'"),
        ("compute.memory_mib=1", "greater than or equal to 64"),
        ("compute.upload_bytes_per_s=1000", "greater than or equal to 262144"),
        ("compute.hours=22-6", "hours look like 22:00-06:00"),
        ("compute.hours=24:00-06:00", "hours look like 22:00-06:00"),
        ("compute.hours=06:00-06:00", "none at all"),
        ("client.device=cuda", "client.device is compute.device now"),
        ("client.threads=2", "client.threads is compute.threads now"),
    ],
)
def test_a_wrong_value_is_named(policy_file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_policy(policy_file, (override,))


def test_auto_is_cuda_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for there, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto").type == kind


@pytest.mark.parametrize("name", ["cuda:64", "mps"])
def test_a_device_that_is_not_here_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf'^device = ["\']{name}["\']: torch .*"cpu"'):
        choose_device(name)


def test_processes_that_share_a_gpu_leave_each_other_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared(compute(), 5) == compute()  # nothing holds a process to its part of the CPU's memory

    pretend_cuda(monkeypatch, 24 << 30)
    each = shared(compute(device="auto"), 5).memory_mib
    assert each is not None
    assert 4 << 10 < each <= (24 << 10) // 5 - 512  # what CUDA itself takes in every process
    assert shared(compute(device="auto", memory_mib=700), 5).memory_mib == 700
    assert shared(compute(device="cuda"), 1000).memory_mib == 64


def test_a_run_and_a_policy_have_the_same_options() -> None:
    lean = {"device": "cpu", "dtype": "bfloat16", "quantization": "4bit", "gradient_checkpointing": True}
    lean |= {"memory_mib": 900, "activation_cache_mib": 7, "threads": 3}

    assert ComputePolicy.of(EngineSection.model_validate({"kind": "grpc", **lean})) == compute(**lean)
    assert ComputePolicy.of(EngineSection()) == ComputePolicy()


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        prepare_device(compute(threads=before + 1))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "keys", [{"dtype": "bfloat16"}, {"gradient_checkpointing": True}], ids=["bfloat16", "recomputed"]
)
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_a_leaner_base_trains_nearly_the_same(
    architecture: str,
    keys: dict[str, Any],
    build_task: Any,
    small_bases: dict[str, Path],
    rows: Rows,
    spec: Spec,
    policy: Policy,
    tmp_path: Path,
) -> None:
    exact = build_task(architecture, "text-classification", labels=("negative", "positive"))
    section = ModelSection(base=str(small_bases[architecture]), labels=("negative", "positive"), max_length=24)
    targets = {"bert": ("query", "value"), "gpt2": ("c_attn", "c_fc"), "llama": ("q_proj", "v_proj", "down_proj")}
    adapter = AdapterSection(rank=2, alpha=4, targets=targets[architecture])
    spec = spec.model_copy(update={"model": section, "adapter": adapter})
    lean = load_model(section, adapter, compute(**keys))

    expected = trained(exact, rows, spec, policy, tmp_path / "exact")
    found = trained(lean, rows, spec, policy, tmp_path / "lean")

    assert {slot.parameter.dtype for slot in lean.slots.values()} == {torch.float32}
    base = next(p for n, p in lean.model.named_parameters() if n.endswith("base_layer.weight"))
    assert base.dtype == (torch.bfloat16 if "dtype" in keys else torch.float32)
    whole = np.concatenate([value.ravel() for value in expected.values()])
    apart = np.concatenate([(found[name] - expected[name]).ravel() for name in expected])
    assert np.linalg.norm(whole) > 0
    assert np.linalg.norm(apart) <= (0.1 if "dtype" in keys else 1e-5) * np.linalg.norm(whole)


def _count(calls: list[object], *_: object) -> None:
    calls.append(None)


def test_recomputed_layers_keep_less_and_run_twice(model_section: ModelSection, spec: Spec) -> None:
    kept, passes = {}, {}
    for again in (False, True):
        model = load_model(model_section, LORA, compute(gradient_checkpointing=again))
        model.trainable(ALL)
        calls: list[object] = []
        layer = next(each for each in model.model.modules() if type(each).__name__ == "BertSelfAttention")
        layer.register_forward_pre_hook(partial(_count, calls))
        ids = torch.arange(100, 116)[None]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        kept[again] = kept_bytes(partial(model.logits, batch), model.model)
        calls.clear()
        torch.autograd.backward(model.logits(batch).sum())
        passes[again] = len(calls)

    assert passes == {False: 1, True: 2}
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.parametrize("keys", [{"dtype": "bfloat16"}, {"quantization": "8bit"}, {"quantization": "4bit"}])
def test_biases_of_a_leaner_base_are_not_trained(model_section: ModelSection, keys: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"trains the base model's own .* compute.dtype = .float32"):
        load_model(model_section, AdapterSection(kind="bias"), compute(**keys))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_few_bits_without_bitsandbytes_are_refused(
    bits: str, model_section: ModelSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(ConfigError, match=rf'"{bits}" needs bitsandbytes, .* install fedloom\[quantized\]'):
        load_model(model_section, LORA, compute(quantization=bits))


@pytest.fixture
def wide_section(tiny_base: Path, model_section: ModelSection, tmp_path: Path) -> ModelSection:
    """Layers of 128 values in a row: bitsandbytes packs blocks of 64."""
    wide = shutil.copytree(tiny_base, tmp_path / "wide")
    config = BertConfig.from_pretrained(wide, hidden_size=128, intermediate_size=128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BertModel(config).save_pretrained(wide)
    return model_section.model_copy(update={"base": str(wide)})


@pytest.mark.skipif(not QUANTIZED, reason="needs fedloom[quantized]")
@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes.*", "ignore::FutureWarning:bitsandbytes.*")
@pytest.mark.parametrize(("bits", "stored", "cosine"), [("8bit", torch.int8, 0.99), ("4bit", torch.uint8, 0.8)])
def test_a_base_of_few_bits_trains_privately(
    bits: str,
    stored: torch.dtype,
    cosine: float,
    wide_section: ModelSection,
    rows: Rows,
    spec: Spec,
    policy: Policy,
    tmp_path: Path,
) -> None:
    exact, lean = (load_model(wide_section, LORA, compute(quantization=each)) for each in ("none", bits))
    base = next(p for n, p in lean.model.named_parameters() if n.endswith("query.base_layer.weight"))
    assert base.dtype == stored
    assert {slot.parameter.dtype for slot in lean.slots.values()} == {torch.float32}
    assert lean.schema.digest == exact.schema.digest

    expected = trained(exact, rows, spec, policy, tmp_path / "exact")
    found = trained(lean, rows, spec, policy, tmp_path / "lean")

    assert lean.probed
    whole = np.concatenate([value.ravel() for value in expected.values()])
    other = np.concatenate([found[name].ravel() for name in expected])
    assert whole @ other > cosine * np.linalg.norm(whole) * np.linalg.norm(other)
    pair = next(iter(lean.schema.pairs)).module
    zeros = {s.name: np.zeros(s.shape, np.float32) for s in lean.schema.tensors if s.module == pair}
    corrections = {f"{pair}.base_{side}": next(v for n, v in zeros.items() if f"lora_{side}" in n) for side in "AB"}
    with pytest.raises(ModelError, match="cannot be done to quantised weights"):
        lean.load(zeros | corrections)


@pytest.mark.skipif(not QUANTIZED, reason="needs fedloom[quantized]")
@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes.*", "ignore::FutureWarning:bitsandbytes.*")
def test_eight_bits_keep_no_columns_that_other_examples_choose(wide_section: ModelSection) -> None:
    model = load_model(wide_section, LORA, compute(quantization="8bit"))

    layers = [
        each for each in model.model.modules() if type(each).__name__ == "Linear8bitLt" and hasattr(each, "state")
    ]
    assert layers
    assert {each.state.threshold for each in layers} == {0.0}


@pytest.mark.parametrize(
    ("hours", "now", "wait"),
    [
        (None, (12, 0), 0),
        ("22:00-06:00", (22, 0), 0),
        ("22:00-06:00", (0, 0), 0),
        ("22:00-06:00", (6, 0), 16 * 3600),
        ("08:30-17:00", (8, 29), 60),
        ("08:30-17:00", (16, 59), 0),
        ("08:30-17:00", (17, 0), 15.5 * 3600),
    ],
)
def test_hours_may_last_over_midnight(hours: str | None, now: tuple[int, int], wait: float) -> None:
    assert until_open_s(hours, dt.datetime(2026, 3, 1, *now)) == wait


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


def test_a_bucket_holds_bytes_to_their_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(bandwidth_module, "time", clock)
    bucket = Bucket(1000)

    for _ in range(50):
        bucket.take(100)
    assert clock.slept == pytest.approx(5.0)
    clock.now += 100
    bucket.take(1000)  # a second's worth after a pause, and no more
    assert clock.slept == pytest.approx(5.0)
    bucket.take(1000)
    assert clock.slept == pytest.approx(6.0)

    Bucket(None).take(10**12)
    assert clock.slept == pytest.approx(6.0)
