"""A tiny random BERT with the real tokenizer, so that tests train a real transformer in milliseconds."""

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from fedloom.client.assets.fetch import fetch
from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.load import load_model
from fedloom.client.policy import Policy
from fedloom.core import registry
from fedloom.core.config.run import AdapterSection, ModelSection, Spec
from fedloom.simulation import processes
from tests.support.preloaded import command

# Tests assert behaviour, never times: a busy machine must not fail one.
settings.register_profile("fedloom", deadline=None)
settings.load_profile("fedloom")

WORDS = ("good", "bad", "fine", "awful", "great", "poor", "happy", "sad", "the", "film", "plot", "actor", "very")


@pytest.fixture(autouse=True)
def _own_anchors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's ledgers leave no anchor among this user's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def preloaded_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gRPC engine's clients are processes that need not load torch first; see `tests.support.preloaded`."""
    monkeypatch.setattr(processes, "CLIENT", [*command(), "client"])


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
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens without a padding token, as language models have it."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def small_model(architecture: str, vocabulary: int) -> PreTrainedModel:
    """Two random layers of width 32 that read at most 64 tokens."""
    torch.manual_seed(0)
    size = {"vocab_size": vocabulary, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
    if architecture == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **size))
    wide = size | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide["max_position_embeddings"] = 64
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **wide))
    return BertModel(BertConfig(**wide))


TARGETS = {"bert": ("query", "value"), "gpt2": ("c_attn", "c_fc"), "llama": ("q_proj", "v_proj", "down_proj")}


@pytest.fixture(scope="session")
def small_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random base models with a tokenizer made here, by architecture."""
    folders = {}
    for architecture in TARGETS:
        folders[architecture] = tmp_path_factory.mktemp(architecture)
        tokenizer = byte_tokenizer()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small_model(architecture, len(tokenizer)).save_pretrained(folders[architecture])
            tokenizer.save_pretrained(folders[architecture])
    return folders


@pytest.fixture(scope="session")
def vision_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random models of pictures of 28 by 28 pixels, by architecture."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    size |= {"image_size": 28, "patch_size": 14}
    folders = {name: tmp_path_factory.mktemp(name) for name in ("vit", "dinov2")}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ViTModel(ViTConfig(intermediate_size=48, **size)).save_pretrained(folders["vit"])
        Dinov2Model(Dinov2Config(mlp_ratio=2, **size)).save_pretrained(folders["dinov2"])
    return folders


@pytest.fixture
def build_task(small_bases: dict[str, Path]):  # type: ignore[no-untyped-def]  # a factory of AdapterModel
    """Makes a model of an architecture for a task, with a random LoRA adapter."""

    def build(architecture: str, task: str, **section: object) -> AdapterModel:
        values: dict[str, object] = {"base": str(small_bases[architecture]), "task": task, "max_length": 24}
        values |= {"head": "frozen"} if task == "causal-lm" else {"labels": ("O", "PER", "LOC")}
        adapter = AdapterSection(rank=2, alpha=4, targets=TARGETS[architecture])
        return make_model(ModelSection.model_validate(values | section), adapter)

    return build


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
            "data": {"source": "unused.csv", "labels": ("negative", "positive"), "declared_examples": 40},
            "privacy": {"epsilon": 50.0, "allow_non_private": True},
        }
    )


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution with one component on the path, as an installer would: `install(dist, name, target, group)`.

    `code` is written to the module `slow_federation`, where targets are.
    """
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "slow_federation", raising=False)

    def write(
        distribution: str, name: str, target: str, group: str = "strategies", *, extra: str = "", code: str = ""
    ) -> None:
        (site / "slow_federation.py").write_text(code)
        # By the part before the first hyphen distributions are told apart: fedloom-norms must not hide fedloom.
        folder = site / f"{distribution.replace('-', '_')}-1.5.dist-info"
        folder.mkdir(exist_ok=True)
        provides = f"Provides-Extra: {extra}\n" if extra else ""
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n{provides}")
        with (folder / "entry_points.txt").open("a") as file:
            file.write(f"[fedloom.{group}]\n{name} = {target}\n")
        registry.refresh()

    yield write
    sys.modules.pop("slow_federation", None)
    registry.refresh()
