"""The formulas, and the accumulator that turns pairs of states into numbers a prompt.

Everything here is float64: on the few rows that are compared, never on whole activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

ROW_METRICS = ("divergence", "relative_l2", "norm_ratio", "centered_divergence")


@dataclass(frozen=True)
class RowValues:
    """The metrics of each row, and which rows are valid (both vectors finite and not zero)."""

    values: Float[Tensor, "rows metrics"]
    valid: Bool[Tensor, " rows"]


def to_float64(states: Tensor) -> Float[Tensor, "rows hidden"]:
    """The states in float64; a device that has no such type (MPS) hands them to the CPU first."""
    return (states.cpu() if states.device.type == "mps" else states).double()


def divergence(
    base: Float[Tensor, "rows hidden"], finetuned: Float[Tensor, "rows hidden"]
) -> Float[Tensor, " rows"]:
    """1 − cosine similarity of each pair of rows, 0 to 2, as ½‖b̂ − f̂‖².

    The difference of unit vectors does not cancel as 1 − cos does: two states that differ by one
    part in 10⁸ have a divergence of 5e-17, which 1 − cos rounds to 0.

    >>> import torch
    >>> divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
    1.0
    """
    b, f = to_float64(base), to_float64(finetuned)
    difference: Tensor = b / b.norm(dim=-1, keepdim=True) - f / f.norm(dim=-1, keepdim=True)
    return difference.square().sum(-1) / 2


def relative_l2(
    base: Float[Tensor, "rows hidden"], finetuned: Float[Tensor, "rows hidden"]
) -> Float[Tensor, " rows"]:
    """‖f − b‖ / ‖b‖ of each pair of rows, 0 to ∞."""
    b, f = to_float64(base), to_float64(finetuned)
    ratio: Tensor = (f - b).norm(dim=-1) / b.norm(dim=-1)
    return ratio


def norm_ratio(
    base: Float[Tensor, "rows hidden"], finetuned: Float[Tensor, "rows hidden"]
) -> Float[Tensor, " rows"]:
    """‖f‖ / ‖b‖ of each pair of rows, 0 to ∞."""
    ratio: Tensor = to_float64(finetuned).norm(dim=-1) / to_float64(base).norm(dim=-1)
    return ratio


def centered_divergence(
    base: Float[Tensor, "rows hidden"], finetuned: Float[Tensor, "rows hidden"]
) -> Float[Tensor, " rows"]:
    """The divergence after each state's own mean over features is taken off.

    A LayerNorm takes that mean off before it reads a state (Ba et al. 2016, arXiv 1607.06450, eq. 4),
    so the component along the all-ones vector says nothing to the blocks of such a model.
    """
    b, f = to_float64(base), to_float64(finetuned)
    return divergence(b - b.mean(-1, keepdim=True), f - f.mean(-1, keepdim=True))


def compare_rows(
    base: Float[Tensor, "rows hidden"], finetuned: Float[Tensor, "rows hidden"], centered: bool
) -> RowValues:
    """Every metric of every pair of rows; `centered` adds the one for models with LayerNorm.

    The same formulas as above, with each length computed once. A length is finite and not zero exactly
    where the row is: float64 holds the square of every number of the narrower types.
    """
    b, f = to_float64(base), to_float64(finetuned)
    b_length, f_length = b.norm(dim=-1), f.norm(dim=-1)
    valid = (b_length > 0) & (f_length > 0) & (b_length + f_length).isfinite()
    unit_difference = b / b_length[:, None] - f / f_length[:, None]
    columns = [
        unit_difference.square().sum(-1) / 2,
        (f - b).norm(dim=-1) / b_length,
        f_length / b_length,
        centered_divergence(b, f) if centered else torch.full_like(b_length, torch.nan),
    ]
    return RowValues(torch.stack(columns, dim=-1), valid)


class PromptMeans:
    """Accumulates one site: for each prompt, the sum of each metric over its rows, and their number.

    The prompt is the unit: averages go over a prompt's tokens first, then over prompts. Updates may
    come in any order and split, and two accumulators that saw different pairs merge into one that saw
    both; `means` does not depend on it beyond the rounding of a prompt's own sum.
    """

    def __init__(self, n_prompts: int, centered: bool = False) -> None:
        self.centered = centered
        self.sums = np.zeros((n_prompts, len(ROW_METRICS)))
        self.n_rows = np.zeros(n_prompts, dtype=np.int64)
        self.n_excluded = np.zeros(n_prompts, dtype=np.int64)

    def update(
        self,
        prompts: Int[Tensor, " rows"],
        base: Float[Tensor, "rows hidden"],
        finetuned: Float[Tensor, "rows hidden"],
    ) -> None:
        """Take in pairs of rows; `prompts` names the prompt that each row belongs to."""
        rows = compare_rows(base, finetuned, self.centered)
        valid = rows.valid.cpu().numpy()
        index = prompts.cpu().numpy()
        np.add.at(self.sums, index[valid], rows.values.cpu().numpy()[valid])
        np.add.at(self.n_rows, index[valid], 1)
        np.add.at(self.n_excluded, index[~valid], 1)

    def merge(self, other: PromptMeans) -> PromptMeans:
        """A new accumulator that has seen what both have seen."""
        merged = PromptMeans(len(self.n_rows), self.centered)
        merged.sums = self.sums + other.sums
        merged.n_rows = self.n_rows + other.n_rows
        merged.n_excluded = self.n_excluded + other.n_excluded
        return merged

    def means(self) -> dict[str, NDArray[np.float64]]:
        """For each metric, its mean over each prompt's rows, [prompts]; NaN for one without rows."""
        counts = np.where(self.n_rows > 0, self.n_rows, np.nan)[:, None]
        return dict(zip(ROW_METRICS, (self.sums / counts).T, strict=True))


def mean_over_prompts(values: NDArray[np.float64]) -> float:
    """The mean of the values that are not NaN; NaN where there is none."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
