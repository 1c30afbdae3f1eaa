"""The measures of one pair of tensors, in float64 and in parts.

f and b are all elements of the fine-tuned and of the base tensor, as one vector each, and d = f − b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from lazarus.weights.views import Update, View, bits, open_rows, same_bits

N_ELEMENTS = 2**17
"""Elements read at once. With fewer, Python takes part of the time; more leave the caches (2.2 ns each)."""
_TINY = 1e-280
"""Sums of squares below this are not to be trusted: single squares were rounded to denormals, or to 0."""
_CANCELLED = 1e-2
"""Where ‖f‖² is less than this share of ‖b‖² it is summed from f, not from b and d."""
_MOST_SCALING = 1000


@dataclass(frozen=True)
class Chunk:
    """Some rows of a pair: base and f − b in float64."""

    base: Float64[Tensor, "rows columns"]
    change: Float64[Tensor, "rows columns"]
    n_changed: int
    stored: Shaped[Tensor, "rows columns"] | None = None
    """f as it was read; None where it is nothing but b + d"""

    @property
    def finetuned(self) -> Float64[Tensor, "rows columns"]:
        """f in float64."""
        # Where f was read it is taken as it is: b + d would be rounded.
        return self.base + self.change if self.stored is None else self.stored.double()


@runtime_checkable
class Pair(Protocol):
    """A base tensor and what became of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of both."""
        ...

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns under which both are read."""
        ...

    @property
    def base(self) -> View:
        """The base tensor."""
        ...

    @property
    def finetuned_dtype(self) -> str:
        """Return the dtype to which the fine-tuned elements were rounded; float64 where they were not."""
        ...

    def identical(self) -> bool:
        """Return whether they are known to have the same bits, without arithmetic."""
        ...

    def chunks(self, n_elements: int) -> Iterator[Chunk]:
        """Yield all rows in order, about `n_elements` elements at a time.

        The tensors of one chunk may be overwritten by the next.
        """
        ...


