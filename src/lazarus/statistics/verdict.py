"""The noise floor, and the verdict whether two models differ by more. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lazarus.results import Verdict
from lazarus.statistics.intervals import score_interval

S = TypeVar("S")

FACTOR = 1.75
"""The floor is so many times the largest noise seen. Calibrated: docs/how-to-read-it.md, "Noise floor"."""

EPSILONS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


@dataclass(frozen=True)
class Floor:
    """The noise floor at one site: in relative L2, and in divergence."""

    relative_l2: float
    divergence: float


def noise_floor(trials: Sequence[tuple[float, float]], dtype: str) -> Floor:
    """Return the floor at one site, from the mean relative L2 and divergence of each trial of the noise.

    `FACTOR` times the largest relative L2, and its square times the largest divergence, which is of
    second order. Never below half a unit in the last place, the rounding of a single element.
    """
    rounding = EPSILONS.get(dtype, EPSILONS["float32"]) / 2
    largest_l2 = max((l2 for l2, _ in trials), default=0.0)
    largest_divergence = max((divergence for _, divergence in trials), default=0.0)
    return Floor(max(FACTOR * largest_l2, rounding), max(FACTOR**2 * largest_divergence, rounding**2 / 2))


def share_floor(largest: float, n_tokens: int) -> float:
    """Return what noise may reach in a share of tokens, 0 to 1, from the largest share of any trial.

    `FACTOR` times that share, and never below the upper end of its 95 % score interval (Wilson 1927): that
    none of a few tokens has flipped does not tell that none of many will.
    """
    return min(1.0, max(FACTOR * largest, score_interval(largest, n_tokens)[1]))


def find_verdict(seen: Mapping[S, float], floors: Mapping[S, Floor]) -> Verdict | None:
    """Return `identical` where nothing differs by one bit, and `changed` where a site is above its floor.

    `seen` is the mean relative L2 at every site and of the logits. It is not taken on the cosine: a change
    of scale is a change. A site that could not be measured says nothing. None where none could, or where the
    only differences are at sites whose noise is not known.
    """
    measured = {site: value for site, value in seen.items() if not math.isnan(value)}
    if not measured:
        return None
    differing = {site: value for site, value in measured.items() if value != 0}
    if not differing:
        return "identical"
    if any(site in floors and value > floors[site].relative_l2 for site, value in differing.items()):
        return "changed"
    # A site without a floor may differ by noise or not: nobody knows, so there is no verdict.
    return "within_noise" if differing.keys() <= floors.keys() else None
