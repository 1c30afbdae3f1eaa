"""The metrics of rows against exact arithmetic, within the bound of docs/gpu.md, on rows made to be hard."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from mpmath import mp, mpf  # type: ignore[import-untyped]
from torch import Tensor

from lazarus.metrics import Rows, compare_rows

U = 2.0**-53
WIDTH = 576
DIGITS = 60


def exact(values: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.double().tolist()]


def wanted(base: Tensor, finetuned: Tensor) -> tuple[mpf, mpf]:
    """The divergence, and the relative L2, to `DIGITS` digits."""
    with mp.workdps(DIGITS):
        b, f = exact(base), exact(finetuned)
        squares = [sum(x * y for x, y in zip(*pair, strict=True)) for pair in ((b, b), (f, f), (b, f))]
        bb, ff, bf = (mpf(each.numerator) / mpf(each.denominator) for each in squares)
        apart = sum((y - x) ** 2 for x, y in zip(b, f, strict=True))
        l2 = mp.sqrt(mpf(apart.numerator) / mpf(apart.denominator) / bb)
        return 1 - bf / mp.sqrt(bb * ff), l2


def rows_of(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    step = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    if kind == "one direction":
        base = base.to(dtype)
        return base, base * 2
    if kind == "nearly one direction":
        return base.to(dtype), (3.0 * (base + 1e-6 * step)).to(dtype)
    if kind == "a sink":  # one element carries the length, as at position 0
        base[7] = 3e4
        return base.to(dtype), (base + 1e-3 * step).to(dtype)
    if kind == "all magnitudes":
        scale = torch.logspace(-4, 4, WIDTH, dtype=torch.float64)
        return (base * scale).to(dtype), ((base + 1e-4 * step) * scale).to(dtype)
    if kind == "opposite":
        return base.to(dtype), -base.to(dtype)
    return base.to(dtype), step.to(dtype)


KINDS = [
    "one direction",
    "nearly one direction",
    "a sink",
    "all magnitudes",
    "opposite",
    "unrelated",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_exact_within_their_bound(kind: str, dtype: torch.dtype) -> None:
    base, finetuned = rows_of(kind, dtype)
    assert base.isfinite().all()
    divergence, relative_l2 = wanted(base, finetuned)
    found = compare_rows(Rows.of(base[None], finetuned[None]), centered=False).values[0].tolist()
    e, d = (WIDTH / 2 + 2) * U, max(float(divergence), 0.0)
    bound = 2 * e * (2 * d) ** 0.5 + 2 * e**2 + (WIDTH + 2) * U * d
    with mp.workdps(DIGITS):
        assert abs(mpf(found[0]) - divergence) <= bound
        # A difference is rounded once an element, the two lengths and their quotient as above.
        assert abs(mpf(found[1]) - relative_l2) <= (WIDTH + 4) * U * relative_l2


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_have_no_divergence_at_all(kind: str) -> None:
    base = rows_of(kind, torch.float32)[0][None]
    assert compare_rows(Rows.of(base, base.clone()), centered=False).values[0, :2].tolist() == [0.0, 0.0]


def test_products_in_float32_would_not_be_exact_enough() -> None:
    """Why nothing is multiplied in float32: the floor of float32 models is about 1e-13."""
    base, finetuned = rows_of("nearly one direction", torch.float32)
    divergence = float(wanted(base, finetuned)[0])
    assert 1e-13 < divergence < 1e-11
    units = [
        x / x.square().sum(dtype=torch.float64).sqrt().float() for x in (base, finetuned)
    ]  # the sums are in float64, and all else is not
    narrow = (units[0] - units[1]).square().sum(dtype=torch.float64).item() / 2
    assert abs(narrow - divergence) > 1e-3 * divergence
