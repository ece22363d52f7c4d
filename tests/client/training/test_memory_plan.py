"""`fedloom doctor --plan`: what is planned is what loading and a step then take."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from fedloom.cli.main import app
from fedloom.client.doctor import plan as plan_module
from fedloom.client.doctor.plan import MemoryPlan, plan_memory
from fedloom.client.models import load as load_module
from fedloom.client.models.load import load_model
from fedloom.client.policy import ComputePolicy
from fedloom.client.training.device import free_bytes
from fedloom.client.training.gradients import batch_loss
from fedloom.client.training.microbatch import example_bytes, fitting
from fedloom.core.config.run import AdapterSection, ModelSection, Spec
from fedloom.core.errors import ModelError
from tests.client.rounds import changed

MIB = 1 << 20


def sizes(plan: MemoryPlan) -> dict[str, int]:
    return {part.name.partition(" of ")[0]: part.bytes for part in plan.parts}


@pytest.mark.parametrize("keys", [{}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_a_plan_is_what_loading_and_a_forward_pass_then_take(
    architecture: str, keys: dict[str, Any], small_bases: dict[str, Path], spec: Spec
) -> None:
    targets = {"bert": ("query", "value"), "gpt2": ("c_attn", "c_fc"), "llama": ("q_proj", "v_proj", "down_proj")}
    section = ModelSection(base=str(small_bases[architecture]), labels=("negative", "positive"), max_length=24)
    adapter = AdapterSection(rank=2, alpha=4, targets=targets[architecture])
    spec = spec.model_copy(update={"model": section, "adapter": adapter})
    compute = ComputePolicy.model_validate({"device": "cpu", **keys})

    planned = plan_memory(spec, compute)

    model = load_model(section, adapter, compute)
    trained = {slot.parameter for slot in model.slots.values()}
    frozen = [each for each in [*model.model.parameters(), *model.model.buffers()] if each not in trained]
    found = sizes(planned)
    assert found["base model"] == pytest.approx(sum(each.nbytes for each in frozen), rel=0.02)
    assert found["adapter"] >= 4 * model.schema.size
    each = example_bytes(model, partial(batch_loss, model), spec)
    assert found["activations"] / planned.microbatch == pytest.approx(each, rel=0.15)
    assert planned.microbatch == fitting(model, partial(batch_loss, model), spec, None) == spec.train.microbatch


def test_nothing_of_the_base_model_is_loaded(model_section: ModelSection, spec: Spec, monkeypatch: Any) -> None:
    devices = []

    def empty(*given: Any) -> Any:
        base = load_module.empty_base(*given)
        devices.extend([each.device.type for each in base.model.parameters()])
        return base

    monkeypatch.setattr(plan_module, "empty_base", empty)
    plan_memory(spec, ComputePolicy(device="cpu"))

    assert set(devices) == {"meta"}


def test_less_memory_plans_smaller_microbatches(spec: Spec) -> None:
    whole = plan_memory(spec, ComputePolicy(device="cpu"))
    each = sizes(whole)["activations"] // whole.microbatch
    resident = free_bytes(torch.device("cpu"), 1 << 20)
    assert resident is not None
    taken = (1 << 40) - resident  # by this process

    few = plan_memory(spec, ComputePolicy(device="cpu", memory_mib=max(64, (taken >> 20) + 1)))
    assert whole.microbatch == spec.train.microbatch
    assert few.microbatch * each <= 2 * MIB
    assert few.asked == spec.train.microbatch


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 0), ("adam", 2)])
def test_an_optimisers_state_is_counted(spec: Spec, optimizer: str, copies: int) -> None:
    spec = changed(spec, train={"optimizer": optimizer, "steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1})

    planned = plan_memory(spec, ComputePolicy(device="cpu"))

    values = sizes(planned)["broadcast and update"] / 8
    assert sizes(planned)["optimiser"] == pytest.approx(copies * 4 * values, rel=0.05)


def test_fewer_bits_take_less_of_the_linear_layers_alone(spec: Spec) -> None:
    whole, eight, four = (
        sizes(plan_memory(spec, ComputePolicy.model_validate({"device": "cpu", "quantization": each})))["base model"]
        for each in ("none", "8bit", "4bit")
    )

    assert whole / 2 < four < eight < whole  # of a tiny model most is embeddings


def test_an_adapter_made_from_weights_cannot_be_planned(spec: Spec) -> None:
    spec = spec.model_copy(update={"adapter": AdapterSection(kind="svfit", rank=2)})

    with pytest.raises(ModelError, match=r"'svfit' on Bert.* is known only once it is loaded: .*--run RUN"):
        plan_memory(spec, ComputePolicy(device="cpu"))


def doctor(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, words)])


def test_the_command_prints_a_plan_for_people_and_programs(tiny_base: Path, tmp_path: Path) -> None:
    run, policy = tmp_path / "run.toml", tmp_path / "client.toml"
    run.write_text(
        f"""
        run = {{ name = "tiny", rounds = 1 }}
        model = {{ base = "{tiny_base}", labels = ["no", "yes"] }}
        train = {{ steps = 1, sampling_rate = 0.2, learning_rate = 0.1 }}
        engine = {{ device = "cpu", dtype = "bfloat16" }}
        """
    )
    policy.write_text('[client]\nname = "a"\n[data]\nsource = "x.csv"\n[compute]\ndevice = "cpu"\n')

    shown = doctor("--plan", run)
    assert shown.exit_code == 0, shown.output
    assert "base model" in shown.output
    assert "examples at a time of" in shown.output
    lean, site = (json.loads(doctor(*words, "--plan", run, "--json").stdout) for words in ((), (policy,)))
    assert lean["parts"][0]["name"] == site["parts"][0]["name"] == "base model"
    assert lean["parts"][0]["bytes"] < site["parts"][0]["bytes"]
    assert site["total"] == sum(part["bytes"] for part in site["parts"] if not part["on_host"])
    assert site["microbatch"] == site["asked"]
    nothing = doctor(policy, "--plan", run, "--set", "compute.memory_mib=64")
    assert nothing.exit_code == 2
    assert "0 examples at a time" in nothing.output
    assert "no policy file was given" in str(doctor().exception)
