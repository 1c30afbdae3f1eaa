"""Divergences as arrays [prompts, layers], NaN where one could not be measured."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BLOCK = 2_000_000
"""Resamples and permutations are drawn in blocks of at most so many elements, 16 MB an array."""


def in_canonical_order(divergence: Floats) -> Floats:
    """Return the prompts in an order that depends neither on how they came nor on the order of layers."""
    # NaN gets a value of its own, so that a prompt without any divergence is not sorted as one of zeros.
    key = np.sort(np.nan_to_num(divergence, nan=-np.pi), axis=1).sum(1)
    ordered: Floats = divergence[np.argsort(key, kind="stable")]
    return ordered


def column_means(divergence: Floats) -> Floats:
    """Return the mean over prompts at each layer, [layers]; NaN where no prompt has a value."""
    n_present = (~np.isnan(divergence)).sum(0)
    mean: Floats = np.nansum(divergence, axis=0) / np.where(n_present > 0, n_present, np.nan)
    return mean
