"""What all prompts have in common at a site: the unrelated-prompt baseline, top shares, the static shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from factories import joined
from lazarus.metrics import Directions, Rows, divergence, normalized_divergence

OWNERS = [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]
DTYPES = [torch.float32, torch.bfloat16]
EMPTY = {"unrelated": float("nan"), "top1": float("nan"), "top3": float("nan"), "static": float("nan")}


def states(seed: int, dtype: torch.dtype = torch.float32, rows: int = len(OWNERS)) -> tuple[Tensor, Tensor]:
    """Rows with a direction that all share, and fine-tuned ones with a shift that all share."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, 16, generator=generator) + 0.7 * torch.randn(16, generator=generator)
    shift = 0.4 * torch.randn(16, generator=generator)
    return base.to(dtype), (base + shift + 0.3 * torch.randn(rows, 16, generator=generator)).to(dtype)


def seen(owners: Sequence[int], base: Tensor, finetuned: Tensor) -> Directions:
    directions = Directions()
    directions.update(torch.tensor(owners, dtype=torch.long), Rows.of(base, finetuned))
    return directions


def quantities(directions: Directions) -> dict[str, Any]:
    return {
        "unrelated": directions.unrelated_similarity(),
        "top1": directions.top_share(1),
        "top3": directions.top_share(3),
        "static": directions.static_share(),
        "mean": directions.mean_difference(),
    }


