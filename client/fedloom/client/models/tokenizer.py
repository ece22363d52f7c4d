"""The tokenizer of a base model's folder."""

import warnings
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedloom.client.models.loading_context import LOCAL_ONLY, quiet
from fedloom.core.errors import ModelError

__all__ = ["load_tokenizer"]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, with a padding token.

    Raises:
        ModelError: There is none that can be used.
    """
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, use_fast=True, **LOCAL_ONLY)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        # Padding is masked and never learned, so any token will do; most language models name none.
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None or not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer in {folder} needs a tokenizer.json and a padding or an end token; name one in "
            "tokenizer_config.json"
        )
    return tokenizer
