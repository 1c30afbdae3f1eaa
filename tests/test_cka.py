"""Debiased linear CKA: the worked case, its invariances, and the rows that are kept for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from factories import joined
from lazarus.metrics import FEWEST_FOR_CKA, CkaRows, debiased_cka
from reference import biased_cka, prompt_means, unbiased_cka

Floats = NDArray[np.float64]

X = np.array([[1.0, 0], [0, 1], [1, 1], [2, 0]])
Y = np.array([[0.0, 1], [1, 0], [1, 2], [0, 3]])


def data(seed: int, n: int = 20, p: int = 6, q: int = 9) -> tuple[Floats, Floats]:
    """Y depends on X by half."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, p)) + 3
    return x, x @ random.standard_normal((p, q)) + 2 * random.standard_normal((n, q))


def rotation(seed: int, width: int) -> Floats:
    noise = np.random.default_rng(seed).standard_normal((width, width))
    return np.asarray(np.linalg.qr(noise)[0])


def test_the_case_worked_by_hand() -> None:
    assert debiased_cka(X, Y) == pytest.approx(0.5, rel=1e-13)
    assert unbiased_cka(X, Y) == pytest.approx(0.5, rel=1e-13)
    assert biased_cka(X, Y) == pytest.approx(6 / 7, rel=1e-13)


