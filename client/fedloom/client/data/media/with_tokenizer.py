"""What reads files and texts: it stands in for the tokenizer that it has."""

from dataclasses import dataclass
from typing import Any

__all__ = ["WithTokenizer"]


@dataclass(frozen=True)
class WithTokenizer:
    """A reader that has all that its tokenizer has.

    Args:
        tokenizer: The model's.
    """

    tokenizer: Any

    def __getattr__(self, name: str) -> Any:
        """What a tokenizer has."""
        if name == "tokenizer":  # asked by copy before it is there
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        """Tokens of the vocabulary."""
        return len(self.tokenizer)
