"""Members that are not what their names say: the states of base, or of another member, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lazarus.results import SeriesMember
from lazarus.trajectory.distances import Distances

MOVES = 0.1
"""how much of a usual step two models must be apart for their first blocks alone to be the same"""


@dataclass(frozen=True)
class SharedStart:
    """A member whose first blocks give the states that those of another model give."""

    member: int
    """its place, base being 0"""
    other: int
    n_blocks: int


def groups_of_same(distances: Distances, members: Sequence[SeriesMember]) -> list[list[int]]:
    """Return the places of models that give the same states and outputs bit for bit, two or more a group.

    Base is place 0. What is not known is not the same.
    """
    same = (distances.squared == 0).all(0)
    groups: list[list[int]] = []
    for place in range(distances.n_models):
        found = next((g for g in groups if same[g[0], place] and _alike(members, g[0], place)), None)
        if found is None:
            groups.append([place])
        else:
            found.append(place)
    return [group for group in groups if len(group) > 1]


def _alike(members: Sequence[SeriesMember], one: int, other: int) -> bool:
    """Return whether two models' outputs, held against base's, are the same as far as they are known."""
    if one == 0:  # base itself: its verdict sees tokens of which only one vocabulary knows, too
        return members[other - 1].summary.verdict == "identical"
    return members[one - 1].output == members[other - 1].output


def shared_starts(distances: Distances, places: Sequence[int]) -> list[SharedStart]:
    """Return members whose first blocks are another model's bit for bit, though later blocks are not.

    `places` are those of distinct members. Where all members share their first blocks these were not trained,
    and where the first ones share them with base they were not trained yet: neither is told.
    """
    relative, shared = distances.relative(), distances.shared_sites()
    blocks = distances.blocks
    usual = np.median([relative[a, b] for a, b in pairwise(places)] or [np.nan])
    frozen = _frozen(shared, places, blocks)
    found = []
    for at, place in enumerate(places):
        before = [0, *places[:at]]
        others = [
            other
            for other in reversed(before)
            if _n_blocks(shared[place, other], blocks) > frozen and relative[place, other] >= MOVES * usual
        ]
        if others and not _not_trained_yet(shared, [0, *places[: at + 1]], frozen, blocks):
            other = max(others, key=lambda each: (shared[place, each], -abs(place - each)))
            found.append(SharedStart(place, other, _n_blocks(shared[place, other], blocks)))
    return found


def _n_blocks(n_sites: int, blocks: Sequence[int]) -> int:
    """Return how many of the first sites are blocks."""
    return sum(place < n_sites for place in blocks)


def _frozen(shared: NDArray[np.int64], places: Sequence[int], blocks: Sequence[int]) -> int:
    """Return at how many first blocks every step from one member to the next leaves the states as they are.

    The median, so that neither a copy nor a change of what is trained hides it.
    """
    steps = [_n_blocks(shared[a, b], blocks) for a, b in pairwise(places)]
    return int(np.median(steps)) if steps else 0


def _not_trained_yet(
    shared: NDArray[np.int64], models: Sequence[int], frozen: int, blocks: Sequence[int]
) -> bool:
    """Return whether all models up to here have base's first blocks."""
    return all(_n_blocks(shared[0, other], blocks) > frozen for other in models[1:])
