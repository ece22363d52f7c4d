"""How near texts that a model wrote are to those that were wanted."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedloom.core.errors import ConfigError

__all__ = ["Written", "speech_figures", "text_figures"]


class Written(NamedTuple):
    """A text that a model wrote, beside the one of the row."""

    wanted: str
    written: str


def text_figures(pairs: Sequence[Written]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, mean F1 of the rows without stemming (Lin, 2004), and the share of equal texts.

    Raises:
        ConfigError: The package that computes them is missing.

    >>> text_figures([Written("the ward was quiet", "the ward was loud")])
    {'rouge1': 0.75, 'rouge2': 0.6666666666666666, 'rouge_l': 0.75, 'exact_match': 0.0}
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge-score") from error
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(pair.wanted, pair.written) for pair in pairs]
    names = {"rouge1": "rouge1", "rouge2": "rouge2", "rouge_l": "rougeL"}
    found = {ours: float(np.mean([each[theirs].fmeasure for each in scores])) for ours, theirs in names.items()}
    return {**found, "exact_match": _equal(pairs)}


def speech_figures(pairs: Sequence[Written]) -> dict[str, float]:
    """Errors in words (wer) and in characters (cer) over those of all wanted texts, and the share of equal texts.

    Case and punctuation count. Both are 0 at best and may be above 1.

    Raises:
        ConfigError: The package that computes them is missing.

    >>> speech_figures([Written("ten past nine", "ten past five"), Written("nobody", "nobody")])["wer"]
    0.25
    """
    try:
        import jiwer
    except ImportError as error:
        raise _missing("jiwer") from error
    known = [pair for pair in pairs if pair.wanted.strip()]  # of an empty one no share can be taken
    wanted, said = [pair.wanted for pair in known], [pair.written for pair in known]
    rates = {"wer": float(jiwer.wer(wanted, said)), "cer": float(jiwer.cer(wanted, said))} if known else {}
    return {**rates, "exact_match": _equal(pairs)}


def _equal(pairs: Sequence[Written]) -> float:
    return float(np.mean([pair.wanted == pair.written for pair in pairs]))


def _missing(package: str) -> ConfigError:
    return ConfigError(
        f"evaluation.generate needs {package}, which is not here: pip install 'fedloom[text-metrics]', or remove it"
    )
