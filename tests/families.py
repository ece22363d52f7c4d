"""Tiny random base models of many families, saved as each is usually published: the encoder or the whole."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    BartConfig,
    BartModel,
    BaseImageProcessor,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    DebertaV2Config,
    DebertaV2Model,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    HubertConfig,
    HubertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    SequenceFeatureExtractor,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    SwinConfig,
    SwinModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)

from tests.conftest import byte_tokenizer

__all__ = ["FAMILIES", "LANGUAGE_MODELS", "MIXTURES", "PICTURES", "SOUNDS", "SPEECH", "save_family"]

_PAD = len(byte_tokenizer())
_VOCABULARY = _PAD + 4
_SIZE = {"vocab_size": _VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {**_SIZE, "intermediate_size": 48, "initializer_range": 0.2}
_BERT = {**_WIDE, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_MARKS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": _PAD}


_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
_BLOCKS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
_TALL = {**_VISION, "intermediate_size": 48, "initializer_range": 0.2}


def _towers() -> dict[str, dict[str, object]]:
    """The two halves of a model of pictures and their captions."""
    text: dict[str, object] = {**_WIDE, "max_position_embeddings": 32, **_MARKS}
    return {"text_config": text, "vision_config": dict(_TALL)}


def _deberta() -> PreTrainedModel:
    relative = {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 16,
        "share_att_key": True,
    }
    return DebertaV2Model(DebertaV2Config(**_BERT, **relative, type_vocab_size=0, pad_token_id=_MARKS["pad_token_id"]))


def _bart() -> PreTrainedModel:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    return BartModel(BartConfig(vocab_size=_VOCABULARY, **layers, **sizes, **_MARKS, decoder_start_token_id=1))


MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_GROUPED, num_local_experts=4, **_MARKS)),
    "qwen2-moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **_GROUPED, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24, **_MARKS
        )
    ),
}
"""Those of the language models whose feed-forward layers are experts behind a router."""

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
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_WIDE, max_position_embeddings=64, **_MARKS)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**_SIZE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.2, **_MARKS)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED, **_MARKS)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED, **_MARKS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED, head_dim=8, **_MARKS)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GROUPED, head_dim=8, query_pre_attn_scalar=8, **_MARKS)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_WIDE, **_MARKS)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**_GROUPED, **_MARKS)),
    **MIXTURES,
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
"""Models of text by name; none has a head for classification, and the first has no pooler either."""

LANGUAGE_MODELS = (
    *("gpt2", "gpt-neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "phi", "smollm3"),
    *MIXTURES,
)
"""Those of them that predict the next token."""

PICTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: ViTModel(ViTConfig(**_TALL)),
    "deit": lambda: DeiTModel(DeiTConfig(**_TALL)),
    "swin": lambda: SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    ),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**_VISION, mlp_ratio=2, initializer_range=0.2)),
    "clip": lambda: CLIPModel(CLIPConfig(**_towers(), projection_dim=32)),
    "siglip": lambda: SiglipModel(SiglipConfig(**_towers())),
}
"""Models of pictures of 28 by 28 pixels, or of 32 by 32, and of pictures with their captions."""

_PREPARED: dict[str, Callable[[], BaseImageProcessor]] = {
    "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    "siglip": lambda: SiglipImageProcessorPil(size={"height": 28, "width": 28}),
}
"""How pictures are prepared where config.json does not say how large they are."""

SPEECH: dict[str, Callable[[], PreTrainedModel]] = {
    "whisper": lambda: WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=_VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=50,
            max_target_positions=64,
            init_std=0.2,
            decoder_start_token_id=1,
            **_MARKS,
        )
    ),
}
"""Models of speech."""

_WAVES = {
    **_BLOCKS,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 4, 4],
    "conv_kernel": [10, 8, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
}

SOUNDS: dict[str, Callable[[], PreTrainedModel]] = {
    "ast": lambda: ASTModel(
        ASTConfig(**_BLOCKS, max_length=32, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8)
    ),
    "wav2vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**_WAVES)),
    "hubert": lambda: HubertModel(HubertConfig(**_WAVES, feat_extract_norm="layer", conv_bias=True)),
}
"""Models of sounds that write nothing: of a spectrogram of a third of a second, and of waves of any length."""

_EXTRACTORS: dict[str, Callable[[], SequenceFeatureExtractor]] = {
    "whisper": lambda: WhisperFeatureExtractor(feature_size=8, chunk_length=1),
    "ast": lambda: ASTFeatureExtractor(num_mel_bins=16, max_length=32),
    "wav2vec2": Wav2Vec2FeatureExtractor,
    "hubert": lambda: Wav2Vec2FeatureExtractor(return_attention_mask=True),
}
"""How recordings are prepared."""


def save_family(name: str, folder: Path) -> Path:
    """Write the model, how files are read, and where there is text a byte-level tokenizer; returns `folder`."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (FAMILIES | PICTURES | SPEECH | SOUNDS)[name]().save_pretrained(folder)
        if name in _EXTRACTORS:
            _EXTRACTORS[name]().save_pretrained(folder)
        if name in _PREPARED:
            _PREPARED[name]().save_pretrained(folder)
        elif name not in PICTURES | SOUNDS:
            tokenizer.save_pretrained(folder)
    return folder