@given(seed=st.integers(0, 10_000), n=st.integers(5, 40), p=st.integers(1, 12), q=st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_equals_the_unbiased_hsic_of_song(seed: int, n: int, p: int, q: int) -> None:
    x, y = data(seed, n, p, q)
    assert debiased_cka(x, y) == pytest.approx(unbiased_cka(x, y), rel=1e-8, abs=1e-10)
    assert debiased_cka(y, x) == pytest.approx(debiased_cka(x, y), rel=1e-12, abs=1e-14)


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
@settings(max_examples=30, deadline=None)
def test_rotation_scale_and_shift_leave_it_alone(seed: int, scale: float, shift: float) -> None:
    x, y = data(seed)
    moved = scale * y @ rotation(seed, 9) + shift
    assert debiased_cka(x, moved) == pytest.approx(debiased_cka(x, y), rel=1e-8, abs=1e-10)
    assert debiased_cka(x, 3 * x @ rotation(seed, 6) + shift) == pytest.approx(1.0, rel=1e-9)
    assert debiased_cka(x, -x) == pytest.approx(1.0, rel=1e-12)


def test_one_mismatched_order_of_prompts_shows() -> None:
    x, _ = data(0, n=60)
    assert debiased_cka(x, np.roll(x, 1, axis=0)) < 0.2


def test_unrelated_data_is_at_zero_where_the_biased_is_near_one() -> None:
    random = np.random.default_rng(0)
    draws = [random.standard_normal((2, 20, 576)) for _ in range(20)]
    debiased = [debiased_cka(*draw) for draw in draws]
    assert np.mean(debiased) == pytest.approx(0, abs=0.01)
    assert min(debiased) < 0
    assert np.mean([biased_cka(*draw) for draw in draws]) == pytest.approx(0.966, abs=0.002)


@pytest.mark.parametrize("value", [0.1, 3.0])
def test_constant_data_and_fewer_than_four_rows_have_none(value: float) -> None:
    x, _ = data(1)
    constant = np.full((20, 576), value)
    for pair in ((x, constant), (constant, x), (constant, constant), (x[:3], x[:3])):
        assert np.isnan(debiased_cka(*pair))


# The rows that are kept

N = 60
OWNERS = [prompt for prompt in range(N) for _ in range(1 + prompt % 3)]
SLOTS = {prompt: prompt for prompt in range(N)}


def states(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Several rows a prompt, of 6 and of 9 features."""
    x, y = data(seed, len(OWNERS))
    return torch.tensor(x).to(dtype), torch.tensor(y).to(dtype)


def kept(
    rows: Sequence[int], base: Tensor, finetuned: Tensor, slots: dict[int, int] | None = None
) -> CkaRows:
    store = CkaRows(SLOTS if slots is None else slots)
    index = torch.tensor(rows, dtype=torch.long)
    store.update(torch.tensor(OWNERS)[index], base[index], finetuned[index])
    return store


def expected(base: Tensor, finetuned: Tensor, rows: Sequence[int] = range(len(OWNERS))) -> float:
    owners = [OWNERS[row] for row in rows]
    picked = [part.double().numpy()[list(rows)] for part in (base, finetuned)]
    return unbiased_cka(*(prompt_means(owners, part) for part in picked))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompts_rows_are_averaged_and_widths_may_differ(dtype: torch.dtype) -> None:
    pair = states(2, dtype)
    # Rows are kept in float32.
    assert kept(range(len(OWNERS)), *pair).cka() == pytest.approx(expected(*pair), rel=1e-6)


@given(order=st.permutations(range(N)), cuts=st.lists(st.integers(0, N), max_size=4).map(sorted))
@settings(max_examples=15, deadline=None)
def test_any_order_and_split_by_prompts_and_any_merge_give_the_same(
    order: list[int], cuts: list[int]
) -> None:
    pair = states(3)
    updated, merged = CkaRows(SLOTS), CkaRows(SLOTS)
    for prompts in np.split(np.array(order), cuts):
        rows = [row for prompt in prompts for row in range(len(OWNERS)) if OWNERS[row] == prompt]
        index = torch.tensor(rows, dtype=torch.long)
        updated.update(torch.tensor(OWNERS)[index], pair[0][index], pair[1][index])
        merged.add(kept(rows, *pair).state())
    whole = kept(range(len(OWNERS)), *pair).cka()
    assert updated.cka() == merged.cka() == whole


def test_merging_leaves_its_parts_alone_and_empty_is_neutral() -> None:
    pair = states(4)
    half = len(OWNERS) // 2
    assert OWNERS[half] != OWNERS[half - 1]
    left, right = kept(range(half), *pair), kept(range(half, len(OWNERS)), *pair)
    seen = left.seen.copy()
    whole = joined(left, right)
    assert whole.cka() == joined(right, left).cka() == pytest.approx(expected(*pair), rel=1e-6)
    assert joined(whole, CkaRows(SLOTS)).cka() == joined(CkaRows(SLOTS), whole).cka() == whole.cka()
    alone = joined(CkaRows(SLOTS), left)
    alone.update(torch.tensor([N - 1]), pair[0][-1:], pair[1][-1:])
    assert (left.seen == seen).all()
    assert left.base is not None
    assert not left.base[N - 1].any()


def test_only_the_prompts_that_have_a_place_are_kept() -> None:
    pair = states(5)
    chosen = [prompt for prompt in range(N) if prompt % 6]
    slots = {prompt: place for place, prompt in enumerate(chosen)}
    rows = [row for row in range(len(OWNERS)) if OWNERS[row] in slots]
    store = kept(range(len(OWNERS)), *pair, slots=slots)
    assert store.base is not None
    assert store.base.shape == (50, 6)
    assert store.cka() == pytest.approx(expected(*pair, rows), rel=1e-6)
    assert joined(CkaRows({}), kept(range(9), *pair, slots={})).base is None


def test_below_fifty_prompts_there_is_none() -> None:
    pair = states(6)
    assert FEWEST_FOR_CKA == 50
    for n_prompts, measured in ((49, False), (50, True)):
        rows = [row for row in range(len(OWNERS)) if OWNERS[row] < n_prompts]
        assert np.isfinite(kept(rows, *pair).cka()) == measured
    assert np.isnan(CkaRows(SLOTS).cka())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_prompts_with_rows_that_are_not_finite_are_left_out(bad: float, side: int) -> None:
    pair = states(7)
    broken = [row for row in range(len(OWNERS)) if OWNERS[row] < 10]
    first = [row for row in broken if row == 0 or OWNERS[row] != OWNERS[row - 1]]
    pair[side][first, 0] = bad  # one number of the first row of each of ten prompts
    rest = [row for row in range(len(OWNERS)) if row not in broken]
    everything = range(len(OWNERS))
    assert kept(everything, *pair).cka() == pytest.approx(expected(*pair, rest), rel=1e-6)
    pair[side][[row for row in everything if OWNERS[row] == 10], 0] = bad
    assert np.isnan(kept(everything, *pair).cka())  # 49 are left


def test_states_that_are_all_the_same_have_none() -> None:
    base, finetuned = states(8)
    base[:] = torch.full((6,), 0.1)
    assert np.isnan(kept(range(len(OWNERS)), base, finetuned).cka())
