"""What is measured of a pair of tensors, against NumPy in float64 and sums that are exact."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from lazarus.models.stored import read_headers
from lazarus.names.parts import Take
from lazarus.weights.numbers import Chunk, Numbers, Pair, UpdatePair, ViewPair, base_norm, measure
from lazarus.weights.parallel import measure_all
from lazarus.weights.views import AddedView, MemoryView, StoredView

Floats = NDArray[np.float64]

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [torch.int32, torch.int16, torch.int8, torch.uint8]
TYPES = FLOATS + WHOLE


def view(tensor: Tensor, take: Take | None = None) -> MemoryView:
    return MemoryView(tensor, str(tensor.dtype).removeprefix("torch."), take)


def measured(base: Tensor, finetuned: Tensor, n_elements: int = 64) -> Numbers:
    return measure(ViewPair(view(base), view(finetuned)), n_elements)


def norm(x: Floats) -> float:
    """Summed exactly, of numbers brought near 1."""
    scale = float(np.abs(x).max(initial=0.0))
    return scale * math.sqrt(math.fsum((x.ravel() / scale) ** 2)) if scale else 0.0


def check(found: Numbers, base: Floats, finetuned: Floats, tolerance: float = 1e-9) -> None:
    """Against the definitions, term by term."""
    change = finetuned - base
    assert found.base_norm == pytest.approx(norm(base), rel=tolerance)
    assert found.change_norm == pytest.approx(norm(change), rel=tolerance)
    if 1e-100 < np.abs(change).max() < 1e100:
        assert found.change_norm == pytest.approx(float(np.linalg.norm(change)), rel=tolerance)
    assert found.relative_change == pytest.approx(norm(change) / norm(base), rel=tolerance)
    assert found.max_abs_change == np.abs(change).max()
    b, f = (x.ravel() / norm(x) for x in (base, finetuned))
    assert found.cosine_similarity == pytest.approx(math.fsum(b * f), rel=tolerance, abs=1e-13)
    assert abs(found.cosine_similarity) <= 1
    assert found.n_changed == np.count_nonzero(change)
    assert found.share_changed == found.n_changed / change.size


def random_tensor(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (made if dtype.is_floating_point else (made.abs() * 30).clamp(0, 100)).to(dtype)


@pytest.mark.parametrize("finetuned", TYPES, ids=str)
@pytest.mark.parametrize("base", TYPES, ids=str)
def test_equals_numpy_for_any_two_types(base: torch.dtype, finetuned: torch.dtype) -> None:
    b, f = random_tensor(1, base, 23, 17), random_tensor(2, finetuned, 23, 17)
    check(measured(b, f), b.double().numpy(), f.double().numpy())


@given(
    seed=st.integers(0, 10_000),
    shape=st.lists(st.integers(1, 9), max_size=4),
    dtype=st.sampled_from(FLOATS[:4]),
    size=st.integers(-8, 0),
    n_elements=st.integers(1, 100),
)
@settings(max_examples=100, deadline=None)
def test_equals_numpy_for_any_shape_and_change(
    seed: int, shape: list[int], dtype: torch.dtype, size: int, n_elements: int
) -> None:
    b = random_tensor(seed, dtype, *shape)
    f = b + random_tensor(seed + 1, dtype, *shape) * 10.0**size
    found = measured(b, f.to(dtype), n_elements)
    if found.n_changed:
        check(found, b.double().numpy(), f.double().numpy())
    else:
        assert torch.equal(b, f)


def test_a_part_of_a_stored_tensor(tmp_path: Path) -> None:
    b, f = random_tensor(1, torch.bfloat16, 40, 30), random_tensor(2, torch.float32, 40, 30)
    save_file({"b": b, "f": f}, tmp_path / "it.safetensors")
    stored = read_headers([str(tmp_path / "it.safetensors")])
    take = Take((4, 2, 5, 30), (slice(1, 3), 1, slice(None), slice(0, 30, 2)))
    pair = ViewPair(StoredView(stored["b"], take), StoredView(stored["f"], take))
    for n_elements in (7, 100, 10**6):
        found = measure(pair, n_elements)
        b_part, f_part = (x.double().numpy().reshape(take.dims)[take.index] for x in (b, f))
        check(found, b_part, f_part)


@pytest.mark.parametrize("dtype", FLOATS[:4], ids=str)
def test_the_size_of_chunks_does_not_matter(dtype: torch.dtype) -> None:
    b = random_tensor(1, dtype, 64, 48)
    f = (b.double() + 1e-2 * random_tensor(2, torch.float64, 64, 48)).to(dtype)
    whole = measured(b, f, 10**6)
    for n_elements in (1, 48, 500, 3000):
        part = measured(b, f, n_elements)
        for name in ("relative_change", "cosine_similarity", "base_norm", "change_norm"):
            assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=1e-12)
        assert (part.n_changed, part.max_abs_change) == (whole.n_changed, whole.max_abs_change)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_same_bits_are_exactly_the_same(dtype: torch.dtype) -> None:
    b = random_tensor(1, dtype, 20, 30)
    if dtype in FLOATS:
        b[3, 4] = math.nan
    assert measured(b, b.clone()) == Numbers(0.0, 1.0, 0.0, 0, 0.0, None, 0.0)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (3, 0, 4)], ids=str)
def test_no_numbers_are_the_same(shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape)
    same = Numbers(0.0, 1.0, 0.0, 0, 0.0, None, 0.0)
    assert measured(empty, empty.clone()) == same
    pair = UpdatePair(view(empty), MemoryView(torch.empty(view(empty).matrix, dtype=torch.float64), ""))
    assert measure(pair) == same
    assert base_norm(pair) == 0


@pytest.mark.parametrize("place", [0, 50_000, 199_999])
def test_one_bit_of_the_smallest_denormal_is_found(place: int) -> None:
    b = torch.zeros(200_000)
    b[1] = 1.0
    f = b.clone()
    f.view(torch.int32)[place] += 1
    found = measured(b, f, 4096)
    assert found.n_changed == 1
    assert found.share_changed == 1 / 200_000
    assert found.max_abs_change == found.change_norm == found.relative_change == 2.0**-149
    assert found.cosine_similarity == 1


def test_minus_zero_is_another_bit_and_a_nan_is_itself() -> None:
    b, f = torch.tensor([0.0, 1.0, math.nan]), torch.tensor([-0.0, 1.0, math.nan])
    found = measured(b, f)
    assert found.n_changed == 1
    found = measured(b[:2], f[:2])
    assert (found.n_changed, found.relative_change, found.cosine_similarity) == (1, 0, 1)
    assert measured(b[:2], f[:2].double()).n_changed == 1
    assert measured(b, b.double()).n_changed == 0


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
@pytest.mark.parametrize("change", [1e-3, 1.0, -1.0])
def test_squares_neither_overflow_nor_vanish(scale: float, change: float) -> None:
    b = random_tensor(1, torch.float64, 30, 20) * scale
    f = b + change * scale * random_tensor(2, torch.float64, 30, 20)
    found = measured(b, f)
    check(found, b.numpy(), f.numpy(), 1e-9)
    check(measured(f, b), f.numpy(), b.numpy(), 1e-9)


@pytest.mark.parametrize("factor", [1e-7, 1e-4, 0.5, 3.0, 1e5])
def test_a_multiple_has_cosine_one(factor: float) -> None:
    b = random_tensor(1, torch.float64, 50, 40)
    found = measured(b, factor * b)
    assert 1 - 1e-15 <= found.cosine_similarity <= 1
    assert found.relative_change == pytest.approx(abs(factor - 1), rel=1e-12)
    found = measured(b, -factor * b)
    assert -1 <= found.cosine_similarity <= -1 + 1e-14


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float64, 1e-16), (torch.float32, 1e-20)], ids=str)
def test_what_is_far_smaller_than_its_base_keeps_its_direction(dtype: torch.dtype, factor: float) -> None:
    """f − b has lost f: the cosine is taken from f itself."""
    b = random_tensor(1, dtype, 50, 40)
    assert measured(b, factor * b).cosine_similarity == pytest.approx(1, abs=1e-9)
    assert measured(b, -factor * b).cosine_similarity == pytest.approx(-1, abs=1e-9)
    f = (factor / 100 * random_tensor(2, torch.float64, 50, 40)).to(dtype)
    check(measured(b, f), b.double().numpy(), f.double().numpy())


def test_a_norm_that_overflows_is_nan_and_a_relative_change_is_not_0() -> None:
    b = 1e307 * random_tensor(1, torch.float64, 50, 40)
    found = measured(b, 1.01 * b)
    assert found.base_norm is not None
    assert math.isnan(found.base_norm)
    assert math.isnan(found.relative_change)
    assert found.change_norm == pytest.approx(norm((1.01 * b - b).numpy()), rel=1e-9)


def test_a_cosine_near_one_is_as_precise_as_a_float_can_be() -> None:
    """With f = b + εu, u at right angles to b and of its length: cos = 1/√(1 + ε²)."""
    b = torch.zeros(2, 1000, dtype=torch.float64)
    b[0], f = 1.0, b.clone()
    f[0] = 1.0
    for epsilon in (1e-1, 1e-4, 1e-7, 1e-9):
        f[1] = epsilon
        assert measured(b, f).cosine_similarity == pytest.approx(1 / math.sqrt(1 + epsilon**2), abs=2e-16)


def test_all_zero_on_one_side_has_no_direction() -> None:
    b, zero = random_tensor(1, torch.float32, 5, 5), torch.zeros(5, 5)
    grown, gone = measured(zero, b), measured(b, zero)
    assert math.isnan(grown.relative_change)
    assert math.isnan(grown.cosine_similarity)
    assert (grown.base_norm, grown.n_changed) == (0, 25)
    assert grown.change_norm == pytest.approx(norm(b.double().numpy()))
    assert math.isnan(gone.cosine_similarity)
    assert gone.relative_change == pytest.approx(1, rel=1e-15)
    both = measured(zero, -zero)
    assert math.isnan(both.relative_change)
    assert (both.cosine_similarity, both.n_changed, both.change_norm) == (1, 25, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["base", "finetuned", "both"])
def test_what_is_not_finite_is_nan_and_counted(value: float, side: str) -> None:
    b, f = random_tensor(1, torch.float32, 30, 20), random_tensor(2, torch.float32, 30, 20)
    for tensor in {"base": [b], "finetuned": [f], "both": [b, f]}[side]:
        tensor[7, 3] = value
    found = measured(b, f)
    assert math.isnan(found.relative_change)
    assert math.isnan(found.cosine_similarity)
    assert math.isnan(found.max_abs_change)
    assert math.isnan(found.change_norm)
    assert found.base_norm is not None
    assert math.isnan(found.base_norm) == (side != "finetuned")
    assert found.n_changed == (599 if side == "both" else 600)


def test_an_update_is_the_change() -> None:
    b = random_tensor(1, torch.bfloat16, 30, 20)
    update = 1e-9 * random_tensor(2, torch.float64, 30, 20)
    update[5] = 0
    found = measure(UpdatePair(view(b), view(update)), 50)
    assert found.n_changed == 29 * 20
    assert found.change_norm == pytest.approx(norm(update.numpy()), rel=1e-12)
    assert found.max_abs_change == update.abs().max()
    assert found.base_norm == pytest.approx(norm(b.double().numpy()), rel=1e-12)
    nothing = measure(UpdatePair(view(b), view(0 * update)))
    assert (nothing.relative_change, nothing.cosine_similarity, nothing.n_changed) == (0, 1, 0)


def test_an_update_of_another_checkpoint() -> None:
    b, f = random_tensor(1, torch.float32, 30, 20), random_tensor(2, torch.bfloat16, 30, 20)
    update = random_tensor(3, torch.float64, 30, 20)
    found = measure(ViewPair(view(b), AddedView(view(f), view(update))), 50)
    check(found, b.double().numpy(), f.double().numpy() + update.numpy())


def test_shapes_that_do_not_fit_are_errors() -> None:
    b = random_tensor(1, torch.float32, 4, 5)
    with pytest.raises(ValueError, match=r"\(4, 5\) cannot be compared with \(20,\)"):
        ViewPair(view(b), view(b.view(-1)))
    with pytest.raises(ValueError, match=r"\(5, 4\) does not fit a tensor of \(4, 5\)"):
        UpdatePair(view(b), view(b.T))


def pairs(n: int) -> list[ViewPair]:
    """Of rising size."""
    made = (
        (random_tensor(i, torch.float32, i + 1, 50), random_tensor(-i - 1, torch.float32, i + 1, 50))
        for i in range(n)
    )
    return [ViewPair(view(b), view(f)) for b, f in made]


def test_the_number_of_threads_does_not_matter() -> None:
    done: list[int] = []
    begun: list[int] = []
    threads: set[int] = set()

    def measure_one(pair: Pair) -> Numbers:
        begun.append(math.prod(pair.matrix))
        threads.add(torch.get_num_threads())
        return measure(pair, 500)

    made = pairs(40)
    alone = [measure(pair, 500) for pair in made]
    torch.set_num_threads(2)
    for n_threads in (1, 2, 5):
        assert measure_all(made, measure_one, n_threads, done.append) == alone
    assert sorted(done) == sorted([*range(40)] * 3)
    assert begun[:40] == sorted((math.prod(pair.matrix) for pair in made), reverse=True)
    assert threads == {1}
    assert torch.get_num_threads() == 2
    assert measure_all([], measure, 2) == []


@dataclass(frozen=True)
class Endless:
    """A pair that goes on until it is stopped."""

    started: threading.Event
    shape: tuple[int, ...] = (10**9, 1)
    matrix: tuple[int, int] = (10**9, 1)
    finetuned_dtype: str = "float32"

    @property
    def base(self) -> MemoryView:
        return MemoryView(torch.ones(1), "float32")

    def identical(self) -> bool:
        return False

    def chunks(self, n_elements: int) -> Iterator[Chunk]:
        chunk = Chunk(torch.ones(10, 1, dtype=torch.float64), torch.ones(10, 1, dtype=torch.float64), 10)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            self.started.set()
            yield chunk
        raise AssertionError("nobody stopped it")


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt()], ids=repr)
def test_an_error_stops_all_at_once(error: BaseException) -> None:
    started = threading.Event()
    made: list[Pair] = [Endless(started), *pairs(3)]

    def fail(pair: Pair) -> Numbers:
        if pair.matrix == (10**9, 1):
            return measure(pair)
        started.wait(10)
        raise error

    with pytest.raises(type(error)):
        measure_all(made, fail, 2)


def test_an_error_of_the_caller_stops_all_at_once() -> None:
    def interrupt(_index: int) -> None:
        raise KeyboardInterrupt

    made: list[Pair] = [Endless(threading.Event()), *pairs(3)]
    with pytest.raises(KeyboardInterrupt):
        measure_all(made, measure, 2, interrupt)
