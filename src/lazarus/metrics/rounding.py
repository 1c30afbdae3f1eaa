"""A stored tensor that may be base + update, rounded to the dtype in which it is stored.

A merge adds an adapter's update D to the weights W of its base and rounds the sum. W lies on the stored grid
already, so the rounding is no random error: an update below half a unit in the last place leaves W as it is.
What a right merge gives can be computed, and so can what a wrong scaling would give: the tensor is held
against both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

Rounding = Literal["exact", "rounded", "beyond", "unknown"]
"""
`exact`: every element is base + update, rounded to nearest; `rounded`: it is that but for elements that the
order of operations may have moved by one unit; `beyond`: it is something else; `unknown`: right and wrong
scalings would store the same, so the tensor cannot tell.
"""

WRONG_SCALINGS = (0.95, 1.05)
"""The nearest wrong merges that must be told from the right one."""


def unit_in_the_last_place(
    values: Float64[Tensor, "*shape"], dtype: torch.dtype
) -> Float64[Tensor, "*shape"]:
    """Return the distance between neighbouring numbers of `dtype` at each value.

    >>> unit_in_the_last_place(torch.tensor([1.0, 3.0]).double(), torch.bfloat16).tolist()
    [0.0078125, 0.015625]
    """
    finfo = torch.finfo(dtype)
    # frexp gives m in [0.5, 1) with value = m · 2ᵉ; below the smallest normal number the distance stays.
    exponents = torch.frexp(values.abs().clamp(min=finfo.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(values, finfo.eps), exponents)


def beyond_rounding(
    dtype: torch.dtype,
    stored: Float64[Tensor, "*shape"],
    base: Float64[Tensor, "*shape"],
    change: Float64[Tensor, "*shape"],
    lost: Float64[Tensor, "*shape"] | None = None,
) -> Bool[Tensor, "*shape"]:
    """Return which elements X are further from W + D than one unit in the last place of the largest term.

    An element that is not finite is. `lost` is how far from D the merge may have computed it.
    """
    largest = torch.maximum(torch.maximum(stored.abs(), base.abs()), change.abs())
    allowed = unit_in_the_last_place(largest, dtype)
    # Not `>`: every comparison with NaN is False, and an element that is NaN has to count as beyond.
    return ~((stored - (base + change)).abs() <= (allowed if lost is None else allowed + lost))


@dataclass
class RoundingTest:
    """Accumulates, over parts of one tensor, how its stored elements X compare with W + D rounded.

    With R(s) = round(W + s·D) − W, the coefficient c = ⟨X − W, R(1)⟩ / ⟨R(1), R(1)⟩ is 1 for a right merge,
    near s for one with the scaling s, 0 for a skipped one and 2 for one applied twice. A right merge may
    differ from round(W + D) in a few elements, by the order and the dtype of the operations: by one unit in
    the last place of the largest term, and by what computing D has lost. It is the right one where c is
    nearer to 1 than to that of a wrong scaling, or where less than half as many elements are unlike it as
    are unlike a wrong one. The first tells where an update moves all elements, the second where it moves few.
    """

    dtype: torch.dtype
    """the dtype in which X is stored"""
    n_elements: int = 0
    n_inexact: int = 0
    """elements that are not W + D rounded to nearest"""
    n_beyond: int = 0
    """elements that are further from W + D than one unit in the last place"""
    update_square: float = 0.0
    """‖D‖²"""
    update_stored: float = 0.0
    """⟨X − W, D⟩: what the stored elements hold of the update"""
    _squares: float = 0.0
    _stored: float = 0.0
    _observed: float = 0.0
    _wrong: tuple[float, ...] = (0.0,) * len(WRONG_SCALINGS)
    _n_unlike_wrong: tuple[int, ...] = (0,) * len(WRONG_SCALINGS)

    def add(
        self,
        stored: Float64[Tensor, "*shape"],
        base: Float64[Tensor, "*shape"],
        change: Float64[Tensor, "*shape"],
        lost: Float64[Tensor, "*shape"] | None = None,
    ) -> None:
        """Take in one part: X as stored, W, and the exact update D, all in float64.

        `lost` is how far from D the merge may have computed it, before it rounded to the stored dtype.
        """
        rounded = self._rounded(base + change)
        self.n_elements += stored.numel()
        self.n_inexact += int((stored != rounded).sum())
        self.n_beyond += int(beyond_rounding(self.dtype, stored, base, change, lost).sum())
        right, found, update = (rounded - base).flatten(), (stored - base).flatten(), change.flatten()
        self._squares += torch.dot(right, right).item()
        self._stored += torch.dot(found, found).item()
        self._observed += torch.dot(found, right).item()
        self.update_square += torch.dot(update, update).item()
        self.update_stored += torch.dot(found, update).item()
        wrong = [self._rounded(base + scaling * change) for scaling in WRONG_SCALINGS]
        self._wrong = tuple(
            so_far + torch.dot((each - base).flatten(), right).item()
            for so_far, each in zip(self._wrong, wrong, strict=True)
        )
        self._n_unlike_wrong = tuple(
            so_far + int((stored != each).sum())
            for so_far, each in zip(self._n_unlike_wrong, wrong, strict=True)
        )

    def _rounded(self, values: Tensor) -> Tensor:
        return values.to(self.dtype).double()

    @property
    def coefficient(self) -> float | None:
        """c, the share of the update that is stored; None where a right merge stores none of it."""
        return self._observed / self._squares if self._squares else None

    @property
    def tells_scalings(self) -> bool:
        """Return whether each of the wrong scalings would store something else than the right one."""
        return all(wrong != self._squares for wrong in self._wrong)

    @property
    def is_a_merge(self) -> bool:
        """Return whether c says something: most of what was stored is along the update, or nothing was."""
        # The squared cosine between X − W and R(1) is above one half.
        return not self._stored or self._observed**2 > self._squares * self._stored / 2

    @property
    def result(self) -> Rounding:
        """Return whether the tensor is base + update, rounded."""
        if self.n_beyond:
            return "beyond"
        if not self.n_inexact:
            return "exact"
        if not self._squares or self.coefficient is None:
            return "beyond"  # a right merge stores base as it is, and this is something else
        if not self.tells_scalings:
            return "unknown"
        nearest_wrong = min(abs(wrong / self._squares - 1) for wrong in self._wrong)
        is_nearer = abs(self.coefficient - 1) < nearest_wrong / 2
        return "rounded" if is_nearer or self.n_inexact < min(self._n_unlike_wrong) / 2 else "beyond"
