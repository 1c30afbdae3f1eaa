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

from factories import joined
from lazarus.metrics import (
    LOCAL_METRICS,
    ROW_METRICS,
    PromptMeans,
    Rows,
    RowValues,
    SiteMeasures,
    SitePlan,
    centered_divergence,
    compare_local,
    compare_logits,
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
    for merged in (joined(left, right), joined(right, left), joined(whole, PromptMeans(ROW_METRICS, 4))):
        for name in ("divergence", "relative_l2", "norm_ratio"):
            np.testing.assert_allclose(merged.means()[name], whole.means()[name], rtol=1e-13)
        assert merged.n_rows.tolist() == [3, 2, 4, 3]


def test_merging_leaves_its_parts_alone() -> None:
    left, right = accumulated(list(range(12)), []), accumulated(list(range(12)), [], seed=9)
    before = right.sums.copy()
    left.add(right.state())
    left.add(right.state())
    np.testing.assert_array_equal(right.sums, before)


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


# What a block's own weights change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_local_change_is_the_relative_l2_and_the_divergence_of_the_same_rows(dtype: torch.dtype) -> None:
    states = pair(12, dtype=dtype)
    states[1][4] = float("nan")
    rows = Rows.of(*states)
    local, whole = compare_local(rows), compare_rows(rows, centered=False)
    for name in ("relative_l2", "divergence"):
        found = local.values[:, LOCAL_METRICS.index(f"local_{name}")]
        torch.testing.assert_close(
            found, whole.values[:, ROW_METRICS.index(name)], rtol=0, atol=0, equal_nan=True
        )
        expected = ORACLES[name](*(part.double().numpy() for part in states))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11)
    assert local.valid.tolist() == [row != 4 for row in range(12)]


def test_a_block_that_makes_the_same_of_base_has_changed_by_exactly_nothing() -> None:
    base, _ = pair(13, dtype=torch.bfloat16)
    assert (compare_local(Rows.of(base, base.clone())).values == 0).all()


# All of them at one site


PROMPTS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3])
PLAN = SitePlan(4, centered=True, kept={0: 0, 2: 1})


def site(rows: slice, states: tuple[Tensor, Tensor], local: Tensor | None = None) -> SiteMeasures:
    measures = SiteMeasures(PLAN)
    base, finetuned = (part[rows] for part in states)
    measures.update(PROMPTS[rows], base, finetuned, None if local is None else local[rows])
    return measures


def assert_same_site(found: SiteMeasures, expected: SiteMeasures) -> None:
    for name in ("means", "local"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        for metric, values in theirs.means().items():
            np.testing.assert_allclose(ours.means()[metric], values, rtol=1e-13, err_msg=metric)
    directions = (found.directions, expected.directions)
    ours, theirs = (
        np.array([d.unrelated_similarity(), d.static_share(), d.top_share(1)]) for d in directions
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-11)
    for side in ("base", "finetuned"):
        assert torch.equal(getattr(found.kept, side), getattr(expected.kept, side))
    assert (found.kept.seen == expected.kept.seen).all()


def test_a_site_measures_everything_of_its_states() -> None:
    states, local = pair(14), pair(15)[0]
    measures = site(slice(None), states, local)
    rows = Rows.of(*states)
    means, locally = PromptMeans(ROW_METRICS, 4), PromptMeans(LOCAL_METRICS, 4)
    means.update(PROMPTS, compare_rows(rows, centered=True))
    locally.update(PROMPTS, compare_local(Rows.of(states[0], local)))
    for found, expected in ((measures.means, means), (measures.local, locally)):
        np.testing.assert_array_equal(found.sums, expected.sums)
    assert measures.directions.n_rows == 12
    assert measures.kept.seen.all()
    assert not site(slice(None), states).local.n_rows.any()


def test_two_parts_of_a_site_merge_into_one_pass() -> None:
    states, local = pair(16), pair(17)[0]
    whole = site(slice(None), states, local)
    left, right = site(slice(5), states, local), site(slice(5, None), states, local)
    for merged in (joined(left, right), joined(right, left), joined(whole, SiteMeasures(PLAN))):
        assert_same_site(merged, whole)
        assert merged.plan == PLAN
    assert_same_site(left, site(slice(5), states, local))


def test_other_widths_have_nothing_but_cka() -> None:
    base, wide = pair(18)[0], pair(19, width=24)[1]
    measures = site(slice(None), (base, wide))
    assert measures.kept.seen.all()
    assert measures.kept.finetuned is not None
    assert measures.kept.finetuned.shape == (2, 24)
    assert not measures.means.n_rows.any()
    assert not measures.means.n_excluded.any()
    assert not measures.local.n_rows.any()
    assert measures.directions.n_rows == 0


@pytest.mark.parametrize("n_tokens", [7, 300, 301])
def test_a_row_of_logits_gives_the_same_bits_alone_and_among_others(n_tokens: int) -> None:
    base, finetuned = torch.randn(2, 40, n_tokens)
    together = compare_logits(base, finetuned).values
    alone = [compare_logits(b[None], f[None]).values for b, f in zip(base, finetuned, strict=True)]
    assert torch.equal(together, torch.cat(alone))
