"""What a quantisation did to one tensor, beside what rounding to nearest would have done."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from lazarus.models.quantised import Precision
from lazarus.results import Quantisation, finite_or_none
from lazarus.weights.numbers import N_ELEMENTS, Chunk, Pair, ViewPair
from lazarus.weights.views import View

_WORST = 100
"""One in so many columns counts as an outlier."""
_MOST_AT_ONCE = 32 * N_ELEMENTS
"""Blocks with more elements are not rounded to nearest."""


@runtime_checkable
class QuantisedView(View, Protocol):
    """A tensor that may be stored as codes."""

    @property
    def precision(self) -> Precision | None:
        """Return how finely it is quantised; None where it is not."""
        ...

    @property
    def has_whole_blocks(self) -> bool:
        """Return whether blocks of its elements, as it is read, are those that have one scale."""
        ...


@dataclass
class QuantisationError:
    """The error of one quantised tensor, added up over the chunks of its pair."""

    role: Literal["base", "finetuned"]
    """which of the two is quantised"""
    precision: Precision
    matrix: tuple[int, int]
    nearest: _Nearest | None
    """None where it cannot be told what rounding to nearest would give"""
    square: float = 0.0
    """the sum of the squares of what the elements were before"""
    nearest_square: float = 0.0
    by_column: Float64[Tensor, " columns"] = field(init=False)
    """the sum of the squared error in each column"""

    def __post_init__(self) -> None:
        self.by_column = torch.zeros(self.matrix[1], dtype=torch.float64)

    @classmethod
    def of(cls, pair: Pair) -> QuantisationError | None:
        """Return None where both of a pair are quantised, or neither, and where an adapter is on one."""
        if not isinstance(pair, ViewPair):
            return None
        base, finetuned = _precision(pair.base), _precision(pair.finetuned)
        if (base is None) == (finetuned is None):
            return None
        view = pair.finetuned if base is None else pair.base
        precision = base or finetuned
        assert precision is not None
        is_whole = isinstance(view, QuantisedView) and view.has_whole_blocks
        nearest = _Nearest.of(precision, pair.matrix) if is_whole else None
        return cls("finetuned" if base is None else "base", precision, pair.matrix, nearest)

    @property
    def n_elements(self) -> int:
        """Return how many elements a chunk must have to hold whole blocks."""
        if self.nearest is None:
            return N_ELEMENTS
        per_block = self.nearest.height * self.matrix[1]
        return -(-N_ELEMENTS // per_block) * per_block

    def add(self, chunk: Chunk) -> None:
        """Take in one chunk."""
        exact = chunk.base if self.role == "finetuned" else chunk.finetuned
        self.by_column += chunk.change.square().sum(0)
        self.square += _square(exact)
        if self.nearest is not None:
            self.nearest_square += _square(self.nearest.error(exact.to(torch.float32)).double())

    def told(self) -> Quantisation:
        """Return what was found."""
        error, norm = math.sqrt(float(self.by_column.sum())), math.sqrt(self.square)
        nearest = None if self.nearest is None else math.sqrt(self.nearest_square)
        return Quantisation(
            role=self.role,
            scheme=self.precision.scheme,
            bits=self.precision.bits,
            block=list(self.precision.block),
            relative_error=_ratio(error, norm),
            nearest_relative_error=None if nearest is None else _ratio(nearest, norm),
            error_ratio=None if nearest is None else _ratio(error, nearest),
            outlier_share=_share_of_worst(self.by_column),
        )


def _precision(view: View) -> Precision | None:
    return view.precision if isinstance(view, QuantisedView) else None


def _square(elements: Tensor) -> float:
    flat = elements.reshape(-1)
    return torch.dot(flat, flat).item()


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
    def of(cls, precision: Precision, matrix: tuple[int, int]) -> _Nearest | None:
        """Return None for floats of few bits, and where a block is more than what is read at once."""
        height, width = precision.block
        if not precision.is_integer or height * matrix[1] > _MOST_AT_ONCE:
            return None
        return cls(precision.bits, max(1, min(height, matrix[0])), max(1, min(width, matrix[1])))

    def error(self, exact: Tensor) -> Tensor:
        """Return the errors, a block at a time; of what is padded they are 0."""
        rows, columns = exact.shape
        if columns % self.width or rows % self.height:
            exact = torch.nn.functional.pad(exact, (0, -columns % self.width, 0, -rows % self.height))
        blocks = exact.reshape(-1, self.height, exact.shape[1] // self.width, self.width)
        if self.height > 1:
            blocks = blocks.transpose(1, 2)
        blocks = blocks.reshape(-1, self.height * self.width)
        low, high = torch.aminmax(blocks, dim=-1, keepdim=True)
        scale = torch.maximum(high, -low) * (2 / (2**self.bits - 1))
        most = 2 ** (self.bits - 1)
        codes = (blocks / scale.where(scale > 0, 1.0)).round_().clamp_(-most, most - 1)
        error: Tensor = codes.mul_(scale).sub_(blocks)
        return error
