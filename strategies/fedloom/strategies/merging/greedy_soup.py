"""Greedy soup: adapters are taken in by their scores, as long as the soup does not get worse."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["GreedySoup", "greedy_soup"]

Score = Callable[[tuple[int, ...]], float]


@dataclass(frozen=True)
class GreedySoup:
    """Which adapters are in the soup.

    Args:
        alone: Score of each adapter by itself, in order.
        chosen: Numbers of those in the soup, the best first.
        score: Of the soup.
    """

    alone: tuple[float, ...]
    chosen: tuple[int, ...]
    score: float


def greedy_soup(adapters: int, score: Score) -> GreedySoup:
    """Begin with the best adapter, and add each of the others, best first, unless the soup's score falls by it.

    The soup is never worse than the best adapter on the rows that it was scored on. What it is on others is another
    matter: score it again on rows that chose nothing.

    Args:
        adapters: How many there are, at least one.
        score: Of the uniform soup of the adapters with these numbers; higher is better. It is called 2 n - 1 times.

    Source: Wortsman et al., ICML 2022, arXiv 2203.05482, recipe 1.

    >>> value = {(0,): 0.5, (1,): 0.75, (2,): 0.6, (1, 2): 0.75, (1, 2, 0): 0.7}
    >>> greedy_soup(3, value.__getitem__).chosen
    (1, 2)
    """
    alone = tuple(score((index,)) for index in range(adapters))
    first, *others = sorted(range(adapters), key=lambda index: (-alone[index], index))
    chosen: tuple[int, ...] = (first,)
    best = alone[first]
    for index in others:
        reached = score((*chosen, index))
        if reached >= best:
            chosen, best = (*chosen, index), reached
    return GreedySoup(alone, chosen, best)
