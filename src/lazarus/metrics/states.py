"""A pair of rows → its metrics, and each prompt's means over its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lazarus.metrics.transfers import Update, do_together, on_device

ROW_METRICS = ("divergence", "relative_l2", "norm_ratio", "centered_divergence")
LOCAL_METRICS = ("local_relative_l2", "local_divergence")

AccumulatorState = dict[str, NDArray[Any]]
"""The sums and counts of an accumulator, as arrays with names: written to a file, and read back."""


def within(name: str, state: Mapping[str, NDArray[Any]]) -> AccumulatorState:
    """The state as a part, called `name`, of a larger one.

    >>> within("means", {"sums": np.zeros(1)})
    {'means/sums': array([0.])}
    """
    return {f"{name}/{key}": array for key, array in state.items()}


def part_of(state: Mapping[str, NDArray[Any]], name: str) -> AccumulatorState:
    """The part of a larger state that is called `name`, with its own parts.

    >>> part_of({"means/sums/all": np.zeros(1), "kept/base": np.zeros(2)}, "means")
    {'sums/all': array([0.])}
    """
    start = f"{name}/"
    return {key.removeprefix(start): array for key, array in state.items() if key.startswith(start)}


def parts_of(state: Mapping[str, NDArray[Any]]) -> dict[str, AccumulatorState]:
    """The parts of a larger state, by their names.

    >>> parts_of({"means/sums": np.zeros(1), "kept/base": np.zeros(2)})
    {'means': {'sums': array([0.])}, 'kept': {'base': array([0., 0.])}}
    """
    parts: dict[str, AccumulatorState] = {}
    for key, array in state.items():
        name, slash, rest = key.partition("/")
        if slash:
            parts.setdefault(name, {})[rest] = array
    return parts


@dataclass(frozen=True)
class RowValues:
    """The metrics of each row, and which rows are valid (both vectors finite, and not zero)."""

    values: Float[Tensor, "rows metrics"]
    valid: Bool[Tensor, " rows"]

    def landing(self) -> Update[RowValues]:
        """Return the same in the host's memory, in one step."""
        values, valid = yield (self.values, self.valid)
        return RowValues(values, valid)


def to_float64(states: Tensor) -> Float[Tensor, "rows hidden"]:
    """The states in float64; a device without that dtype (MPS) hands them to the CPU first."""
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


@dataclass(frozen=True)
class Rows:
    """Pairs of states in float64, with their lengths and directions, each computed once.

    A length is finite and not zero exactly where the row is: float64 holds the square of every element
    of a narrower dtype.
    """

    base: Float[Tensor, "rows hidden"]
    finetuned: Float[Tensor, "rows hidden"]
    base_length: Float[Tensor, " rows"]
    finetuned_length: Float[Tensor, " rows"]

    @classmethod
    def of(cls, base: Float[Tensor, "rows hidden"], finetuned: Float[Tensor, "rows hidden"]) -> Rows:
        """The rows of two models at one site, in whatever dtype they ran in."""
        b, f = to_float64(base), to_float64(finetuned)
        return cls(b, f, b.norm(dim=-1), f.norm(dim=-1))

    @cached_property
    def base_unit(self) -> Float[Tensor, "rows hidden"]:
        """b̂, the direction of each base state."""
        return self.base / self.base_length[:, None]

    @cached_property
    def finetuned_unit(self) -> Float[Tensor, "rows hidden"]:
        """f̂, the direction of each fine-tuned state."""
        return self.finetuned / self.finetuned_length[:, None]

    @cached_property
    def valid(self) -> Bool[Tensor, " rows"]:
        """Return where both states are finite and not zero."""
        total = self.base_length + self.finetuned_length
        # `> 0` is False for NaN already; `isfinite` is for ∞.
        return (self.base_length > 0) & (self.finetuned_length > 0) & total.isfinite()

    def unlike(self) -> Bool[Tensor, " rows"]:
        """Return where the pair is not valid, and not the same in both models, NaN for NaN."""
        b, f = self.base, self.finetuned
        # Models that are the same give NaN at the same places, and NaN != NaN.
        return ~self.valid & ~((b == f) | (b.isnan() & f.isnan())).all(-1)

    def unmeasured(self) -> Bool[Tensor, " rows"]:
        """Return where the two cannot be compared: one is not finite, or one alone is zero."""
        both_zero = (self.base_length == 0) & (self.finetuned_length == 0)
        return ~self.valid & ~both_zero

    def not_finite(self) -> tuple[Bool[Tensor, " rows"], Bool[Tensor, " rows"]]:
        """Return where base's state is not finite, and where the fine-tuned model's is not."""
        return ~self.base_length.isfinite(), ~self.finetuned_length.isfinite()

    def at(self, places: Int[Tensor, " some"]) -> Rows:
        """Return some of the rows, by their places."""
        places = on_device(places, self.base.device)
        parts = (self.base, self.finetuned, self.base_length, self.finetuned_length)
        return Rows(*(part[places] for part in parts))


def compare_rows(rows: Rows, centered: bool) -> RowValues:
    """Return every metric of every pair of rows; `centered` adds the one for models with LayerNorm.

    The same formulas as above, with each length computed once.
    """
    b, f = rows.base, rows.finetuned
    columns = [
        (rows.base_unit - rows.finetuned_unit).square().sum(-1) / 2,
        (f - b).norm(dim=-1) / rows.base_length,
        rows.finetuned_length / rows.base_length,
        centered_divergence(b, f) if centered else torch.full_like(rows.base_length, torch.nan),
    ]
    return RowValues(torch.stack(columns, dim=-1), rows.valid)


