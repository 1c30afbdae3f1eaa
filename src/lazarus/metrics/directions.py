"""Sums over all prompts at a site, of directions and of differences, in O(hidden) memory."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from lazarus.metrics.states import AccumulatorState, Owners, Rows, sum_by_prompt
from lazarus.metrics.transfers import Update, do_together, on_device

Floats = NDArray[np.float64]

SMALLEST_BASELINE = 0.05
"""Where 1 − A is less, unrelated prompts are all but the same there, and nothing can be set against them."""


class Directions:
    """Accumulates one site over all prompts.

    An update brings whole prompts: what is summed within a prompt is summed there. Updates may otherwise
    come in any order, and one accumulator may take in what another has seen (`state`, `add`).
    """

    def __init__(self) -> None:
        nothing: Floats = np.zeros(1)  # takes on the width of what is added to it
        self.base_sum = self.finetuned_sum = self.products = self.shift = nothing
        self.within = 0.0
        self.n_rows = 0
        self.n_pairs_within = 0
        self.shift_squares = 0.0
        self.n_prompts = 0

    def update(self, prompts: Int[Tensor, " rows"], rows: Rows) -> None:
        """Take in every row of some prompts; rows that are not finite, or zero, are left out."""
        places = torch.nonzero(rows.valid.cpu()).flatten()
        do_together([self.updating(Owners.of(prompts[places]), rows.at(places))])

    def updating(self, owners: Owners, rows: Rows) -> Update[None]:
        """Update in steps, by every valid row of some prompts."""
        if not owners.n_rows:
            return
        n_prompts = owners.n_prompts
        b, f = rows.base_unit, rows.finetuned_unit
        base, finetuned, products, shifts = (
            sum_by_prompt(each, owners.place, n_prompts) for each in (b, f, b * f, rows.finetuned - rows.base)
        )
        # A mean per prompt first: each prompt weighs as much as any other, as in the mean cosine.
        weights = on_device(owners.weights, shifts.device)
        products, shifts = products / weights, shifts / weights
        # Σ_p U_p·V_p: the pairs within a prompt, which `unrelated_similarity` takes off again.
        within = (base * finetuned).sum()
        vectors = [each.sum(0) for each in (base, finetuned, products, shifts)]
        *sums, within, squares = yield (*vectors, within, shifts.square().sum())
        base_sum, finetuned_sum, product_sum, shift_sum = (each.numpy() for each in sums)
        self.base_sum, self.finetuned_sum = self.base_sum + base_sum, self.finetuned_sum + finetuned_sum
        self.products, self.shift = self.products + product_sum, self.shift + shift_sum
        self.within += within.item()
        self.shift_squares += squares.item()
        self.n_rows += owners.n_rows
        self.n_pairs_within += owners.n_pairs
        self.n_prompts += n_prompts

    def state(self) -> AccumulatorState:
        """The sums and the counts."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    def add(self, state: AccumulatorState) -> None:
        """Take in what another accumulator has seen, from its `state`."""
        for name, value in vars(self).items():
            added = state[name]
            # All attributes are sums. `item` makes a Python integer of a count: its square cannot overflow.
            setattr(self, name, value + (added if added.ndim else added.item()))

    def unrelated_similarity(self) -> float:
        """A: the mean cosine of a base state and a fine-tuned state of two different prompts, −1 to 1.

        A = (U·V − Σ_p U_p·V_p) / (N² − Σ_p n_p²), with U = Σ b̂ and V = Σ f̂ over all N rows, and U_p, V_p,
        n_p within prompt p: all pairs of rows of different prompts, without forming one. NaN for less
        than two prompts. Residual streams are anisotropic: A may be 0.9 (Ethayarajh 2019, arXiv 1909.00512).
        """
        n_pairs = self.n_rows**2 - self.n_pairs_within
        if n_pairs == 0:
            return float("nan")
        return float((self.base_sum @ self.finetuned_sum - self.within) / n_pairs)

    def top_share(self, n_largest: int) -> float:
        """The share of the mean cosine that its largest dimensions carry, Σ_k b̂_k f̂_k over them / Σ cos.

        Above one half, the cosine says little of the other dimensions (Timkey & van Schijndel 2021,
        arXiv 2109.04404, eq. 3). NaN where the mean cosine is not positive.
        """
        total = self.products.sum()
        if total <= 0:
            return float("nan")
        return float(np.sort(self.products)[-n_largest:].sum() / total)

    def mean_difference(self) -> Floats:
        """δ̄: the mean over prompts of each prompt's mean f − b, [hidden]; zeros before any update."""
        return self.shift / max(self.n_prompts, 1)

    def static_share(self) -> float:
        """Return how much of the change is one shift, the same for every prompt: ‖μ‖² / mean_p ‖δ̄_p‖².

        ‖μ‖² = ‖δ̄‖² − Σ_p ‖δ̄_p − δ̄‖² / (P(P − 1)) is unbiased for the squared length of the expected
        difference; negative means that none was detected. At most 1; NaN for less than two prompts or
        where nothing differs.
        """
        count = self.n_prompts
        if count < 2 or self.shift_squares == 0:
            return float("nan")
        mean_square = float(np.square(self.mean_difference()).sum())
        # Σ_p ‖δ̄_p − δ̄‖² out of two sums: no prompt's own δ̄_p is kept.
        scatter = self.shift_squares - count * mean_square
        unbiased = mean_square - scatter / (count * (count - 1))
        return unbiased / (self.shift_squares / count)


def normalized_divergence(divergence: float, unrelated_similarity: float) -> float:
    """(1 − mean cos) / (1 − A): 0 for identical, 1 for as unlike as two unrelated prompts are.

    NaN where 1 − A is below `SMALLEST_BASELINE`.

    >>> normalized_divergence(0.125, 0.75)
    0.5
    """
    room = 1 - unrelated_similarity
    return divergence / room if room >= SMALLEST_BASELINE else float("nan")
