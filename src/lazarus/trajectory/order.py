"""The order of a series: whether the distances are those of a path through the members as they were given.

A member that stands where it does not belong makes the path longer: what is summed up is the square of each
step, which for a random walk, with or without a drift, is least in the true order. Moving a member must gain
as much as a whole step, in most blocks, and what is left must be a path; so checkpoints that only jitter
around one place are not reordered, whatever their distances happen to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lazarus.trajectory.distances import Distances, Floats

FEWEST_FOR_ORDER = 6
"""members; of fewer, a path is found by chance"""
STEP_GAIN = 1.0
"""what a move must gain, in squares of the shortest new step"""
END_GAIN = 2.0
"""the same where one end of the path moves, which has a neighbour on one side alone"""
LEAST_SHARE_OF_BLOCKS = 2 / 3
MOST_MOVED = 1 / 3
LEAST_PROGRESS = 0.5
"""of `progress` near a member that was moved; it is 0 for jitter around one place, 1 for a random walk"""
NEAR = 4
"""places on both sides"""
FAR = 2.0
"""Largest squared steps; a base that is farther away than these is not where the series starts."""


@dataclass(frozen=True)
class Reordered:
    """Members that stand where they do not belong."""

    moved: list[int]
    """their places among the models, base being 0"""
    order: list[int]
    """the order in which the models are a path"""


def find_order(distances: Distances, places: Sequence[int]) -> Reordered | None:
    """Look for members that are out of order among these places, in the order given, base not among them.

    Return None where there are none, or too few members to tell. Whether the last two are swapped cannot be
    told: a shorter way may be one that turns back.
    """
    if len(places) < FEWEST_FOR_ORDER:
        return None
    squared = distances.of_blocks()[:, [0, *places]][:, :, [0, *places]]
    if not np.isfinite(squared).all():
        return None
    start = 0 if _starts_at_base(squared.mean(0)) else 1
    order = list(range(start, len(places) + 1))
    moved: set[int] = set()
    most = max(1, int(MOST_MOVED * len(places)))
    while (step := _best_move(squared, order, start)) is not None:
        member, order = step
        moved.add(member)
        if len(moved) > most:
            return None
    if not moved or not _is_path(squared.mean(0), order, moved):
        return None
    known = [0, *places]
    return Reordered(sorted(known[place] for place in moved), [known[place] for place in order if place])


def progress(squared: Floats) -> Floats:
    """Return how far each step goes the way from what precedes it to what follows, in its own length.

    ⟨b − a, q − p⟩ / ‖b − a‖² of neighbours p, a, b, q: 1 of a random walk, 3 of a straight line, 0 of jitter
    around one place, and the negative of these where a and b are swapped. [models − 3]
    """
    p, a, b, q = (np.arange(len(squared) - 3) + i for i in range(4))
    along = (squared[a, q] + squared[b, p] - squared[a, p] - squared[b, q]) / 2
    found: Floats = along / squared[a, b]
    return found


def _starts_at_base(squared: Floats) -> bool:
    """Return whether base is near enough to the first members to be the start of the path."""
    steps = squared[np.arange(1, len(squared) - 1), np.arange(2, len(squared))]
    nearest = int(np.argmin(squared[0, 1:]))
    return nearest <= 1 and bool(squared[0, nearest + 1] <= FAR * steps.max())


def _is_path(squared: Floats, order: Sequence[int], moved: Iterable[int]) -> bool:
    """Return whether the models in this order go somewhere where some were moved: not by chance."""
    found = progress(squared[np.ix_(order, order)])
    places = [(min(at), max(at)) for at in ((order.index(member), member) for member in moved)]
    return all((found[max(0, low - NEAR - 1) : high + NEAR] > LEAST_PROGRESS).all() for low, high in places)


def _best_move(squared: Floats, order: list[int], start: int) -> tuple[int, list[int]] | None:
    """Return the member whose move shortens the path most, and the order with it moved; None if none does.

    Where two neighbours change places, the one that would go back is named.
    """
    best, found = 0.0, None
    mean = squared.mean(0)
    for place in range(1 - start, len(order)):
        for target in range(1 - start, len(order)):
            if target in (place, place + 1) and target != place + 1:
                continue
            moved = _moved(order, place, target)
            if moved == order or _swaps_an_end(order, moved, start):
                continue
            gain = _length(mean, order) - _length(mean, moved)
            if gain > best and _is_real(squared, order, moved, order[place]):
                best, found = gain, (order[place], moved)
    return found


def _moved(order: list[int], place: int, target: int) -> list[int]:
    rest = [*order[:place], *order[place + 1 :]]
    return [*rest[:target], order[place], *rest[target:]]


def _swaps_an_end(order: list[int], moved: list[int], start: int) -> bool:
    """Return whether the last two change places, or the first two where nothing is before them."""
    is_last = moved[:-2] == order[:-2]
    return is_last or (start == 1 and moved[2:] == order[2:])


def _is_real(squared: Floats, order: list[int], moved: list[int], member: int) -> bool:
    """Return whether a move gains more than chance may give."""
    gains = np.array([_length(block, order) - _length(block, moved) for block in squared])
    mean, at = squared.mean(0), moved.index(member)
    beside = [moved[i] for i in (at - 1, at + 1) if 0 <= i < len(moved)]
    shortest = min(mean[member, other] for other in beside)
    at_end = order[-1] == member or moved[-1] == member or 1 in (len(beside), 0)
    least = (END_GAIN if at_end else STEP_GAIN) * shortest
    return bool(gains.mean() > least and (gains > 0).mean() >= LEAST_SHARE_OF_BLOCKS)


def _length(squared: Floats, order: Sequence[int]) -> float:
    return float(squared[order[:-1], order[1:]].sum())
