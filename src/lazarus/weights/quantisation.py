"""What a quantisation did to one tensor, beside what rounding to nearest would have done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from threading import Event
from typing import Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from lazarus.models.quantised import Precision
from lazarus.results import Quantisation, finite_or_none
from lazarus.weights.coded import CodedView
from lazarus.weights.numbers import N_ELEMENTS, Pair, ViewPair, rows_at_once, starts_and_stops
from lazarus.weights.parallel import until
from lazarus.weights.views import View, open_rows

_WORST = 100
"""One in so many columns counts as an outlier."""


@dataclass(frozen=True, eq=False)
class Quantised:
    """A quantised tensor and the same one before."""

    role: Literal["base", "finetuned"]
    coded: CodedView
    plain: View


def find_quantised(pair: Pair) -> Quantised | None:
    """Return which of a pair is quantised, where it is one alone; None otherwise, and with an adapter."""
    if not isinstance(pair, ViewPair):
        return None
    base, finetuned = pair.base, pair.finetuned
    if isinstance(finetuned, CodedView) and not isinstance(base, CodedView):
        return Quantised("finetuned", finetuned, base)
    if isinstance(base, CodedView) and not isinstance(finetuned, CodedView):
        return Quantised("base", base, finetuned)
    return None


def describe(quantised: Quantised, stop: Event) -> Quantisation:
    """Measure the error of a quantisation.

    Raises:
        OSError: a file is missing or too short.
        WeightsError: the parts of the quantised tensor contradict each other.
    """
    precision = quantised.coded.coded.decoder.precision
    nearest = _Nearest.of(quantised, precision)
    by_column = torch.zeros(quantised.plain.matrix[1], dtype=torch.float64)
    square = nearest_square = 0.0
    n_rows = quantised.plain.matrix[0]
    step = rows_at_once(quantised.plain.matrix, N_ELEMENTS)
    if nearest is not None:
        step = -(-step // nearest.height) * nearest.height
    with open_rows(quantised.coded) as codes, open_rows(quantised.plain) as rows:
        for start, end in until(stop, starts_and_stops(n_rows, step)):
            exact = rows.read(start, end).to(torch.float32)
            error = codes.read(start, end).to(torch.float32) - exact
            by_column += error.square().sum(0, dtype=torch.float64)
            square += exact.square().sum(dtype=torch.float64).item()
            if nearest is not None:
                nearest_square += nearest.error(exact).square().sum(dtype=torch.float64).item()
    norm = math.sqrt(square)
    error_norm, nearest_norm = math.sqrt(float(by_column.sum())), math.sqrt(nearest_square)
    return Quantisation(
        role=quantised.role,
        scheme=precision.scheme,
        bits=precision.bits,
        block=list(precision.block),
        relative_error=_ratio(error_norm, norm),
        nearest_relative_error=None if nearest is None else _ratio(nearest_norm, norm),
        error_ratio=None if nearest is None else _ratio(error_norm, nearest_norm),
        outlier_share=_share_of_worst(by_column),
    )


def _ratio(one: float, other: float) -> float | None:
    return finite_or_none(one / other) if other else None


def _share_of_worst(by_column: Tensor) -> float | None:
    """Return the share of the squared error in the 1 % of the columns that have most of it."""
    total = float(by_column.sum())
    if not total or not math.isfinite(total):
        return None
    n_worst = -(-len(by_column) // _WORST)
    return float(by_column.topk(n_worst).values.sum()) / total


@dataclass(frozen=True)
class _Nearest:
    """Rounding to nearest with one scale a block, from its largest absolute value.

    scale = max|w| / (2^bits − 1) · 2, codes from −2^(bits − 1) to 2^(bits − 1) − 1: what compressed-tensors
    and others do without calibration (`calculate_qparams`, symmetric).
    """

    bits: int
    height: int
    width: int

    @classmethod
    def of(cls, quantised: Quantised, precision: Precision) -> _Nearest | None:
        """Return None for floats of few bits, and where a block is more than what is read at once."""
        height, width = precision.block
        if not precision.is_integer or (quantised.coded.take is not None and height > 1):
            return None
        if height * quantised.plain.matrix[1] > N_ELEMENTS * 32:
            return None
        return cls(precision.bits, height, min(width, quantised.plain.matrix[1]))

    def error(self, exact: Float32[Tensor, "rows columns"]) -> Float32[Tensor, "height width blocks"]:
        """Return the errors, a block at a time; of what is padded they are 0."""
        rows, columns = exact.shape
        padded = torch.nn.functional.pad(exact, (0, -columns % self.width, 0, -rows % self.height))
        blocks = padded.reshape(-1, self.height, padded.shape[1] // self.width, self.width)
        largest = blocks.abs().amax((1, 3), keepdim=True)
        scale = largest * (2 / (2**self.bits - 1))
        most = 2 ** (self.bits - 1)
        codes = (blocks / scale.where(scale > 0, 1.0)).round_().clamp_(-most, most - 1)
        error: Tensor = codes.mul_(scale).sub_(blocks)
        return error.flatten(2)
