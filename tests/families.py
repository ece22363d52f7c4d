"""Tiny random base models of many families, saved as each is usually published: the encoder or the language model."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
    XLNetConfig,
    XLNetModel,
)

from tests.conftest import byte_tokenizer

__all__ = ["FAMILIES", "save_family"]

_PAD = len(byte_tokenizer())
_VOCABULARY = _PAD + 4
_SIZE = {"vocab_size": _VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {**_SIZE, "intermediate_size": 48, "initializer_range": 0.2}
_BERT = {**_WIDE, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0}
_MARKS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": _PAD}


def _deberta() -> PreTrainedModel:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
    return DebertaV2Model(DebertaV2Config(**_BERT, **relative, type_vocab_size=0, pad_token_id=_MARKS["pad_token_id"]))


def _bart() -> PreTrainedModel:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    return BartModel(BartConfig(vocab_size=_VOCABULARY, **layers, **sizes, **_MARKS, decoder_start_token_id=1))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**_BERT)),
    "roberta": lambda: RobertaModel(RobertaConfig(**_BERT, **_MARKS | {"pad_token_id": 2})),
    "deberta": _deberta,
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(**_SIZE, intermediate_size=48, cls_token_id=0, sep_token_id=1, **_MARKS)
    ),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=_VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48, dropout=0.0)
    ),
    "albert": lambda: AlbertModel(AlbertConfig(**_BERT, embedding_size=16)),
    "electra": lambda: ElectraModel(ElectraConfig(**_BERT, embedding_size=16)),
    "xlnet": lambda: XLNetModel(
        XLNetConfig(vocab_size=_VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0, **_MARKS)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=_VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_MARKS)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_WIDE, num_key_value_heads=2, tie_word_embeddings=True, **_MARKS)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_WIDE, num_key_value_heads=2, **_MARKS)),
    "bart": _bart,
    "t5": lambda: T5Model(
        T5Config(
            vocab_size=_VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    ),
}
"""By name; none has a head for classification, and the first has no pooler either."""


def save_family(name: str, folder: Path) -> Path:
    """Write the model and a byte-level tokenizer with a padding token; returns `folder`."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FAMILIES[name]().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
