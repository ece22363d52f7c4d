"""A tiny random BERT with the real tokenizer, so that tests train a real transformer in milliseconds."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from fedloom.client.assets import fetch
from fedloom.client.config import Policy
from fedloom.client.data.rows import Rows
from fedloom.client.model import AdapterModel, load_model
from fedloom.proto.run import AdapterSection, ModelSection, Spec

WORDS = ("good", "bad", "fine", "awful", "great", "poor", "happy", "sad", "the", "film", "plot", "actor", "very")


@pytest.fixture(autouse=True)
def _own_anchors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's ledgers leave no anchor among this user's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a 2-layer BERT, hidden size 32."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(fetch("minilm-l6"), local_files_only=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,  # Opacus's hooks, the reference, only record in training mode
        attention_probs_dropout_prob=0.0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BertForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_section(tiny_base: Path) -> ModelSection:
    """The tiny base model for two labels."""
    return ModelSection(base=str(tiny_base), labels=("negative", "positive"), max_length=16)


@pytest.fixture
def tiny_model(model_section: ModelSection) -> AdapterModel:
    """The tiny model with LoRA r=4 and non-zero factors."""
    return make_model(model_section, AdapterSection(rank=4, alpha=8))


def make_model(section: ModelSection, adapter: AdapterSection) -> AdapterModel:
    """A model whose adapter is random, so that both factors have a gradient."""
    model = load_model(section, adapter)
    rng = np.random.default_rng(1)
    model.load({s.name: rng.normal(0, 0.3, s.shape).astype(np.float32) for s in model.schema.tensors})
    return model


@pytest.fixture
def build_model(model_section: ModelSection):  # type: ignore[no-untyped-def]  # a factory of AdapterModel
    """Makes a model of another adapter kind."""
    return lambda adapter: make_model(model_section, adapter)


@pytest.fixture
def rows() -> Rows:
    """Forty labelled texts of different lengths; the label is whether a good word comes first."""
    rng = np.random.default_rng(0)
    texts, labels = [], []
    for _ in range(40):
        words = [WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(1, 12))]
        label = int(rng.integers(2))
        texts.append(" ".join([("awful", "great")[label], *words]))
        labels.append(label)
    return Rows(tuple(texts), np.array(labels, np.int64), ("",) * 40, ("negative", "positive"))


@pytest.fixture
def spec(model_section: ModelSection) -> Spec:
    """A private two-round run on the tiny model."""
    return Spec.model_validate(
        {
            "run": {"name": "tiny", "rounds": 2, "seed": 3},
            "model": model_section.model_dump(),
            "adapter": {"rank": 4, "alpha": 8},
            "train": {"steps": 3, "sampling_rate": 0.3, "learning_rate": 0.5, "microbatch": 5},
            "privacy": {"noise_multiplier": 1.0, "epsilon": 50, "clip_norm": 0.7},
        }
    )


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    """A generous policy."""
    return Policy.model_validate(
        {
            "client": {"name": "site-a", "state": str(tmp_path / "state")},
            "data": {"source": "unused.csv", "declared_examples": 40},
            "privacy": {"epsilon": 50.0, "allow_non_private": True},
        }
    )
