"""Merges as PEFT makes them, right and wrong, in 16-bit dtypes: which of them are base + update, rounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazarus.metrics.rounding import RoundingTest, unit_in_the_last_place

SIXTEEN = [torch.bfloat16, torch.float16]


def low_rank(scale: float, seed: int = 0) -> torch.Tensor:
    """An update B·A in float32, of about this size."""
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(96, 4, generator=generator), torch.randn(4, 80, generator=generator)
    return b @ a * scale


def stored_base(dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(96, 80, generator=torch.Generator().manual_seed(9)) * 0.05).to(dtype)


def held_against(stored: torch.Tensor, base: torch.Tensor, update: torch.Tensor) -> RoundingTest:
    test = RoundingTest(stored.dtype)
    for rows in (slice(i, i + 25) for i in range(0, 96, 25)):
        test.add(stored[rows].double(), base[rows].double(), update[rows].double())
    return test


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_a_merge_in_one_step_is_exact(dtype: torch.dtype, scale: float) -> None:
    base, update = stored_base(dtype), low_rank(scale)
    merged = (base.float() + update).to(dtype)
    assert held_against(merged, base, update).result == "exact"


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3, 1e-4])
def test_a_merge_whose_update_was_rounded_first_is_rounding(dtype: torch.dtype, scale: float) -> None:
    base, update = stored_base(dtype), low_rank(scale)
    assert held_against(base + update.to(dtype), base, update).result in ("exact", "rounded")


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("factor", [0.0, 0.5, 0.95, 1.05, 2.0])
def test_a_merge_with_another_scaling_is_not(dtype: torch.dtype, scale: float, factor: float) -> None:
    base, update = stored_base(dtype), low_rank(scale)
    merged = base + (update * factor).to(dtype)
    assert held_against(merged, base, update).result == "beyond"


def test_an_update_that_vanishes_in_rounding_leaves_base_and_nothing_else() -> None:
    base, update = stored_base(torch.bfloat16), torch.full((96, 80), 1e-12)
    base[base.abs() < 1e-3] = 0.5
    assert held_against(base, base, update).result == "exact"
    moved = base.clone()
    moved[0, 0] = torch.nextafter(moved[0, 0], torch.tensor(1.0, dtype=torch.bfloat16))
    assert held_against(moved, base, update).result == "beyond"


def test_a_copy_in_a_narrower_dtype_is_exact() -> None:
    base = torch.randn(96, 80, generator=torch.Generator().manual_seed(1))
    for dtype in SIXTEEN:
        assert held_against(base.to(dtype), base, torch.zeros(96, 80)).result == "exact"


def test_what_is_not_finite_is_beyond() -> None:
    base, update = stored_base(torch.bfloat16), low_rank(1e-2)
    merged = (base.float() + update).to(torch.bfloat16)
    merged[3, 4] = torch.nan
    assert held_against(merged, base, update).result == "beyond"


@given(st.floats(-6e4, 6e4, allow_nan=False, allow_subnormal=False))
def test_the_unit_is_the_distance_to_the_next_number(value: float) -> None:
    for dtype in SIXTEEN:
        x = torch.tensor(abs(value), dtype=torch.float64).to(dtype)
        above = torch.nextafter(x, torch.tensor(torch.inf, dtype=dtype))
        assert unit_in_the_last_place(x.double(), dtype) == above.double() - x.double()
