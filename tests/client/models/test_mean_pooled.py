"""A mean-pooled encoder is what its formula says, and an ordinary model of its kind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.client.models.base_folder import base_digest
from fedloom.client.models.mean_pooled import mean_pooled
from fedloom.core.errors import ModelError

SIZE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50, "num_hidden_layers": 5}
KINDS: dict[str, tuple[Any, Any]] = {
    "bert": (BertModel, BertConfig),
    "roberta": (RobertaModel, RobertaConfig),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig),
}
BATCH = {
    "input_ids": torch.tensor([[3, 8, 9, 4], [3, 7, 4, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1] * 3 + [0]]),
}


def encoder(kind: str, folder: Path) -> Any:
    """A saved encoder with large random weights."""
    torch.manual_seed(0)
    model, config = KINDS[kind]
    made = model(config(initializer_range=0.5, pad_token_id=0, **SIZE)).eval()
    made.save_pretrained(folder)
    (folder / "vocab.txt").write_text("a\nfilm\n", "utf-8")
    (folder / "README.md").write_text("no part of it", "utf-8")
    return made


def normal(values: Any) -> Any:
    """Zero mean and unit variance over the last axis."""
    return (values - values.mean(-1, keepdims=True)) / values.std(-1, keepdims=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [3, None])
def test_every_token_has_the_mean_of_those_that_are_no_padding(kind: str, blocks: int | None, tmp_path: Path) -> None:
    whole = encoder(kind, tmp_path / "given")
    mean_pooled(tmp_path / "given", tmp_path / "made", blocks)

    with torch.inference_mode():
        last = whole(**BATCH, output_hidden_states=True).hidden_states[blocks or 5].double().numpy()
        found = AutoModel.from_pretrained(tmp_path / "made").eval()(**BATCH).last_hidden_state.numpy()

    mean = np.stack([last[0].mean(0), last[1][:3].mean(0)])
    np.testing.assert_allclose(found, normal(20 * mean[:, None] + last), atol=1e-5)
    files = {path.name: path.stat().st_mode for path in (tmp_path / "made").iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "vocab.txt"}
    assert len(set(files.values())) == 1


def test_the_head_of_a_bert_reads_it_where_tanh_is_nearly_straight(tmp_path: Path) -> None:
    encoder("bert", tmp_path / "given")
    mean_pooled(tmp_path / "given", tmp_path / "made")

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "made", num_labels=2).eval()
    with torch.inference_mode():
        hidden = model.bert(**BATCH).last_hidden_state[:, 0]
        scores = model(**BATCH).logits

    torch.testing.assert_close(scores, model.classifier(torch.tanh(hidden / 2)))


@pytest.mark.parametrize("blocks", [0, 6])
def test_blocks_that_are_not_there_cannot_be_kept(blocks: int, tmp_path: Path) -> None:
    encoder("bert", tmp_path / "given")

    with pytest.raises(ModelError, match=rf"has 5 blocks; {blocks} of them cannot be kept"):
        mean_pooled(tmp_path / "given", tmp_path / "made", blocks)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    size = {"dim": 32, "n_heads": 4, "hidden_dim": 48, "n_layers": 1, "vocab_size": 50}
    DistilBertModel(DistilBertConfig(**size)).save_pretrained(tmp_path / "given")

    with pytest.raises(ModelError, match="is of the kind distilbert; one of bert, roberta"):
        mean_pooled(tmp_path / "given", tmp_path / "made")


def test_an_encoder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    encoder("bert", tmp_path / "given")
    config = json.loads((tmp_path / "given" / "config.json").read_text("utf-8"))
    (tmp_path / "given" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}), "utf-8")

    with pytest.raises(ModelError, match=r"lacks encoder\.layer\.5.* and \d+ more weights"):
        mean_pooled(tmp_path / "given", tmp_path / "made")


def test_the_command_writes_a_whole_folder_or_none(tmp_path: Path) -> None:
    encoder("roberta", tmp_path / "given")
    command = ["mean-pool", str(tmp_path / "given"), str(tmp_path / "made"), "--blocks"]

    done = CliRunner().invoke(app, [*command, "2", "--json"])
    failed = CliRunner().invoke(app, [*command[:2], str(tmp_path / "other"), "--blocks", "9"])

    assert json.loads(done.stdout) == {"folder": str(tmp_path / "made"), "digest": base_digest(tmp_path / "made")}
    assert isinstance(failed.exception, ModelError)
    assert {path.name for path in tmp_path.iterdir()} == {"given", "made"}
