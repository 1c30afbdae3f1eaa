"""The law suite: every metric against its oracle, and what must not change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lazarus.metrics import (
    ROW_METRICS,
    PromptMeans,
    Rows,
    RowValues,
    centered_divergence,
    compare_rows,
    divergence,
    mean_over_prompts,
    norm_ratio,
    relative_l2,
)
from reference import cosine

Metric = Callable[[Tensor, Tensor], Tensor]
METRICS: dict[str, Metric] = {
    "divergence": divergence,
    "relative_l2": relative_l2,
    "norm_ratio": norm_ratio,
    "centered_divergence": centered_divergence,
}
ORACLES: dict[str, Callable[[Any, Any], Any]] = {
    "divergence": lambda b, f: 1 - cosine(b, f),
    "relative_l2": lambda b, f: np.sqrt(((f - b) ** 2).sum(1) / (b**2).sum(1)),
    "norm_ratio": lambda b, f: np.sqrt((f**2).sum(1) / (b**2).sum(1)),
    "centered_divergence": lambda b, f: (
        1 - cosine(b - b.mean(1, keepdims=True), f - f.mean(1, keepdims=True))
    ),
}
SAME = {"divergence": 0.0, "relative_l2": 0.0, "norm_ratio": 1.0, "centered_divergence": 0.0}


def pair(
    seed: int, rows: int = 12, width: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, width, generator=generator)
    return base.to(dtype), (base + 0.3 * torch.randn(rows, width, generator=generator)).to(dtype)


def test_every_metric_of_a_row_has_laws() -> None:
    assert set(METRICS) == set(ORACLES) == set(SAME) == set(ROW_METRICS)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_oracle(name: str, dtype: torch.dtype) -> None:
    base, finetuned = pair(0, dtype=dtype)
    expected = ORACLES[name](base.double().numpy(), finetuned.double().numpy())
    np.testing.assert_allclose(METRICS[name](base, finetuned).numpy(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", METRICS)
def test_the_same_states_give_the_exact_value(name: str) -> None:
    base, _ = pair(1)
    assert (METRICS[name](base, base.clone()) == SAME[name]).all()


@pytest.mark.parametrize("name", ["divergence", "centered_divergence"])
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_positive_scale_leaves_the_angle_alone(name: str, scale: float, seed: int) -> None:
    base, finetuned = pair(seed)
    scaled = METRICS[name](base, finetuned.double() * scale)
    torch.testing.assert_close(scaled, METRICS[name](base, finetuned), rtol=1e-9, atol=1e-15)


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_scaled_copy_is_not_divergent_and_its_ratio_is_the_scale(scale: float, seed: int) -> None:
    base = pair(seed)[0].double()
    assert divergence(base, base * scale).max() <= 1e-30
    torch.testing.assert_close(norm_ratio(base, base * scale), torch.full((12,), scale, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_all_at_once_is_each_by_itself(dtype: torch.dtype) -> None:
    states = pair(11, dtype=dtype)
    values = compare_rows(Rows.of(*states), centered=True).values
    for column, name in enumerate(ROW_METRICS):
        torch.testing.assert_close(values[:, column], METRICS[name](*states), rtol=1e-15, atol=0)


def test_opposite_states_have_divergence_two() -> None:
    base, _ = pair(2)
    torch.testing.assert_close(divergence(base, -base), torch.full((12,), 2.0, dtype=torch.float64))


@given(seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_law_of_cosines_ties_the_metrics_together(seed: int) -> None:
    base, finetuned = pair(seed)
    d, r = divergence(base, finetuned), norm_ratio(base, finetuned)
    expected = (r - 1).square() + 2 * r * d
    torch.testing.assert_close(relative_l2(base, finetuned).square(), expected, rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_rotation_leaves_every_metric_but_the_centred_alone(seed: int) -> None:
    base, finetuned = pair(seed)
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    for name in ("divergence", "relative_l2", "norm_ratio"):
        rotated = METRICS[name](base.double() @ rotation, finetuned.double() @ rotation)
        torch.testing.assert_close(rotated, METRICS[name](base, finetuned), rtol=1e-9, atol=1e-12)


def test_a_constant_moves_the_cosine_and_not_the_centred_one() -> None:
    base, finetuned = pair(3)
    shifted = finetuned.double() + 2.0
    torch.testing.assert_close(centered_divergence(base, shifted), centered_divergence(base, finetuned))
    assert (divergence(base, shifted) - divergence(base, finetuned)).abs().min() > 1e-3


def test_a_difference_of_one_part_in_1e8_does_not_cancel() -> None:
    base = torch.zeros(1, 576, dtype=torch.float64)
    base[0, 0] = 1.0
    finetuned = base.clone()
    finetuned[0, 1] = 1e-8
    assert divergence(base, finetuned).item() == pytest.approx(5e-17, rel=1e-9)


def test_float16_states_of_3000_do_not_overflow() -> None:
    base, finetuned = torch.ones(1, 64).half(), torch.ones(1, 64).half()
    base[0, 0], finetuned[0, 0] = 3000.0, 2990.0
    assert divergence(base, finetuned).isfinite().all()


def test_independent_states_that_share_one_coordinate() -> None:
    # numerics: cos ≈ m²/(m² + d) for d = 576: 0.9455 at m = 100, 0.99942 at m = 1000.
    generator = torch.Generator().manual_seed(0)
    base, finetuned = torch.randn(2, 2000, 576, generator=generator, dtype=torch.float64)
    for shared, expected, places in ((100.0, 0.9455, 1e-3), (1000.0, 0.99942, 1e-5)):
        base[:, 0] = finetuned[:, 0] = shared
        assert 1 - divergence(base, finetuned).mean() == pytest.approx(expected, abs=places)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_a_zero_or_infinite_row_is_not_valid(bad: float, side: int) -> None:
    states = pair(4)
    states[side][3] = bad
    rows = compare_rows(Rows.of(*states), centered=True)
    assert rows.valid.tolist() == [i != 3 for i in range(12)]


def accumulated(order: list[int], split: list[int], seed: int = 5) -> PromptMeans:
    """Twelve rows of four prompts, given in an order and in parts."""
    base, finetuned = pair(seed)
    prompts = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    means = PromptMeans(ROW_METRICS, 4)
    for part in np.split(np.array(order), split):
        index = torch.tensor(part, dtype=torch.long)
        means.update(prompts[index], compare_rows(Rows.of(base[index], finetuned[index]), centered=True))
    return means


@given(order=st.permutations(range(12)), split=st.lists(st.integers(0, 12), max_size=4).map(sorted))
@settings(max_examples=30, deadline=None)
def test_any_order_and_split_give_the_same_means(order: list[int], split: list[int]) -> None:
    whole, parts = accumulated(list(range(12)), []).means(), accumulated(order, split).means()
    for name in ROW_METRICS:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-13)


def test_two_halves_merge_into_one_pass_and_empty_is_neutral() -> None:
    base, finetuned = pair(6)
    prompts = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    rows = compare_rows(Rows.of(base, finetuned), centered=False)
    whole, left, right = (PromptMeans(ROW_METRICS, 4) for _ in range(3))
    whole.update(prompts, rows)
    left.update(prompts[:5], RowValues(rows.values[:5], rows.valid[:5]))
    right.update(prompts[5:], RowValues(rows.values[5:], rows.valid[5:]))
    for merged in (left.merge(right), right.merge(left), whole.merge(PromptMeans(ROW_METRICS, 4))):
        for name in ("divergence", "relative_l2", "norm_ratio"):
            np.testing.assert_allclose(merged.means()[name], whole.means()[name], rtol=1e-13)
        assert merged.n_rows.tolist() == [3, 2, 4, 3]


def test_merging_leaves_its_parts_alone() -> None:
    left = accumulated(list(range(12)), [])
    before = left.sums.copy()
    left.merge(accumulated(list(range(12)), [], seed=9))
    np.testing.assert_array_equal(left.sums, before)


def test_the_prompt_is_the_unit() -> None:
    """A prompt with many tokens weighs as much as one with few, and duplicated tokens change nothing."""
    base, finetuned = pair(7)
    once, twice = PromptMeans(ROW_METRICS, 2), PromptMeans(ROW_METRICS, 2)
    rows = compare_rows(Rows.of(base, finetuned), centered=False)
    prompts = torch.tensor([0] * 10 + [1] * 2)
    once.update(prompts, rows)
    for _ in range(2):
        twice.update(prompts, rows)
    by_prompt = divergence(base, finetuned)
    expected = (by_prompt[:10].mean() + by_prompt[10:].mean()) / 2
    assert mean_over_prompts(once.means()["divergence"]) == pytest.approx(float(expected), rel=1e-13)
    np.testing.assert_allclose(twice.means()["divergence"], once.means()["divergence"], rtol=1e-13)


def test_a_row_that_is_not_finite_is_counted_and_left_out() -> None:
    base, finetuned = pair(8)
    base[0] = float("nan")
    finetuned[11] = 0.0
    means = PromptMeans(ROW_METRICS, 3)
    means.update(
        torch.tensor([0] * 6 + [1] * 5 + [2]), compare_rows(Rows.of(base, finetuned), centered=False)
    )
    assert means.n_excluded.tolist() == [1, 0, 1]
    found = means.means()["divergence"]
    assert found[0] == pytest.approx(float(divergence(base, finetuned)[1:6].mean()), rel=1e-13)
    assert np.isnan(found[2])
    assert mean_over_prompts(found) == pytest.approx(found[:2].mean(), rel=1e-13)
