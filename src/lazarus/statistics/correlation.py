"""Rank correlation over prompts, and intervals of what a run says of its scores."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lazarus.statistics.columns import BLOCK, Floats
from lazarus.statistics.intervals import (
    MIN_PROMPTS,
    N_REPLICATES,
    NORMAL_975,
    intervals,
    resamples,
    score_interval,
)

FEWEST_FOR_RANKS = 3
"""Two prompts have one order or the other: a correlation of ±1 that says nothing."""
_Interval = tuple[float, float]


def rank_correlation(base: Floats, finetuned: Floats, seed: int) -> tuple[float, _Interval | None]:
    """Spearman's ρ over prompts of each column of two arrays [prompts, columns], averaged over columns.

    With its 95 % interval: the bias-corrected percentiles of a bootstrap over whole prompts, ranked anew in
    each resample, the same prompts for every column (Efron & Tibshirani 1993, ch. 14). Columns in which one
    of the two is tied throughout have no ρ and are left out. ρ is −1 to 1; NaN where no column has one or
    there are fewer than 3 prompts. No interval below 5 prompts, or where ρ is 1 or −1: of one order resamples
    have no other, so they do not tell how far the next prompt may be from it.
    """
    n_prompts = len(base)
    if n_prompts < FEWEST_FOR_RANKS:
        return float("nan"), None
    # In one order, so that no interval depends on that of the prompts.
    order = np.lexsort(np.concatenate([base, finetuned], axis=1).T)
    columns = list(zip(base[order].T, finetuned[order].T, strict=True))

    def mean(weights: Floats) -> Floats:
        return _present_mean(np.stack([_weighted_rho(x, y, weights) for x, y in columns]))

    found = float(mean(np.ones((1, n_prompts)))[0])
    return found, _interval(found, map(mean, _counts(n_prompts, 1, seed)), n_prompts)


def similarity_correlation(base: Floats, finetuned: Floats, seed: int) -> tuple[float, _Interval | None]:
    """Spearman's ρ between the cosines of all pairs of prompts in one model, and in the other.

    `base` is [prompts, width], and `finetuned` may have another width: it tells whether the same prompts are
    near each other (representational similarity, Kriegeskorte et al. 2008). The interval is that of
    `rank_correlation`: prompts are resampled, not pairs, and a prompt drawn twice is no pair with itself
    (Nili et al. 2014).
    """
    n_prompts = len(base)
    if n_prompts < FEWEST_FOR_RANKS:
        return float("nan"), None
    order = np.lexsort(np.concatenate([base, finetuned], axis=1).T)
    one, other = np.triu_indices(n_prompts, 1)
    x, y = (_cosines(each[order])[one, other] for each in (base, finetuned))

    def rho(counts: Floats) -> Floats:
        return _weighted_rho(x, y, counts[:, one] * counts[:, other])

    found = float(rho(np.ones((1, n_prompts)))[0])
    return found, _interval(found, map(rho, _counts(n_prompts, n_prompts, seed)), n_prompts)


def share_interval(values: Floats) -> _Interval | None:
    """Return the 95 % interval of the mean over prompts of shares, 0 to 1, as of a proportion (Wilson 1927).

    Values between 0 and 1 vary less than those that are 0 or 1, so it is no narrower than it should be. Where
    all agree it is not 1 to 1. NaN is left out; None below 5 prompts.
    """
    present = values[~np.isnan(values)]
    n_prompts = len(present)
    if n_prompts < MIN_PROMPTS:
        return None
    return score_interval(float(present.mean()), n_prompts)


def size_interval(values: Floats, seed: int) -> _Interval | None:
    """The 95 % interval of the mean over prompts of sizes, 0 to ∞, by the bootstrap-t of `intervals`."""
    largest = float(np.nanmax(values, initial=0.0))
    # That one is cut at a divergence of 2, so the sizes are brought below 1.
    found = intervals(values[:, None] / (largest or 1.0), seed)
    if found is None or np.isnan(found.low[0]):
        return None
    return float(found.low[0]) * largest, float(found.high[0]) * largest


def _counts(n_prompts: int, width: int, seed: int) -> Iterator[Floats]:
    """Yield resamples as counts of prompts, few enough for `width` values a prompt of each."""
    n_at_once = max(1, BLOCK // (n_prompts * width))
    for block in resamples(n_prompts, np.random.default_rng(seed)):
        for start in range(0, len(block), n_at_once):
            yield block[start : start + n_at_once]


def _interval(rho: float, blocks: Iterator[Floats], n_prompts: int) -> _Interval | None:
    """Return the bias-corrected percentiles of a bootstrap; None where it does not tell."""
    from scipy.special import ndtr, ndtri

    if n_prompts < MIN_PROMPTS or np.isnan(rho) or abs(rho) == 1:
        return None
    found = np.concatenate(list(blocks))
    # A resample in which one model's scores are all tied has no ρ.
    present = found[~np.isnan(found)]
    if 2 * len(present) < N_REPLICATES:
        return None
    # Resamples have ties, which pull ρ down; half of those that are equal count as below. Not all may be.
    below = ((present < rho).mean() + (present <= rho).mean()) / 2
    shift = 2 * ndtri(below.clip(1 / N_REPLICATES, 1 - 1 / N_REPLICATES))
    low, high = np.quantile(present, ndtr(shift + np.array([-NORMAL_975, NORMAL_975])))
    return float(low), float(high)


def _present_mean(values: Floats) -> Floats:
    """The mean of each column's values that are not NaN."""
    present = ~np.isnan(values)
    mean: Floats = np.nansum(values, axis=0) / np.where(present.any(0), present.sum(0), np.nan)
    return mean


def _weighted_rho(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Spearman's ρ of [n] and [n] where each comes as often as `weights` [replicates, n] say; NaN if tied."""
    one, other = _centred_midranks(x, weights), _centred_midranks(y, weights)
    covariance = (weights * one * other).sum(1)
    scale = (weights * one**2).sum(1) * (weights * other**2).sum(1)
    rho: Floats = covariance / np.sqrt(np.where(scale > 0, scale, np.nan))
    return rho.clip(-1, 1)


def _centred_midranks(values: Floats, weights: Floats) -> Floats:
    """Each value's rank less the mean rank, [replicates, n]; ties share theirs."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))
    groups: NDArray[np.int64] = np.searchsorted(starts, np.arange(len(values)), side="right") - 1
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)
    middles = np.cumsum(sizes, axis=1) - sizes / 2 - sizes.sum(1, keepdims=True) / 2
    ranks = np.empty_like(weights)
    ranks[:, order] = middles[:, groups]
    return ranks


def _cosines(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / np.where(lengths > 0, lengths, 1.0)
    found: Floats = units @ units.T
    return found
