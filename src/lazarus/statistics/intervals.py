"""Intervals of the mean divergence over prompts, and the layer from which on it is above the noise.

The prompt is the unit: no interval depends on the order of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lazarus.statistics.columns import BLOCK, Floats, column_means, in_canonical_order

NORMAL_975 = 1.959963984540054
"""The quantile of the standard normal distribution above which 2.5 % lie."""
MIN_PROMPTS = 5
N_REPLICATES = 2000
# The upper end reaches at most so many times as far, in standard errors, as Student's t does. Of five
# prompts a tenth of all resamples hold two values only, and two close values have almost no standard
# error: without a limit one upper end in twenty is a million times the mean (lognormal, sigma 1.2).
LONGEST_REACH = 1.5
# A resample whose variance is below this share of its second moment holds one value, and rounding.
DEGENERATE = 1e-13


@dataclass(frozen=True)
class Intervals:
    """Intervals of the mean divergence over prompts, each [layers], 0 to 2, NaN where unknown.

    `low` to `high` is the pointwise 95 % interval; `band_low` bounds all layers at once (one-sided, 95 %).
    """

    low: Floats
    high: Floats
    band_low: Floats


def intervals(divergence: Floats, seed: int) -> Intervals | None:
    """The intervals of the mean over prompts of `divergence`, [prompts, layers]; None below 5 prompts.

    A bootstrap-t (Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 12; Hall 1988, Ann.
    Statist. 16:927) on the logarithm of the mean, studentised with sd / (√n · mean). Whole prompts are
    resampled, the same ones for every layer, so that the largest statistic over layers of each resample
    gives the simultaneous bound (Romano & Wolf 2005, J. Am. Stat. Assoc. 100:94). NaN is left out of its
    layer: one with fewer than 5 values has NaN ends. Where all are equal, both ends are that value.
    """
    # Not scipy.stats.bootstrap: it has neither studentised nor simultaneous intervals, and the jackknife
    # of its BCa is quadratic in the number of prompts.
    if len(divergence) < MIN_PROMPTS:
        return None
    enough = (~np.isnan(divergence)).sum(0) >= MIN_PROMPTS
    smallest = np.fmin.reduce(divergence, axis=0)
    varies = enough & (smallest < np.fmax.reduce(divergence, axis=0))
    ends = np.tile(np.where(enough, smallest, np.nan), (3, 1))
    if varies.any():
        ordered = in_canonical_order(divergence)[:, varies]
        ends[:, varies] = _bootstrap_t(ordered, np.random.default_rng(seed)).clip(0, 2)
    return Intervals(*ends)


def signed_intervals(values: Floats, seed: int) -> tuple[Floats, Floats] | None:
    """Return both ends of the 95 % interval of the mean over prompts of `values`, [prompts, columns].

    A bootstrap-t (Efron & Tibshirani 1993, ch. 12) on the mean itself, for values of any sign; whole prompts
    are resampled, the same ones for every column. None below 5 prompts; where all values are equal, both ends
    are that value.
    """
    from scipy.special import stdtrit

    n_prompts = len(values)
    if n_prompts < MIN_PROMPTS:
        return None
    # In one order, so that no interval depends on that of the prompts.
    ordered = in_canonical_order(values)
    mean = column_means(ordered)
    centred = ordered - mean
    error = np.sqrt((centred**2).sum(0) / n_prompts / (n_prompts - 1))
    limit = LONGEST_REACH * float(stdtrit(n_prompts - 1, 0.975))
    blocks: list[Floats] = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for counts in resamples(n_prompts, np.random.default_rng(seed)):
            first, second = counts @ centred / n_prompts, counts @ centred**2 / n_prompts
            blocks.append(first / np.sqrt((second - first**2) / (n_prompts - 1)))
    # A resample of equal values has no error of its own: as far as the limit, on its side.
    statistic = np.nan_to_num(np.concatenate(blocks), nan=0.0).clip(-limit, limit)
    below, above = np.quantile(statistic, [0.025, 0.975], axis=0)
    return mean - above * error, mean - below * error


def onset(band_low: Floats, floor: Floats) -> int | None:
    """The first layer whose bound lies above the floor and stays so to the last; None without one.

    Both are [layers], in divergence. NaN is not above.

    >>> import numpy as np
    >>> onset(np.array([0.3, 0.0, 0.2, 0.4]), np.full(4, 0.1))
    2
    """
    not_above = np.flatnonzero(~(band_low > floor))
    first = int(not_above[-1]) + 1 if not_above.size else 0
    return first if first < len(band_low) else None


def _bootstrap_t(divergence: Floats, random: np.random.Generator) -> Floats:
    """Return low, high and simultaneous low end, [3, layers], of layers that have enough unequal values."""
    from scipy.special import stdtrit

    mean = column_means(divergence)
    # Relative to the mean: nothing underflows, and centred, the squares do not cancel.
    relative = divergence / mean - 1
    n_present = (~np.isnan(relative)).sum(0)
    error = np.sqrt(np.nansum(relative**2, axis=0) / n_present / (n_present - 1))
    limit: Floats = LONGEST_REACH * stdtrit(n_present - 1, 0.975)
    statistic = np.maximum(_studentised(relative, -limit, random), -limit)
    below, above = np.nanquantile(statistic, [0.025, 0.975], axis=0)
    at_once = np.nanquantile(np.fmax.reduce(statistic, axis=1), 0.95)
    exponents: Floats = -error * np.stack([above, below, np.full_like(above, at_once)])
    return mean * np.exp(exponents)


def _studentised(relative: Floats, lowest: Floats, random: np.random.Generator) -> Floats:
    """log(mean* / mean) / error* of each resample, [replicates, layers].

    A resample that holds one value has no error: it is NaN, or `lowest` if that value is below the mean
    (such as 0, where most prompts have none: left out, the upper end would sink to the mean).
    """
    present = ~np.isnan(relative)
    filled = np.where(present, relative, 0.0)
    columns = np.concatenate([present, filled, filled**2], axis=1)
    blocks: list[Floats] = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for counts in resamples(len(relative), random):
            n_drawn, first, second = np.split(counts @ columns, 3, axis=1)
            first, second = first / n_drawn, second / n_drawn
            variance = second - first**2
            # The standard error of log mean* is sd* / (√n · mean*), and mean* is 1 + first.
            statistic = np.log1p(first) * (1 + first) / np.sqrt(variance / (n_drawn - 1))
            degenerate = np.where(first < 0, lowest, np.nan)
            blocks.append(np.where(variance > DEGENERATE * second, statistic, degenerate))
    return np.concatenate(blocks)


def resamples(n_prompts: int, random: np.random.Generator) -> Iterator[Floats]:
    """Yield how often each resample holds each prompt, [replicates, prompts], block by block."""
    block = max(1, BLOCK // n_prompts)
    for start in range(0, N_REPLICATES, block):
        size = min(block, N_REPLICATES - start)
        drawn = random.integers(n_prompts, size=(size, n_prompts))
        # One bincount for all resamples: each counts in a range of its own.
        drawn += np.arange(size)[:, None] * n_prompts
        counts = np.bincount(drawn.ravel(), minlength=size * n_prompts)
        yield counts.reshape(size, n_prompts).astype(np.float64)


def score_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share of n, 0 to 1 (Wilson 1927)."""
    squared = NORMAL_975**2 / n
    middle = (share + squared / 2) / (1 + squared)
    reach = NORMAL_975 / (1 + squared) * (share * (1 - share) / n + squared / (4 * n)) ** 0.5
    return max(0.0, middle - reach), min(1.0, middle + reach)
