"""Conversations in a tokenizer's chat template, and which characters of them are the assistant's."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedloom.client.data.records import Turns
from fedloom.core.config.file_format import Answers
from fedloom.core.errors import DataError

__all__ = ["learned_spans"]


def learned_spans(
    turns: Turns, tokenizer: PreTrainedTokenizerBase, answers: Answers = "all"
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the model reads it, and the begin and end of what the assistant said in it.

    What is learned of a turn runs from where the template has the model begin to the mark that ends its turn. It is
    found by writing the conversation up to each turn, so that it needs no marks in the template itself.

    Args:
        turns: At least one is the assistant's.
        tokenizer: It has a chat template.
        answers: last learns the last of the assistant's turns alone, and leaves out what follows it.

    Raises:
        DataError: The template refuses the conversation, or writes a turn that is learned otherwise once another
            follows.
    """
    places = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
    if answers == "last":
        places = places[-1:]
        turns = turns[: places[0] + 1]
    whole = _written(turns, tokenizer)
    spans: list[tuple[int, int]] = []
    for place in places:
        before = _written(turns[:place], tokenizer, prompt=True) if place else ""
        after = _written(turns[: place + 1], tokenizer)
        if not after.startswith(before) or not whole.startswith(after):
            raise DataError(
                "the base model's chat template writes a turn otherwise when another follows, so that it cannot be "
                "told which tokens are the assistant's; give each row one assistant's turn, the last, or add "
                'answers = "last" to [data], which learns the last of each conversation alone'
            )
        # The line break after the end mark begins the next turn; nothing is asked of the model there.
        spans.append((len(before), max(len(before), len(after.rstrip()))))
    return whole, spans


def _written(turns: Turns, tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(
            f"the base model's chat template refuses a conversation ({_said(error, tokenizer)}); most want turns of "
            "user and assistant in turn, after at most one of system"
        ) from error


def _said(error: Exception, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a template says of a conversation, if that stands in it word for word: the rest may quote the row."""
    said = str(error)
    return said if said and said in str(tokenizer.chat_template) else type(error).__name__
