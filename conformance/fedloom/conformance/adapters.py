"""What every adapter kind must do.

::

    from fedloom.conformance.adapters import AdapterConformance

    class TestMine(AdapterConformance):
        def adapter(self):
            return Mine(targets=("query",))
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from fedloom.client.adapters.api import Adapter, Host, Traits
from fedloom.client.adapters.attach import attach
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.loading import load_exported
from fedloom.client.models.exports.result import save_result
from fedloom.client.models.load import load_base
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.probe import probe
from fedloom.client.tasks.api import Task, task_named
from fedloom.client.training.gradients import batch_loss
from fedloom.conformance.tiny_model import save_tiny_model
from fedloom.core.config.parsing import Section
from fedloom.core.errors import ModelError
from fedloom.core.schema import Array, Role, Schema
from fedloom.core.tensor_file import TENSORS
from fedloom.strategies.start import starting_adapter

__all__ = ["AdapterConformance"]

_CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
_LENGTHS = (5, 16, 9, 2)


class AdapterConformance:
    """The battery. Define `adapter`; define `base` for a kind that needs another base model."""

    def adapter(self) -> Adapter:
        """A fresh instance of the kind under test, with targets that the base model has."""
        raise NotImplementedError("define adapter() in the subclass and return the adapter kind under test")

    def base(self, folder: Path) -> Path:
        """Write the base model into an empty folder: a tiny BERT with layers `query`, `key`, `value` and `dense`."""
        return save_tiny_model(folder)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Where the base model lies."""
        return self.base(tmp_path / "base")

    @pytest.fixture
    def model(self, folder: Path) -> AdapterModel:
        """The base model with the adapter, as it is attached."""
        return self.load(folder)

    @pytest.fixture
    def trained(self, model: AdapterModel) -> AdapterModel:
        """The model with random values in the adapter."""
        model.load(self.values(model.schema))
        return model

    def load(self, folder: Path) -> AdapterModel:
        """The base model of a folder with the adapter and a head for two labels."""
        task, kind = _task(), self.adapter()
        base, tokenizer, head, _ = load_base(folder, task)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, slots = attach(Host(base, head, task.traits.peft), "mine", kind)
        return AdapterModel(model, tokenizer, slots, 1.0, torch.device("cpu"), task, head, kind)

    def values(self, schema: Schema, stream: int = 0) -> dict[str, Array]:
        """Normal values for a schema; the same stream gives the same."""
        draw = np.random.default_rng([7, stream])
        return {spec.name: draw.normal(0, 0.3, spec.shape).astype(np.float32) for spec in schema.tensors}

    def batch(self, model: AdapterModel) -> dict[str, torch.Tensor]:
        """Four texts of different lengths, padded."""
        draw = torch.Generator().manual_seed(3)
        width = int(model.model.get_input_embeddings().weight.shape[0])
        mask = torch.tensor([[int(place < length) for place in range(max(_LENGTHS))] for length in _LENGTHS])
        ids = torch.randint(len(model.tokenizer.all_special_ids), width, mask.shape, generator=draw)
        padded = torch.where(mask.bool(), ids, torch.tensor(model.tokenizer.pad_token_id))
        return {"input_ids": padded, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}

    def test_its_options_are_a_described_model(self) -> None:
        """The run file's keys, the JSON Schema and the reference come from it."""
        adapter = self.adapter()

        assert isinstance(adapter, Section), "derive it from fedloom.core.config.parsing.Section"
        assert isinstance(adapter.traits, Traits)
        assert (type(adapter).__doc__ or "").strip(), "the first line of its docstring is the summary"
        assert type(adapter).model_validate_json(adapter.model_dump_json()) == adapter
        for key, spec in type(adapter).model_json_schema().get("properties", {}).items():
            assert spec.get("description"), f"say below {key} what it means"

    def test_its_tensors_describe_themselves(self, model: AdapterModel, folder: Path) -> None:
        """Names, shapes and order are the same wherever it is attached, and each is a parameter of its own."""
        schema = model.schema

        assert self.load(folder).schema.digest == schema.digest
        assert Schema.from_json(schema.to_json()) == schema
        assert len({id(slot.parameter) for slot in model.slots.values()}) == len(model.slots)
        for slot in model.slots.values():
            assert tuple(slot.parameter.shape) == slot.spec.shape
        for spec in schema.with_rank(1).tensors:
            assert spec.rank_axis is None or spec.shape[spec.rank_axis] == 1
        assert not [name for name, each in model.model.named_parameters() if each.requires_grad]

    def test_it_starts_as_the_base_model(self, model: AdapterModel, folder: Path) -> None:
        """As attached, unless the traits say that it does not, and with what a run draws for its tensors."""
        batch, plain = self.batch(model), load_base(folder, _task()).model.eval()
        attached, expected = _logits(model.model, batch), _logits(plain, batch)
        if model.adapter.traits.starts_as_base:
            torch.testing.assert_close(attached, expected, **_CLOSE)
        else:
            assert not torch.allclose(attached, expected, **_CLOSE), "it does: leave starts_as_base as it is"

        drawn = starting_adapter(model.schema, 5)
        model.load({slot.spec.name: drawn[slot.spec.name] for slot in _own(model)})

        torch.testing.assert_close(_logits(model.model, batch), attached, **_CLOSE)

    def test_what_is_loaded_is_read(self, trained: AdapterModel) -> None:
        """A tensor that travels as a change counts from the base model's value."""
        for name, value in self.values(trained.schema).items():
            np.testing.assert_allclose(trained.read(trained.schema)[name], value, atol=1e-6)

    def test_every_tensor_matters(self, trained: AdapterModel) -> None:
        """Each gets a gradient, and nothing else does."""
        parameters = trained.trainable(trained.schema.roles)
        torch.autograd.backward(batch_loss(trained, self.batch(trained)))

        for slot in trained.slots.values():
            gradient = slot.parameter.grad
            assert gradient is not None, f"{slot.spec.name} takes no part in the forward pass"
            assert gradient.any(), f"{slot.spec.name} takes no part in the forward pass"
        asked = set(parameters)
        assert not [name for name, each in trained.model.named_parameters() if each.requires_grad and each not in asked]

    def test_gradients_of_examples_equal_a_naive_loop(self, trained: AdapterModel) -> None:
        """Those that private training clips, against a backward pass for each example alone."""
        if not trained.adapter.traits.private:
            pytest.skip("the kind is not for private runs")
        batch, parameters = self.batch(trained), trained.trainable(trained.schema.roles)
        alone = []
        for row in range(len(_LENGTHS)):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            found = torch.autograd.grad(batch_loss(trained, one), parameters)
            alone.append(torch.cat([each.reshape(-1) for each in found]))

        with recording(trained.model, parameters) as tape:
            tape.begin(len(_LENGTHS))
            torch.autograd.backward(batch_loss(trained, batch))
            tape.finish()
            together = tape.flat.clone()

        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-3, atol=1e-5)

    def test_the_sensitivity_probe_passes_or_private_runs_are_refused(self, model: AdapterModel) -> None:
        """A private run makes this check at its start, and refuses a kind that does not pass."""
        loss = partial(batch_loss, model)
        if model.adapter.traits.private:
            probe(model, loss, 32)
            assert model.probed
        else:
            with pytest.raises(ModelError, match="not for private runs"):
                probe(model, loss, 32)

    def test_merging_equals_the_forward_pass(self, trained: AdapterModel, folder: Path) -> None:
        """The merged model has exactly the base model's parameters, and gives what the adapter gave.

        A kind that says that it cannot be merged refuses.
        """
        batch = self.batch(trained)
        if not trained.adapter.traits.merges:
            with pytest.raises(ModelError):
                trained.adapter.merge(trained.model)
            return
        expected = _logits(trained.model, batch)

        merged = _merged(trained)

        torch.testing.assert_close(_logits(merged, batch), expected, **_CLOSE)
        assert merged.state_dict().keys() == load_base(folder, _task()).model.state_dict().keys()
        torch.testing.assert_close(_logits(trained.model, batch), expected, rtol=0, atol=0)

    def test_the_export_reloads_to_the_same_scores(self, trained: AdapterModel, folder: Path, tmp_path: Path) -> None:
        """What a run leaves gives what the run reported; and the model is left as it was."""
        batch = self.batch(trained)
        expected = _logits(trained.model, batch)

        save_result(trained, tmp_path / "result", {"run": "battery", "task": "text-classification"})

        torch.testing.assert_close(_logits(trained.model, batch), expected, rtol=0, atol=0)
        again = load_exported(folder, tmp_path / "result", 2)
        torch.testing.assert_close(_logits(again, batch), expected, **_CLOSE)
        if not trained.adapter.traits.peft:
            kept = load_file(tmp_path / "result" / TENSORS)
            assert kept.keys() == trained.slots.keys()
            assert all(np.array_equal(kept[name], each) for name, each in trained.read(trained.schema).items())

    def test_an_exact_average_is_the_mean_model(self, model: AdapterModel) -> None:
        """A kind that declares it: the mean of two clients' tensors is the mean of their merged weights."""
        if not model.adapter.traits.exact_average:
            pytest.skip("the kind does not say that its average is exact")
        one, two = self.values(model.schema, 1), self.values(model.schema, 2)
        found = []
        for values in (one, two, {name: (one[name] + two[name]) / 2 for name in one}):
            model.load(values)
            found.append(_merged(model).state_dict())

        for name, value in found[2].items():
            torch.testing.assert_close(value, (found[0][name] + found[1][name]) / 2, **_CLOSE)


def _task() -> Task:
    return task_named("text-classification", ("no", "yes"), 32, None)


def _own(model: AdapterModel) -> list[Any]:
    """The slots of the kind itself: a head that the checkpoint lacks is drawn."""
    return [slot for slot in model.slots.values() if slot.spec.role != Role.HEAD]


def _merged(model: AdapterModel) -> nn.Module:
    whole = copy.deepcopy(model.model)
    model.adapter.merge(whole)
    merged: nn.Module = whole.merge_and_unload(safe_merge=True)
    return merged


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        scores: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return scores
