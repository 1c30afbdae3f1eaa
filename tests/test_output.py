"""Next-token distributions: every metric against its oracle, and what must not change it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factories import joined
from lazarus.metrics import OUTPUT_METRICS, PromptMeans, RowValues, compare_logits
from reference import output_metrics

INF = math.inf
SAME = dict(zip(OUTPUT_METRICS, (0.0, 0.0, 0.0, 1.0, 1.0, 0.0), strict=True))
DTYPES = [torch.float32, torch.bfloat16]


def logits(seed: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base, noise = scale * torch.randn(2, 8, 50, generator=generator)
    return base.to(dtype), (base + 0.3 * noise).to(dtype)


def named(rows: RowValues) -> dict[str, Tensor]:
    return dict(zip(OUTPUT_METRICS, rows.values.T, strict=True))


def assert_equals_oracle(base: Tensor, finetuned: Tensor) -> None:
    rows = compare_logits(base, finetuned)
    expected = output_metrics(base.double().numpy(), finetuned.double().numpy())
    assert set(expected) == set(OUTPUT_METRICS)
    assert rows.valid.all()
    for name, found in named(rows).items():
        np.testing.assert_allclose(found.numpy(), expected[name], rtol=1e-10, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 1e4])
def test_equals_the_oracle(dtype: torch.dtype, scale: float) -> None:
    assert_equals_oracle(*logits(0, dtype, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_the_same_logits_give_the_exact_values(dtype: torch.dtype, scale: float) -> None:
    base, _ = logits(1, dtype, scale)
    base[0, 3] = -INF
    for name, found in named(compare_logits(base, base.clone())).items():
        assert (found == SAME[name]).all(), name


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-6, 100))
@settings(max_examples=40, deadline=None)
def test_divergences_keep_to_their_ranges_and_js_is_symmetric(seed: int, scale: float) -> None:
    base, finetuned = logits(seed, scale=scale)
    found, turned = named(compare_logits(base, finetuned)), named(compare_logits(finetuned, base))
    for name in ("kl_base_finetuned", "kl_finetuned_base", "js"):
        assert found[name].min() >= -1e-15  # what rounding leaves of a KL of 1e-16 and less
    assert found["js"].max() <= math.log(2) + 1e-15
    torch.testing.assert_close(turned["js"], found["js"], rtol=1e-9, atol=1e-16)
    torch.testing.assert_close(turned["kl_base_finetuned"], found["kl_finetuned_base"], rtol=0, atol=0)


@given(seed=st.integers(0, 1000), constant=st.floats(-1000, 1000))
@settings(max_examples=20, deadline=None)
def test_a_constant_on_all_logits_changes_no_distribution(seed: int, constant: float) -> None:
    base, finetuned = (part.double() for part in logits(seed))
    plain, moved = named(compare_logits(base, finetuned)), named(compare_logits(base, finetuned + constant))
    for name in OUTPUT_METRICS[:-1]:
        torch.testing.assert_close(moved[name], plain[name], rtol=1e-9, atol=1e-11)
    shift = constant + finetuned - base
    expected = shift.norm(dim=-1) / base.norm(dim=-1)
    torch.testing.assert_close(moved["logits_relative_l2"], expected, rtol=1e-10, atol=0)


@given(order=st.permutations(range(50)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_the_vocabulary_does_not_matter(order: list[int]) -> None:
    base, finetuned = logits(2)
    plain = compare_logits(base, finetuned).values
    torch.testing.assert_close(compare_logits(base[:, order], finetuned[:, order]).values, plain)


def test_distributions_without_a_common_token_are_as_far_as_can_be() -> None:
    base = torch.tensor([[1.0, 2.0, -INF, -INF], [0.0, 0.0, -1000.0, -1000.0]])
    found = named(compare_logits(base, base.flip(-1)))
    torch.testing.assert_close(found["js"], torch.full((2,), math.log(2), dtype=torch.float64))
    assert found["kl_base_finetuned"].tolist() == [INF, pytest.approx(1000.0)]
    assert found["top1_agreement"].tolist() == [0, 0]
    assert found["base_rank_of_finetuned_top1"].tolist() == [3, 3]
    assert_equals_oracle(base[1:], base.flip(-1)[1:])


def test_a_token_that_cannot_come_in_both_says_nothing() -> None:
    base, finetuned = logits(3)
    plain = compare_logits(base, finetuned).values
    never = torch.full((8, 2), -INF)
    padded = compare_logits(torch.cat([never, base], 1), torch.cat([never, finetuned], 1))
    torch.testing.assert_close(padded.values, plain, rtol=1e-12, atol=1e-15)
    assert padded.valid.all()


def test_a_token_that_only_one_can_give_is_infinite_one_way() -> None:
    base, finetuned = logits(4)
    finetuned[:, 7] = -INF
    found = named(compare_logits(base, finetuned))
    assert (found["kl_base_finetuned"] == INF).all()
    assert found["kl_finetuned_base"].isfinite().all()
    assert (found["js"] < math.log(2)).all()
    expected = output_metrics(base.double().numpy(), finetuned.double().numpy())
    for name in OUTPUT_METRICS:
        np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("masked", [-1e4, torch.finfo(torch.float32).min])
def test_a_token_masked_by_a_large_number_is_as_one_masked_by_infinity(masked: float) -> None:
    base = torch.tensor([[0.0, 1.0, masked]])
    finetuned = torch.tensor([[0.0, 1.5, -INF]])
    expected = named(compare_logits(base[:, :2], finetuned[:, :2]))
    for name, found in named(compare_logits(base, finetuned)).items():
        assert found.item() == pytest.approx(expected[name].item(), rel=1e-12), name


def test_the_rank_counts_what_base_likes_better() -> None:
    base = torch.tensor([[5.0, 9.0, 7.0, 6.0]] * 4)
    first = torch.eye(4) * 10
    found = named(compare_logits(base, first))
    assert found["base_rank_of_finetuned_top1"].tolist() == [4, 1, 2, 3]
    assert found["top1_agreement"].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("side", [0, 1])
def test_a_row_with_nan_or_plus_infinity_is_not_valid(bad: float, side: int) -> None:
    pair = logits(5)
    pair[side][3, 11] = bad
    rows = compare_logits(*pair)
    assert rows.valid.tolist() == [row != 3 for row in range(8)]
    means = PromptMeans(OUTPUT_METRICS, 8)
    means.update(torch.arange(8), rows)
    assert means.n_excluded.tolist() == [int(row == 3) for row in range(8)]
    assert all(np.isfinite(values[rows.valid.numpy()]).all() for values in means.means().values())


def test_a_row_where_no_token_can_come_is_not_valid() -> None:
    base, finetuned = logits(6)
    finetuned[0] = -INF
    assert compare_logits(base, finetuned).valid.tolist() == [False] + [True] * 7


def test_the_logits_of_zeros_do_not_differ_from_themselves() -> None:
    zeros = torch.zeros(1, 4)
    assert named(compare_logits(zeros, zeros))["logits_relative_l2"].item() == 0
    assert named(compare_logits(zeros, zeros + 1))["logits_relative_l2"].item() == INF


def test_each_row_is_by_itself_and_halves_merge() -> None:
    base, finetuned = logits(7)
    whole, left, right = (PromptMeans(OUTPUT_METRICS, 3) for _ in range(3))
    prompts = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    whole.update(prompts, compare_logits(base, finetuned))
    left.update(prompts[::2], compare_logits(base[::2], finetuned[::2]))
    right.update(prompts[1::2], compare_logits(base[1::2], finetuned[1::2]))
    merged = joined(left, right).means()
    for name, values in whole.means().items():
        np.testing.assert_allclose(merged[name], values, rtol=1e-13, err_msg=name)