def oracle(owners: Sequence[int], base: Tensor, finetuned: Tensor) -> dict[str, Any]:
    b, f = base.double().numpy(), finetuned.double().numpy()
    return {
        "unrelated": reference.unrelated_similarity(owners, b, f),
        "top1": reference.top_share(owners, b, f, 1),
        "top3": reference.top_share(owners, b, f, 3),
        "static": reference.static_share(owners, b, f),
        "mean": reference.prompt_means(owners, f - b).mean(0),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("owners", [OWNERS, list(range(10)), [3, 0, 3, 0, 1, 3, 2, 1, 0, 2]])
def test_equals_the_oracle(owners: list[int], dtype: torch.dtype) -> None:
    pair = states(0, dtype)
    assert_same(quantities(seen(owners, *pair)), oracle(owners, *pair))


@given(order=st.permutations(range(10)), cuts=st.lists(st.integers(0, 4), max_size=3).map(sorted))
@settings(max_examples=40, deadline=None)
def test_any_order_and_any_split_by_prompts_give_the_same(order: list[int], cuts: list[int]) -> None:
    base, finetuned = states(1)
    prompts = list(dict.fromkeys(OWNERS[row] for row in order))
    parts = Directions()
    for some in np.split(np.array(prompts), cuts):
        rows = [row for row in order if OWNERS[row] in some]
        owners = torch.tensor([OWNERS[row] for row in rows], dtype=torch.long)
        parts.update(owners, Rows.of(base[rows], finetuned[rows]))
    assert_same(quantities(parts), quantities(seen(OWNERS, base, finetuned)))


@given(cut=st.sampled_from([0, 3, 4, 8, 10]), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_two_parts_merge_into_one_pass_and_stay_as_they_were(cut: int, seed: int) -> None:
    base, finetuned = states(seed)
    left, right = (seen(OWNERS[part], base[part], finetuned[part]) for part in (slice(cut), slice(cut, None)))
    before = [quantities(part) for part in (left, right)]
    whole = quantities(seen(OWNERS, base, finetuned))
    for merged in (joined(left, right), joined(right, left), joined(left, Directions(), right)):
        assert_same(quantities(merged), whole)
        merged.update(torch.tensor([9]), Rows.of(base[:1], finetuned[:1]))
    for part, old in zip((left, right), before, strict=True):
        assert_same(quantities(part), old)


def test_nothing_and_one_prompt_have_no_baseline_and_no_static_share() -> None:
    base, finetuned = states(2)
    assert_same(quantities(Directions()), {**EMPTY, "mean": np.zeros(1)})
    assert_same(quantities(seen([], base[:0], finetuned[:0])), {**EMPTY, "mean": np.zeros(1)})
    one = quantities(seen([5] * 10, base, finetuned))
    assert np.isnan([one["unrelated"], one["static"]]).all()
    assert one["top3"] == pytest.approx(oracle([5] * 5 + [6] * 5, base, finetuned)["top3"], rel=1e-12)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_a_zero_or_infinite_row_is_left_out(bad: float, side: int) -> None:
    pair = states(3)
    pair[side][[1, 3]] = bad  # one row of prompt 0, and all that prompt 1 has
    kept = [row for row in range(10) if row not in (1, 3)]
    expected = oracle([OWNERS[row] for row in kept], pair[0][kept], pair[1][kept])
    directions = seen(OWNERS, *pair)
    assert_same(quantities(directions), expected)
    assert directions.n_prompts == 3


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_rotation_leaves_the_baseline_and_the_static_share_alone(seed: int) -> None:
    base, finetuned = states(seed)
    noise = torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(noise)[0]
    plain = quantities(seen(OWNERS, base, finetuned))
    rotated = quantities(seen(OWNERS, base.double() @ rotation, finetuned.double() @ rotation))
    for name in ("unrelated", "static"):
        assert rotated[name] == pytest.approx(plain[name], rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(rotated["mean"], plain["mean"] @ rotation.numpy(), atol=1e-12)


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_scale_of_each_side_leaves_cosines_alone_and_one_of_both_the_share(scale: float, seed: int) -> None:
    base, finetuned = (part.double() for part in states(seed))
    plain = quantities(seen(OWNERS, base, finetuned))
    one, both = seen(OWNERS, base, finetuned * scale), seen(OWNERS, base * scale, finetuned * scale)
    for name in ("unrelated", "top1", "top3"):
        assert quantities(one)[name] == pytest.approx(plain[name], rel=1e-9)
    assert both.static_share() == pytest.approx(plain["static"], rel=1e-9)
    np.testing.assert_allclose(both.mean_difference(), plain["mean"] * scale, rtol=1e-9, atol=1e-12 * scale)


# Top shares


def test_duplicated_tokens_inside_a_prompt_change_no_share_and_no_difference() -> None:
    base, finetuned = states(4)
    twice = [0, 1, 2, 0, 1, 2, *range(3, 10)]
    duplicated = quantities(seen([OWNERS[row] for row in twice], base[twice], finetuned[twice]))
    plain = quantities(seen(OWNERS, base, finetuned))
    for name in ("top1", "top3", "static", "mean"):
        np.testing.assert_allclose(duplicated[name], plain[name], rtol=1e-12, err_msg=name)


def test_one_dimension_that_every_state_shares_carries_the_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    base, finetuned = torch.randn(2, 40, 64, generator=generator)
    base[:, 7] = finetuned[:, 7] = 100.0
    directions = seen(list(range(40)), base, finetuned)
    assert directions.top_share(1) > 0.99
    assert directions.top_share(3) >= directions.top_share(1)
    assert directions.top_share(64) == pytest.approx(1.0)


def test_even_states_have_even_shares_and_opposite_ones_have_none() -> None:
    base = torch.ones(4, 16)
    assert seen([0, 1, 2, 3], base, base).top_share(3) == pytest.approx(3 / 16)
    assert np.isnan(seen([0, 1, 2, 3], base, -base).top_share(1))


# One shift


def test_a_constant_shift_is_static() -> None:
    base, _ = states(5)
    shift = torch.arange(16.0).double()
    directions = seen(OWNERS, base, base.double() + shift)
    assert directions.static_share() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(directions.mean_difference(), shift, rtol=1e-12, atol=1e-14)


def test_the_static_share_is_the_mean_product_of_two_prompts_differences() -> None:
    base, finetuned = states(6, torch.float64, rows=7)
    shifts = (finetuned - base).numpy()
    products = shifts @ shifts.T
    between = (products.sum() - np.trace(products)) / (7 * 6)
    expected = between / (np.trace(products) / 7)
    assert seen(list(range(7)), base, finetuned).static_share() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", ["noise", "random sign"])
def test_what_is_not_static_has_a_share_of_zero_on_average(kind: str) -> None:
    shares = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        base, shift = torch.randn(2, 20, 16, generator=generator, dtype=torch.float64)
        if kind == "random sign":
            shift = shift[0] * (torch.randint(0, 2, (20, 1), generator=generator) * 2 - 1)
        shares.append(seen(list(range(20)), base, base + shift).static_share())
    assert min(shares) < 0 < max(shares)
    # ‖δ̄‖² / mean ‖δ̄_p‖² by itself would be 1/20 on average; the standard errors are 0.001 and 0.005.
    assert np.mean(shares) == pytest.approx(0, abs=0.005 if kind == "noise" else 0.02)


def test_half_static_and_half_noise_is_half() -> None:
    generator = torch.Generator().manual_seed(0)
    base, noise = torch.randn(2, 400, 64, generator=generator, dtype=torch.float64)
    assert seen(list(range(400)), base, base + noise + 1.0).static_share() == pytest.approx(0.5, abs=0.02)


def test_the_same_states_have_no_static_share_and_no_difference() -> None:
    base, _ = states(7)
    directions = seen(OWNERS, base, base.clone())
    assert np.isnan(directions.static_share())
    assert (directions.mean_difference() == 0).all()


# The divergence against unrelated prompts


def test_identical_states_are_at_zero_and_states_of_other_prompts_at_one() -> None:
    generator = torch.Generator().manual_seed(0)
    common = 2 * torch.randn(64, generator=generator)
    base, other = common + torch.randn(2, 300, 64, generator=generator)
    prompts = list(range(300))
    for finetuned, expected in ((base, 0.0), (other, 1.0)):
        unrelated = seen(prompts, base, finetuned).unrelated_similarity()
        assert 0.7 < unrelated < 0.9
        mean = float(divergence(base, finetuned).mean())
        assert normalized_divergence(mean, unrelated) == pytest.approx(expected, abs=0.02 * expected)


def test_where_unrelated_prompts_are_all_but_the_same_there_is_none() -> None:
    assert normalized_divergence(0.01, 0.94) == pytest.approx(0.01 / 0.06)
    for unrelated in (0.951, 1.0, float("nan")):
        assert np.isnan(normalized_divergence(0.01, unrelated))
    assert normalized_divergence(0.3, -0.5) == pytest.approx(0.2)
