"""Similarity of two models of any widths: debiased linear CKA on one row a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lazarus.metrics.states import AccumulatorState, Owners, sum_by_prompt, to_float64
from lazarus.metrics.transfers import Update, do_together, on_device

FEWEST_FOR_CKA = 50
"""Below, the estimate is too noisy to be worth printing."""
MOST_KEPT = 128
"""Above, a seeded sample of the prompts stands for all of them: rows are kept until the end of the run."""


def debiased_cka(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Debiased linear CKA of X [n, p] and Y [n, q], row i of both from the same prompt; about −0.1 to 1.

    With X and Y centred and squared row norms x, y:
    H(X, Y) = ‖XᵀY‖² − n/(n−2) Σ x_i y_i + Σ x_i Σ y_i / ((n−1)(n−2)), and
    CKA = H(X, Y) / √(H(X, X) H(Y, Y)) (Kornblith et al. 2019, arXiv 1905.00414; the unbiased HSIC of
    Song et al. 2012). Unlike the biased one it is about 0 for unrelated data however few the rows are, and
    it can be negative. NaN for fewer than 4 rows or constant data.
    """
    if len(x) < 4:
        return float("nan")
    # By torch, as all the rest: two libraries' threads would wait for each other.
    k, m = _gram(torch.from_numpy(x)), _gram(torch.from_numpy(y))
    # 0 for constant states, which have no similarity to anything.
    scale = _hsic(k, k) * _hsic(m, m)
    return _hsic(k, m) / float(np.sqrt(scale)) if scale > 0 else float("nan")


def _gram(x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows rows"]:
    offsets = x - x[0]  # exactly 0 for constant data
    centred = offsets - offsets.mean(0)
    return centred @ centred.T


def _hsic(k: Float[Tensor, "rows rows"], m: Float[Tensor, "rows rows"]) -> float:
    """H from the Gram matrices: ‖XᵀY‖² is the sum of K ∘ M."""
    n, x, y = len(k), k.diagonal(), m.diagonal()
    return float((k * m).sum() - n / (n - 2) * (x @ y) + x.sum() * y.sum() / ((n - 1) * (n - 2)))


@dataclass(frozen=True)
class KeptRows:
    """The rows of a batch whose prompts are kept, and the places of these prompts."""

    rows: Int[Tensor, " kept"]
    places: Int[Tensor, " prompts"]
    owners: Owners

    @classmethod
    def of(cls, prompts: Int[Tensor, " rows"], slots: Mapping[int, int]) -> KeptRows:
        """Find them; `slots` gives the prompts that are kept a place each."""
        found = torch.tensor([slots.get(prompt, -1) for prompt in prompts.tolist()], dtype=torch.long)
        rows = torch.nonzero(found >= 0).flatten()
        return cls(rows, torch.unique(found[rows]), Owners.of(found[rows]))

    def means(self, states: Float[Tensor, "rows width"]) -> Float[Tensor, "prompts width"]:
        """Return each prompt's mean over its rows, in float64."""
        rows = to_float64(states[on_device(self.rows, states.device)])
        sums = sum_by_prompt(rows, self.owners.place, self.owners.n_prompts)
        return sums / on_device(self.owners.weights, sums.device)


class CkaRows:
    """Keeps one row a prompt of both models, the mean over the prompt's compared tokens, for CKA.

    `slots` gives the prompts that are kept a place each. An update brings whole prompts. Rows are in float32
    unless another dtype is given: they are kept until the end of the run.
    """

    def __init__(self, slots: Mapping[int, int], dtype: torch.dtype = torch.float32) -> None:
        self.slots = dict(slots)
        self.dtype = dtype
        self.base: Tensor | None = None
        self.finetuned: Tensor | None = None
        self.seen = np.zeros(len(self.slots), dtype=bool)

    def update(
        self,
        prompts: Int[Tensor, " rows"],
        base: Float[Tensor, "rows base_width"],
        finetuned: Float[Tensor, "rows finetuned_width"],
    ) -> None:
        """Take in every row of some prompts."""
        do_together([self.updating(KeptRows.of(prompts, self.slots), base, finetuned)])

    def updating(
        self, kept: KeptRows, base: Float[Tensor, "rows base_width"], finetuned: Float[Tensor, "rows f_width"]
    ) -> Update[None]:
        """Update in steps, by every row of some prompts."""
        if not len(kept.rows):
            return
        ours, theirs = yield [kept.means(states).to(self.dtype) for states in (base, finetuned)]
        self.base, self.finetuned = (
            self._placed(self.base, kept, ours),
            self._placed(self.finetuned, kept, theirs),
        )
        self.seen[kept.places.numpy()] = True

    def _placed(self, store: Tensor | None, kept: KeptRows, means: Tensor) -> Tensor:
        if store is None:
            store = torch.zeros(len(self.slots), means.shape[1], dtype=self.dtype)
        store[kept.places] = means
        return store

    def state(self) -> AccumulatorState:
        """The rows that are kept, each model's, and their places."""
        if self.base is None or self.finetuned is None:
            return {}
        places = np.flatnonzero(self.seen)
        return {
            "places": places,
            "base": self.base.numpy()[places],
            "finetuned": self.finetuned.numpy()[places],
        }

    def add(self, state: AccumulatorState) -> None:
        """Take in what another one holds, from its `state`; they kept different prompts."""
        if not state:
            return
        places = torch.from_numpy(state["places"])
        for name in ("base", "finetuned"):
            rows, store = torch.from_numpy(state[name]), getattr(self, name)
            if store is None:
                store = torch.zeros(len(self.slots), rows.shape[1], dtype=self.dtype)
                setattr(self, name, store)
            store[places] = rows
        self.seen[state["places"]] = True

    def cka(self) -> float:
        """Debiased CKA over the kept prompts whose rows are finite; NaN for fewer than `FEWEST_FOR_CKA`."""
        if self.base is None or self.finetuned is None:
            return float("nan")
        x, y = self.base.double().numpy(), self.finetuned.double().numpy()
        usable = self.seen & np.isfinite(x).all(1) & np.isfinite(y).all(1)
        if usable.sum() < FEWEST_FOR_CKA:
            return float("nan")
        return debiased_cka(x[usable], y[usable])
