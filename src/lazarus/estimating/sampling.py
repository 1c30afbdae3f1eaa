"""The time of many batches, from that of a few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lazarus.batches import BATCH_COST


@dataclass(frozen=True)
class Size:
    """The size of a batch: the tokens that run, padding included."""

    n_tokens: int

    @property
    def cost(self) -> int:
        """Return about what it costs, in tokens."""
        return self.n_tokens + BATCH_COST


@dataclass(frozen=True)
class Sampled:
    """The time of all batches, of which some ran."""

    seconds: float
    n_run: int


def spread_out(sizes: Sequence[Size]) -> list[int]:
    """Return the order in which batches are tried: the largest, the smallest, and then those between.

    >>> spread_out([Size(n) for n in (50, 40, 30, 20, 10)])
    [0, 4, 2, 1, 3]
    """
    ranked = sorted(range(len(sizes)), key=lambda index: (-sizes[index].n_tokens, index))
    order, gaps = ranked[:1] + ranked[1:][-1:], [(0, len(ranked) - 1)]
    # Breadth first, so that wherever it ends the ones that ran lie apart.
    while gaps:
        first, last = gaps.pop(0)
        if last - first > 1:
            middle = (first + last) // 2
            order.append(ranked[middle])
            gaps += [(first, middle), (middle, last)]
    return order


def extrapolated(sizes: Sequence[Size], taken: Mapping[int, float]) -> Sampled:
    """Return the time of all batches from the seconds of those that ran, by their indices.

    What a batch takes is a constant and a time a token, at least 0 each, fitted to those that ran; the first
    of these counts as it is, because the first pass of a process takes longer, in a run as well.
    """
    left = [index for index in range(len(sizes)) if index not in taken]
    total = sum(taken.values())
    if not left:
        return Sampled(total, len(taken))
    told = list(taken)[1:] if len(taken) > 2 else list(taken)
    seconds = np.array([taken[index] for index in told])
    n_tokens = np.array([sizes[index].n_tokens for index in told], dtype=float)
    costs = np.array([sizes[index].cost for index in told], dtype=float)
    constant, slope = _line(n_tokens, seconds)
    if constant is None or slope is None:
        rate = seconds.sum() / costs.sum()
        return Sampled(total + rate * sum(sizes[index].cost for index in left), len(taken))
    more = sum(constant + slope * sizes[index].n_tokens for index in left)
    return Sampled(total + more, len(taken))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    """Return the constant and the slope of a line through the points; None where they do not tell."""
    if len(x) < 2 or x.max() < 1.5 * x.min():
        return None, None
    slope, constant = np.polyfit(x, y, 1)
    return (constant, slope) if slope > 0 and constant >= 0 else (None, None)