@dataclass(frozen=True, eq=False)
class ViewPair:
    """Two tensors that are both stored.

    f − b is exact for elements of up to 32 bits unless they are 2²⁹ times apart, and rounded to float64 for
    all others. An element has changed where its bits have: −0.0 is not 0.0, and NaN equals itself. Elements
    of two dtypes are compared in float64.

    Raises:
        ValueError: they have different shapes.
    """

    base: View
    finetuned: View

    def __post_init__(self) -> None:
        if self.base.shape != self.finetuned.shape:
            raise ValueError(f"a tensor of {self.base.shape} cannot be compared with {self.finetuned.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of both."""
        return self.base.shape

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns under which both are read."""
        return self.base.matrix

    @property
    def finetuned_dtype(self) -> str:
        """Return the dtype of the fine-tuned elements."""
        return self.finetuned.dtype

    def identical(self) -> bool:
        """Return whether they have the same bits.

        Raises:
            OSError: a file is missing or too short.
        """
        return same_bits(self.base, self.finetuned)

    def chunks(self, n_elements: int) -> Iterator[Chunk]:
        """All rows in order; a chunk is overwritten by the next.

        Raises:
            OSError: a file is missing or too short.
        """
        step = rows_at_once(self.matrix, n_elements)
        wide = torch.empty(2, step, self.matrix[1], dtype=torch.float64)
        differs: NDArray[np.bool_] = np.empty((step, self.matrix[1]), dtype=np.bool_)
        with open_rows(self.base) as ours, open_rows(self.finetuned) as theirs:
            for start, stop in starts_and_stops(self.matrix[0], step):
                base, change = wide[:, : stop - start].unbind()
                b, f = ours.read(start, stop), theirs.read(start, stop)
                base.copy_(b)
                change.copy_(f)
                # Before the subtraction: `change` still holds f.
                one, other = (b, f) if b.dtype == f.dtype else (base, change)
                np.not_equal(bits(one).numpy(), bits(other).numpy(), out=differs[: stop - start])
                n_changed = int(np.count_nonzero(differs[: stop - start]))
                yield Chunk(base, change.sub_(base), n_changed, f)


@dataclass(frozen=True, eq=False)
class UpdatePair:
    """A stored tensor and what an adapter adds to it; an element has changed where that is not 0.

    Raises:
        ValueError: the update is of another shape.
    """

    base: View
    update: Update
    finetuned_dtype: str = "float64"

    def __post_init__(self) -> None:
        if self.base.matrix != self.update.matrix:
            raise ValueError(f"an update of {self.update.matrix} does not fit a tensor of {self.base.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Return base's shape."""
        return self.base.shape

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns under which both are read."""
        return self.base.matrix

    def identical(self) -> bool:
        """Return whether there is no element at all: the update has not been computed yet."""
        return math.prod(self.matrix) == 0

    def chunks(self, n_elements: int) -> Iterator[Chunk]:
        """All rows in order; a chunk is overwritten by the next.

        Raises:
            OSError: the file is missing or too short.
        """
        step = rows_at_once(self.matrix, n_elements)
        wide = torch.empty(step, self.matrix[1], dtype=torch.float64)
        with open_rows(self.base) as rows, open_rows(self.update) as updates:
            for start, stop in starts_and_stops(self.matrix[0], step):
                change = updates.read(start, stop)
                n_changed = int(np.count_nonzero(change.numpy()))
                yield Chunk(wide[: stop - start].copy_(rows.read(start, stop)), change, n_changed)


def rows_at_once(matrix: tuple[int, int], n_elements: int) -> int:
    """Return how many rows of a matrix have about so many elements; at least one, where there is one."""
    return min(matrix[0], max(1, n_elements // max(matrix[1], 1)))


def starts_and_stops(n_rows: int, step: int) -> Iterator[tuple[int, int]]:
    """Rows in runs of `step`, the last one shorter."""
    for start in range(0, n_rows, step or 1):
        yield start, min(start + step, n_rows)


@dataclass(frozen=True)
class Numbers:
    """The measures of a pair; NaN where one is not finite, or undefined."""

    relative_change: float
    """‖d‖ / ‖b‖; undefined where base is all zero and the other has other bits"""
    cosine_similarity: float
    """of f and b, -1 to 1; 1 where both are all zero, undefined where one is"""
    max_abs_change: float
    n_changed: int
    share_changed: float
    """of all elements, 0 to 1; 0 where there are none"""
    base_norm: float | None
    """‖b‖; None where it was not needed: the bits are the same"""
    change_norm: float


def measure(
    pair: Pair, n_elements: int = N_ELEMENTS, watch: Callable[[Chunk], None] | None = None
) -> Numbers:
    """Measure a pair. Tensors with the same bits are recognised by them, without arithmetic.

    `watch` is given every chunk, also of tensors with the same bits.

    Raises:
        OSError: a file is missing or too short.
    """
    if watch is None and pair.identical():
        return Numbers(0.0, 1.0, 0.0, 0, 0.0, None, 0.0)
    sums = _Sums()
    for chunk in pair.chunks(n_elements):
        sums.add(chunk)
        if watch is not None:
            watch(chunk)
    norms = sums.norms() if sums.safe() else _scaled_norms(pair, n_elements)
    base = _finite(norms.base)
    if sums.n_changed == 0:
        return Numbers(0.0, 1.0, 0.0, 0, 0.0, base, 0.0)
    return Numbers(
        relative_change=_finite(norms.change / base) if base else math.nan,
        cosine_similarity=norms.cosine(),
        max_abs_change=_finite(sums.largest),
        n_changed=sums.n_changed,
        share_changed=sums.n_changed / math.prod(pair.matrix),
        base_norm=base,
        change_norm=_finite(norms.change),
    )


def base_norm(pair: Pair, n_elements: int = N_ELEMENTS) -> float:
    """Return ‖b‖, for the sums over tensors of which some did not change; NaN if it is not finite.

    Raises:
        OSError: the file is missing or too short.
    """
    if math.prod(pair.matrix) == 0:
        return 0.0
    step = rows_at_once(pair.matrix, n_elements)
    wide, norms = torch.empty(step, pair.matrix[1], dtype=torch.float64), []
    with open_rows(pair.base) as rows:
        for start, stop in starts_and_stops(pair.matrix[0], step):
            numbers = wide[: stop - start].copy_(rows.read(start, stop))
            scale = _scale(_largest(0.0, numbers))
            norms.append(float(numbers.mul_(scale).norm()) / scale)
    # hypot scales by itself: no square overflows.
    return _finite(math.hypot(*norms))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


@dataclass(frozen=True)
class _Norms:
    """‖b‖, ‖f‖, ‖d‖, ‖f‖ − ‖b‖, which may be known better than the two, and b̂·f̂."""

    base: float
    finetuned: float
    change: float
    longer: float
    product: float

    def cosine(self) -> float:
        """Return b̂·f̂; of similar vectors 1 − ½‖b̂ − f̂‖², where the product would round to 1.

        ½‖b̂ − f̂‖² = (‖d‖² − (‖f‖ − ‖b‖)²) / (2‖f‖‖b‖).
        """
        if self.base == self.finetuned == 0:
            return 1.0
        # So far apart, the product loses no digits, and the formula below has nothing to gain.
        if self.change > min(self.base, self.finetuned) / 2:
            return min(max(self.product, -1.0), 1.0) if math.isfinite(self.product) else math.nan
        # As two factors: a square may overflow where a norm does not.
        less, more = self.change - abs(self.longer), self.change + abs(self.longer)
        divergence = less / self.base * (more / self.finetuned) / 2
        return 1 - max(divergence, 0.0) if math.isfinite(divergence) else math.nan


@dataclass
class _Sums:
    """b·b, d·d and b·d over the chunks, the largest |d|, and how many elements have changed."""

    base: float = 0.0
    change: float = 0.0
    cross: float = 0.0
    largest: float = 0.0
    n_changed: int = 0

    def add(self, chunk: Chunk) -> None:
        """Take in one chunk."""
        b, d = chunk.base.view(-1), chunk.change.view(-1)
        self.base += torch.dot(b, b).item()
        self.change += torch.dot(d, d).item()
        self.cross += torch.dot(b, d).item()
        self.largest = _largest(self.largest, chunk.change)
        self.n_changed += chunk.n_changed

    @property
    def finetuned(self) -> float:
        """f·f."""
        return self.base + 2 * self.cross + self.change

    def safe(self) -> bool:
        """Return whether no square overflowed or vanished, and f·f did not cancel."""
        whole = math.isfinite(self.base) and math.isfinite(self.change)
        small = self.base < _TINY or self.change < _TINY
        return whole and not small and self.finetuned > _CANCELLED * self.base

    def norms(self) -> _Norms:
        """The norms, where this is safe."""
        base, finetuned = math.sqrt(self.base), math.sqrt(self.finetuned)
        # ‖f‖ − ‖b‖ as (‖f‖² − ‖b‖²) / (‖f‖ + ‖b‖): the difference of the roots would cancel.
        longer = (2 * self.cross + self.change) / (finetuned + base)
        product = (self.base + self.cross) / (base * finetuned)
        return _Norms(base, finetuned, math.sqrt(self.change), longer, product)


def _largest(before: float, tensor: Tensor) -> float:
    """Return the larger of `before` and the largest absolute value; NaN where there is one."""
    numbers = tensor.numpy()
    # NumPy hands NaN on; max() of Python keeps or drops it by its place.
    return float(np.maximum(before, np.maximum(numbers.max(), -numbers.min())))


def _scaled_norms(pair: Pair, n_elements: int) -> _Norms:
    """Return the norms by two passes: squares of elements that a power of two has brought near 1."""
    largest = [0.0, 0.0, 0.0]
    for chunk in pair.chunks(n_elements):
        largest = [_largest(before, part) for before, part in zip(largest, _three(chunk), strict=True)]
    scales = [_scale(value) for value in largest]
    squares, cross = [0.0, 0.0, 0.0], 0.0
    for chunk in pair.chunks(n_elements):
        scaled = [(part * scale).view(-1) for part, scale in zip(_three(chunk), scales, strict=True)]
        squares = [square + torch.dot(x, x).item() for square, x in zip(squares, scaled, strict=True)]
        cross += torch.dot(scaled[0], scaled[1]).item()
    roots = [math.sqrt(square) for square in squares]
    base, finetuned, change = (root / scale for root, scale in zip(roots, scales, strict=True))
    product = cross / roots[0] / roots[1] if roots[0] and roots[1] else math.nan
    return _Norms(base, finetuned, change, finetuned - base, product)


def _three(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    return chunk.base, chunk.finetuned, chunk.change


def _scale(largest: float) -> float:
    """Return the power of two by which `largest` comes near 1; 1 for 0 and for what is not finite."""
    if largest == 0 or not math.isfinite(largest):
        return 1.0
    # A power of two, so that scaling rounds nothing. The limit keeps the factor itself in range.
    return math.ldexp(1.0, min(max(-math.frexp(largest)[1], -_MOST_SCALING), _MOST_SCALING))
