"""Distances between all models of a series, as sums of squares at each site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lazarus.facts import Site

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Distances:
    """Squared distances of any two models at every site. Place 0 is base, place i + 1 member i."""

    sites: Sequence[Site]
    """in the order in which the states reach them"""
    squared: Floats
    """Σ‖x − y‖² over prompts and compared tokens, [sites, models, models]; NaN where it is not known"""
    scale: Floats
    """Σ‖b‖² of base's states, [sites]"""

    @classmethod
    def empty(cls, sites: Sequence[Site], n_models: int) -> Distances:
        """Return distances of which none is known but those of each model to itself."""
        squared = np.full((len(sites), n_models, n_models), np.nan)
        squared[:, range(n_models), range(n_models)] = 0.0
        return cls(sites, squared, np.full(len(sites), np.nan))

    @property
    def n_models(self) -> int:
        """Return the number of models, base among them."""
        return len(self.squared[0])

    @property
    def blocks(self) -> list[int]:
        """Return the places of the sites that are blocks' outputs."""
        return [place for place, site in enumerate(self.sites) if isinstance(site, int)]

    def put(self, site: Site, pair: tuple[int, int], squared: float) -> None:
        """Take in the squared distance of two models at a site."""
        place, (one, other) = self.sites.index(site), pair
        self.squared[place, one, other] = self.squared[place, other, one] = squared

    def of_blocks(self) -> Floats:
        """Return each block's squared distances relative to base's states, [blocks, models, models]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            relative: Floats = self.squared[self.blocks] / self.scale[self.blocks, None, None]
        return relative

    def relative(self) -> Floats:
        """Return √(mean over blocks of Σ‖x − y‖² / Σ‖b‖²), [models, models]; NaN where not known."""
        distance: Floats = np.sqrt(self.of_blocks().mean(0))
        return distance

    def shared_sites(self) -> NDArray[np.int64]:
        """Return at how many first sites two models give the same states bit for bit, [models, models]."""
        first: NDArray[np.int64] = np.cumprod(self.squared == 0, axis=0).sum(0)
        return first


def squared_distance(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Return Σ(x − y)² in float64: exactly 0 only of equal states, NaN where one is not finite.

    >>> squared_distance(np.array([[1.0, 2.0]], np.float32), np.array([[1.0, 5.0]], np.float32))
    9.0
    """
    difference = one.astype(np.float64) - other
    return float(np.vdot(difference, difference))


def step_products(squared: Floats) -> Floats:
    """Return the inner products of the steps between consecutive models, [models − 1, models − 1].

    By the law of cosines on squared distances [models, models].
    """
    steps: Floats = (squared[:-1, 1:] + squared[1:, :-1] - squared[:-1, :-1] - squared[1:, 1:]) / 2
    return steps


def turns(squared: Floats) -> Floats:
    """Return the cosine of each step and the one before it, [models − 2]; NaN where a step is none."""
    products = step_products(squared)
    lengths = np.sqrt(np.diag(products))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines: Floats = np.diag(products, 1) / (lengths[:-1] * lengths[1:])
    return cosines
