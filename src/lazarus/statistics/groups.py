"""Groups of prompts: the curve of each, and how much more the first diverges than the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazarus.statistics.columns import BLOCK, Floats, column_means, in_canonical_order

N_PERMUTATIONS = 9999
# Logarithms are rounded to this: sums of two million of them are exact.
GRID = 2.0**-26


@dataclass(frozen=True)
class Contrast:
    """The contrast of two groups of prompts: how much more one diverges than the other.

    `log_ratio`, [layers], is the mean log divergence of `group_a` less that of `group_b`, NaN where a
    layer is left out, and `layer` where it is largest. `p_value` (above 0, to 1; a diverges more) allows
    for the search over layers, not for the number of contrasts.
    """

    group_a: str
    group_b: str
    log_ratio: Floats
    p_value: float | None
    layer: int | None


@dataclass(frozen=True)
class GroupCurve:
    """The prompts of one group: how many, and their mean divergence, [layers], NaN where none has one."""

    group: str
    n_prompts: int
    mean_divergence: Floats


def group_curves(divergence: Floats, groups: Sequence[str | None]) -> list[GroupCurve]:
    """The curve of each group, in order of appearance; a prompt whose group is None is in no curve.

    `divergence` is [prompts, layers] and `groups` has one name or None a prompt (IndexError if it does not).
    """
    members = _members(divergence, groups)
    return [GroupCurve(name, len(rows), column_means(rows)) for name, rows in members.items()]


def contrasts(divergence: Floats, groups: Sequence[str | None], floor: Floats, seed: int) -> list[Contrast]:
    """Compare the first group in order of appearance (the one under suspicion) with each of the others.

    A label-permutation test with the largest log ratio over layers as the statistic (Westfall & Young
    1993, Resampling-Based Multiple Testing): exact while there are at most 9,999 ways to deal the labels,
    with as many random ones from there on. Whole prompts are dealt. `floor`, [layers], is in divergence:
    what is below it counts as the floor (where that is 0, as the smallest positive number measured at the
    layer), and a layer where the means of both groups are within it is left out. Where a group has fewer
    than 2 measured prompts, or no layer is left, `p_value` is None. One group alone has no contrast.
    """
    members = _members(divergence, groups)
    names = list(members)
    return [_contrast((names[0], name), members, floor, seed) for name in names[1:]]


def _members(divergence: Floats, groups: Sequence[str | None]) -> dict[str, Floats]:
    """The prompts of each group, in order of appearance."""
    labels = np.array(groups, dtype=object)
    return {name: divergence[labels == name] for name in dict.fromkeys(groups) if name is not None}


def _contrast(names: tuple[str, str], members: dict[str, Floats], floor: Floats, seed: int) -> Contrast:
    measured = [members[name][~np.isnan(members[name]).all(1)] for name in names]
    sizes = [len(prompts) for prompts in measured]
    columns = _columns(np.concatenate([in_canonical_order(prompts) for prompts in measured]), floor)
    log_ratio = _log_ratio(np.arange(sum(sizes)) < sizes[0], columns, floor)
    # nanargmax raises where all is NaN.
    layer = None if np.isnan(log_ratio).all() else int(np.nanargmax(log_ratio))
    testable = layer is not None and min(sizes) >= 2
    p_value = _permutation_p(sizes[0], columns, floor, seed) if testable else None
    return Contrast(*names, log_ratio, p_value, layer)


def _columns(divergence: Floats, floor: Floats) -> Floats:
    """Return what is summed over a group, [3, prompts, layers]: presence, divergence, log divergence.

    The logs are rounded to a grid on which sums are exact in any order: deals that tie, tie.
    """
    present = ~np.isnan(divergence)
    smallest = np.where(divergence > 0, divergence, 2.0).min(0, initial=2.0)
    logs = np.log(np.maximum(np.where(present, divergence, 2.0), np.where(floor > 0, floor, smallest)))
    return np.stack([present, np.where(present, divergence, 0.0), present * np.round(logs / GRID) * GRID])


def _log_ratio(in_a: NDArray[np.bool_], columns: Floats, floor: Floats) -> Floats:
    """Mean log D of the prompts in a less that of the rest, [..., layers], for `in_a`, [..., prompts].

    The layers to leave out follow from the labels given, anew for each deal of them: so the test is exact.
    """
    n_a, sum_a, log_a = in_a.astype(np.float64) @ columns
    n_b, sum_b, log_b = (~in_a).astype(np.float64) @ columns
    with np.errstate(divide="ignore", invalid="ignore"):
        above = (sum_a / n_a > floor) | (sum_b / n_b > floor)
        return np.where(above, log_a / n_a - log_b / n_b, np.nan)


def _permutation_p(n_a: int, columns: Floats, floor: Floats, seed: int) -> float:
    # Imported here: it takes longer than the rest of the module together.
    from scipy.stats import permutation_test

    n_prompts = columns.shape[1]

    def largest(prompts_a: Floats, _: Floats, axis: int) -> Any:
        """The largest log ratio over layers of each deal; what is dealt is the prompts' indices."""
        in_a = np.zeros((*prompts_a.shape[:-1], n_prompts), dtype=bool)
        np.put_along_axis(in_a, prompts_a.astype(np.int64), True, axis)
        # fmax passes over NaN, the layers that this deal leaves out.
        return np.fmax.reduce(_log_ratio(in_a, columns, floor), axis=-1, initial=-np.inf)

    prompts = np.split(np.arange(n_prompts), [n_a])
    options = {"vectorized": True, "batch": max(1, BLOCK // n_prompts), "n_resamples": N_PERMUTATIONS}
    random = np.random.default_rng(seed)
    return float(permutation_test(prompts, largest, alternative="greater", rng=random, **options).pvalue)
