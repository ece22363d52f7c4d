"""MiSS against PEFT's own layer."""

import pytest
import torch
from peft import MissConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from fedloom.client.models.load import load_model
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError
from tests.conftest import make_model

IDS = torch.tensor([[101, 2204, 2143, 102], [101, 2919, 5436, 102]])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("rank", [8, 5])
def test_it_is_pefts(model_section: ModelSection, rank: int) -> None:
    """The same D gives the same scores, also where the inputs are no whole number of shards."""
    model = make_model(model_section, AdapterSection(kind="miss", rank=rank, targets=("query", "dense")))
    values = model.read(model.schema)
    names = [name.removesuffix(".miss_block") for name in values if name.endswith(".miss_block")]
    base = AutoModelForSequenceClassification.from_pretrained(model_section.base, num_labels=2)
    theirs = get_peft_model(base, MissConfig(r=rank, target_modules=names)).eval()
    with torch.no_grad():
        for name in names:
            block = theirs.get_submodule(f"base_model.model.{name}").miss_block["default"]
            block.copy_(torch.from_numpy(values[f"{name}.miss_block"]))
        for part in ("weight", "bias"):
            head = theirs.get_submodule("base_model.model.classifier").get_parameter(part)
            head.copy_(torch.from_numpy(values[f"base_model.model.classifier.{part}"]))

        expected, found = theirs(input_ids=IDS).logits, model.model(input_ids=IDS).logits

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_shard_longer_than_the_inputs_is_refused(model_section: ModelSection) -> None:
    with pytest.raises(ModelError, match=r"query: adapter\.rank = 40 is above its 32 inputs; lower it"):
        load_model(model_section, AdapterSection(kind="miss", rank=40))
