"""Tensors that differ by rounding alone: a merge stored in its dtype, or a copy in a narrower one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from statistics import median
from threading import Event
from typing import Any, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from lazarus.errors import ModelError
from lazarus.metrics.rounding import Rounding, RoundingTest, unit_in_the_last_place
from lazarus.notes import Notes
from lazarus.weights.numbers import N_ELEMENTS, Pair, ViewPair, rows_at_once, starts_and_stops
from lazarus.weights.parallel import until
from lazarus.weights.views import AddedView, Update, View, bits, open_rows

Role = Literal["base", "finetuned"]

ENOUGH = 2**22
"""A tensor that is something else is left after so many elements."""
_EPSILON = 2.0**-24
"""the unit roundoff of float32, in which PEFT computes a low-rank update, or in more"""


@dataclass(frozen=True)
class Rounded:
    """Comparison of a stored tensor with the other one plus an adapter's update, rounded to its dtype."""

    stored: Role
    """the side whose tensor is the rounded one"""
    dtype: str
    result: Rounding
    has_update: bool = False
    share: float | None = None
    """how much of the adapter's update is stored: 1 of a right merge; None where that says nothing"""
    tells_scalings: bool = True
    """whether a merge with another scaling would have stored something else"""

    @property
    def holds(self) -> bool:
        """Return whether the two differ by rounding alone."""
        return self.result in ("exact", "rounded")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A stored tensor that may be `base` and the updates on top of it, rounded."""

    role: Role
    stored: View
    dtype: torch.dtype
    base: View
    updates: Sequence[Update]

    def parts(self) -> Iterator[_Part]:
        """All rows in order, in float64."""
        step = rows_at_once(self.base.matrix, N_ELEMENTS)
        with ExitStack() as opened:
            stored, base, *updates = (
                opened.enter_context(open_rows(each)) for each in (self.stored, self.base, *self.updates)
            )
            for start, stop in starts_and_stops(self.base.matrix[0], step):
                # Copies, because a reader may use its memory again for the next rows.
                below = base.read(start, stop).to(torch.float64, copy=True)
                change, lost = torch.zeros_like(below), torch.zeros_like(below)
                size = below.abs()
                for rows, update in zip(updates, self.updates, strict=True):
                    update_rows = rows.read(start, stop)
                    change += update_rows
                    size += update_rows.abs()
                    magnitude: Any = getattr(update, "magnitude", None)
                    if magnitude is not None:
                        lost += magnitude(start, stop) * _EPSILON
                if len(self.updates) > 1:  # each merge but the last may have rounded what it was put on
                    lost += (len(self.updates) - 1) * unit_in_the_last_place(size, self.dtype)
                yield _Part(stored.read(start, stop).to(torch.float64, copy=True), below, change, lost)

    def merged_in_dtype(self) -> Candidate | None:
        """Return the same with what a merge in the stored dtype adds; None of updates without such a rule."""
        rules: list[Any] = [getattr(update, "merged_in", None) for update in self.updates]
        if len(rules) != 1 or rules[0] is None or (update := rules[0](self.dtype)) is None:
            return None
        return Candidate(self.role, self.stored, self.dtype, self.base, [update])


@dataclass(frozen=True)
class _Part:
    stored: Float64[Tensor, "rows columns"]
    base: Float64[Tensor, "rows columns"]
    change: Float64[Tensor, "rows columns"]
    lost: Float64[Tensor, "rows columns"]


def candidates(pair: Pair) -> list[Candidate]:
    """Return the ways in which a pair may differ by rounding alone.

    Where one tensor has an adapter's update on it, the other is the rounded one. Without an adapter the
    rounded one is that of the narrower dtype, or either, where neither dtype holds every value of the other.
    """
    if not isinstance(pair, ViewPair):
        return []  # an update on the very tensor that it is compared with: nothing was merged
    base, finetuned = _apart(pair.base), _apart(pair.finetuned)
    ways: list[tuple[Role, _Apart, _Apart]] = [("finetuned", finetuned, base), ("base", base, finetuned)]
    found = []
    for role, (stored, own), (source, updates) in ways:
        dtype = getattr(torch, stored.dtype, None)
        if own or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            continue
        if updates or not holds(stored.dtype, source.dtype):
            found.append(Candidate(role, stored, dtype, source, updates))
    return found


_Apart = tuple[View, list[Update]]


def _apart(view: View) -> _Apart:
    """Return a view without the updates on top of it, and these updates."""
    updates = []
    while isinstance(view, AddedView):
        updates.append(view.update)
        view = view.view
    return view, updates


def check(candidate: Candidate, stop: Event) -> Rounded:
    """Check a stored tensor against what rounding alone would have made of the other.

    Raises:
        OSError: a file is missing or too short.
    """
    dtype = candidate.stored.dtype
    if not candidate.updates:
        return Rounded(candidate.role, dtype, _copied(candidate, stop))
    # A base in a wider dtype may have been cast before the merge, or the merge after it.
    bases = [False] if holds(dtype, candidate.base.dtype) else [False, True]
    tests = _add_up(candidate, bases, stop)
    # Where neither base fits, the one that is as it was stored is reported.
    found = next((test for test in tests if test.result in ("exact", "rounded")), tests[0])
    if found.result == "beyond" and (merged := candidate.merged_in_dtype()) is not None:
        with suppress(ModelError):  # an adapter's rule may have steps that torch does not have in that dtype
            (found,) = _add_up(merged, [False], stop)
    share = found.coefficient if found.is_a_merge else None
    return Rounded(candidate.role, dtype, found.result, True, share, found.tells_scalings)


def note_merge(found: Sequence[Rounded], notes: Notes) -> None:
    """Note how the tensors that were held against a merge compare to it."""
    merged = [each for each in found if each.has_update]
    blind = [each for each in merged if each.holds and not each.tells_scalings]
    if blind:
        notes.add(
            "merge-too-small",
            f"of {len(blind)} of the {len(merged)} tensors that the adapter changes, a merge with a scaling "
            f"5 % off would store the same bits: its update is too small there for {blind[0].dtype} to tell",
        )
    unknown = [each for each in merged if each.result == "unknown"]
    if unknown:
        notes.add(
            "merge-too-small",
            f"not known of {len(unknown)} of the {len(merged)} tensors that the adapter changes whether they "
            f"hold its merge: its update is too small there for {unknown[0].dtype} to tell",
        )
    shares = [each.share for each in merged if each.result == "beyond" and each.share is not None]
    if shares:
        notes.add(
            "merge-scale",
            f"{len(shares)} of the {len(merged)} tensors that the adapter changes hold {median(shares):.2f} "
            "times its update (median): a right merge holds 1, a skipped one 0, one that was made twice 2",
        )


def _add_up(candidate: Candidate, bases: Sequence[bool], stop: Event) -> list[RoundingTest]:
    """Run the test for each kind of base: as it is stored, or rounded before the update was added (True)."""
    tests = [RoundingTest(candidate.dtype) for _ in bases]
    for part in until(stop, candidate.parts()):
        for test, is_rounded in zip(tests, bases, strict=True):
            base = part.base.to(candidate.dtype).double() if is_rounded else part.base
            test.add(part.stored, base, part.change, part.lost)
        if all(test.n_beyond and test.n_elements >= ENOUGH for test in tests):
            break
    return tests


def _copied(candidate: Candidate, stop: Event) -> Rounding:
    """Return "exact" if every element was rounded to nearest, "rounded" if every one was cut off."""
    is_nearest = is_cut = True
    for part in until(stop, candidate.parts()):
        nearest = part.base.to(candidate.dtype)
        if bool((part.stored.isinf() & part.base.isfinite()).any()):
            return "beyond"  # it has overflowed
        is_nearest = is_nearest and torch.equal(part.stored, nearest.double())
        is_cut = is_cut and torch.equal(part.stored, _toward_zero(nearest, part.base))
        if not is_nearest and not is_cut:
            return "beyond"
    return "exact" if is_nearest else "rounded"


def _toward_zero(nearest: Tensor, exact: Float64[Tensor, "rows columns"]) -> Float64[Tensor, "rows columns"]:
    """Return `exact` cut off to the dtype of `nearest`."""
    one_less = (bits(nearest) - 1).view(nearest.dtype)  # a float's bits rise with its absolute value
    return torch.where(nearest.double().abs() > exact.abs(), one_less, nearest).double()


def holds(wide: str, narrow: str) -> bool:
    """Return whether a dtype holds every value of another; a ggml type holds only its own."""
    one, other = getattr(torch, wide, None), getattr(torch, narrow, None)
    if one is None or other is None:
        return wide == narrow
    if wide == narrow:
        return True
    if one.is_floating_point and other.is_floating_point:
        ours, theirs = torch.finfo(one), torch.finfo(other)
        holds = ours.eps <= theirs.eps, ours.max >= theirs.max, ours.smallest_normal <= theirs.smallest_normal
        return all(holds)
    return bool(torch.promote_types(one, other) == one)