def compare_local(rows: Rows) -> RowValues:
    """The local change of a block: `rows` are B(b) and F(b), both blocks' outputs on the same states."""
    columns = [
        (rows.finetuned - rows.base).norm(dim=-1) / rows.base_length,
        (rows.base_unit - rows.finetuned_unit).square().sum(-1) / 2,
    ]
    return RowValues(torch.stack(columns, dim=-1), rows.valid)


@dataclass(frozen=True)
class Owners:
    """The prompts that some rows belong to, numbered in order."""

    place: Int[Tensor, " rows"]
    """of each row, the number of its prompt"""
    weights: Float[Tensor, "prompts 1"]
    """the rows of each prompt, in float64"""
    n_pairs: int
    """Σ_p n_p²: the pairs of rows within a prompt"""

    @classmethod
    def of(cls, prompts: Int[Tensor, " rows"]) -> Owners:
        """Number the prompts of a batch."""
        _, place, counts = torch.unique(prompts, return_inverse=True, return_counts=True)
        return cls(place, counts.double()[:, None], int(counts.square().sum()))

    @property
    def n_rows(self) -> int:
        """The number of rows."""
        return len(self.place)

    @property
    def n_prompts(self) -> int:
        """The number of prompts."""
        return len(self.weights)


def sum_by_prompt(
    rows: Float[Tensor, "rows hidden"], place: Int[Tensor, " rows"], n_prompts: int
) -> Float[Tensor, "prompts hidden"]:
    """The sum of each prompt's rows; `place` says which prompt a row belongs to, and every prompt has one."""
    place = on_device(place, rows.device)
    # One row for each prompt, as at the last token: nothing to add up.
    if n_prompts == len(rows):
        return rows[place.argsort()]
    sums = torch.zeros(n_prompts, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return sums.index_add_(0, place, rows)


def count_by_prompt(
    counts: NDArray[np.int64], prompts: Int[Tensor, " rows"], sides: Sequence[Bool[Tensor, " rows"]]
) -> None:
    """Add to `counts`, [sides, prompts], the rows of each prompt that are marked on each side."""
    index = prompts.cpu().numpy()
    for side, marked in enumerate(sides):
        # `+=` would count a prompt once, however often its index comes.
        np.add.at(counts[side], index[marked.cpu().numpy()], 1)


class PromptMeans:
    """Accumulates, for each prompt, the sum of each metric over its rows, and their number.

    The prompt is the unit: averages go over a prompt's tokens first, then over prompts. Updates may
    come in any order and split, and one accumulator may take in what another has seen (`state`, `add`);
    `means` does not depend on it beyond the rounding of a prompt's own sum.
    """

    def __init__(self, metrics: Sequence[str], n_prompts: int) -> None:
        self.metrics = tuple(metrics)
        self.sums = np.zeros((n_prompts, len(self.metrics)))
        self.n_rows = np.zeros(n_prompts, dtype=np.int64)
        self.n_excluded = np.zeros(n_prompts, dtype=np.int64)

    def update(self, prompts: Int[Tensor, " rows"], rows: RowValues) -> None:
        """Take in the metrics of some rows; `prompts` names the prompt that each row belongs to."""
        do_together([self.updating(prompts, rows)])

    def updating(self, prompts: Int[Tensor, " rows"], rows: RowValues) -> Update[RowValues]:
        """Update in steps, and return the metrics in the host's memory."""
        rows = yield from rows.landing()
        valid, index = rows.valid.numpy(), prompts.cpu().numpy()
        # A prompt's index comes once for each of its rows, and `+=` would add only one of them.
        np.add.at(self.sums, index[valid], rows.values.numpy()[valid])
        np.add.at(self.n_rows, index[valid], 1)
        np.add.at(self.n_excluded, index[~valid], 1)
        return rows

    def state(self) -> AccumulatorState:
        """Return what was seen, of the prompts that were seen."""
        prompts = np.flatnonzero(self.n_rows + self.n_excluded)
        counts = {"n_rows": self.n_rows[prompts], "n_excluded": self.n_excluded[prompts]}
        return {"prompts": prompts, "sums": self.sums[prompts], **counts}

    def add(self, state: AccumulatorState) -> None:
        """Take in what another accumulator has seen, from its `state`."""
        prompts = state["prompts"]
        for name in ("sums", "n_rows", "n_excluded"):
            # No prompt stands twice in a state, so `+=` adds all of it.
            getattr(self, name)[prompts] += state[name]

    def means(self) -> dict[str, NDArray[np.float64]]:
        """Return each metric's mean over every prompt's rows, [prompts]; NaN for a prompt without rows."""
        # 0 / NaN is NaN without a warning, which 0 / 0 would give.
        counts = np.where(self.n_rows > 0, self.n_rows, np.nan)[:, None]
        return dict(zip(self.metrics, (self.sums / counts).T, strict=True))


def mean_over_prompts(values: NDArray[np.float64]) -> float:
    """The mean of the values that are not NaN; NaN where there is none."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
