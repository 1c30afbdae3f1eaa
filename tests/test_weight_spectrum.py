"""Singular values of updates, by both routes, against NumPy; and which updates look like an adapter's."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lazarus.results.weights import Spectrum
from lazarus.weights import spectrum as module
from lazarus.weights.numbers import UpdatePair, ViewPair
from lazarus.weights.spectrum import spectrum
from lazarus.weights.views import MemoryView

Floats = NDArray[np.float64]
Method = Literal["exact", "randomised"]
SHAPES = [(2, 2), (40, 40), (90, 30), (30, 90), (7, 200), (200, 7)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a big matrix is read: in many chunks, and a wide one many times."""
    monkeypatch.setattr(module, "_N_NUMBERS", 500)
    monkeypatch.setattr(module, "_MOST_HELD", 1000)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, size: int) -> Tensor:
    rotated: Tensor = torch.linalg.qr(normal(seed, size, size)).Q
    return rotated


def with_values(sigma: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix that has these singular values."""
    k = len(sigma)
    return rotation(1, rows)[:, :k] * sigma @ rotation(2, columns)[:, :k].T


def name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def of(base: Tensor, finetuned: Tensor, method: Method | None = None, seed: int = 0) -> Spectrum:
    pair = ViewPair(MemoryView(base, name(base)), MemoryView(finetuned, name(finetuned)))
    found = spectrum(pair, seed, name(finetuned), method)
    assert found is not None
    return found


def of_update(update: Tensor, method: Method | None = None, seed: int = 0) -> Spectrum:
    """Of an update that is known exactly."""
    pair = UpdatePair(MemoryView(torch.zeros_like(update), ""), MemoryView(update, "float64"))
    found = spectrum(pair, seed, pair.finetuned_dtype, method)
    assert found is not None
    return found


def check(found: Spectrum, change: Floats, tolerance: float = 1e-9) -> None:
    """Against NumPy, in units of the largest."""
    sigma = np.linalg.svd(change, compute_uv=False)
    shares, squares = sigma / sigma.sum(), sigma**2
    shares = shares[shares > 0]
    np.testing.assert_allclose(found.singular_values, sigma[:32], rtol=0, atol=tolerance * sigma[0])
    assert found.n_singular_values == len(sigma)
    assert found.spectral_norm == pytest.approx(sigma[0], rel=tolerance)
    assert found.stable_rank == pytest.approx(squares.sum() / squares[0], rel=tolerance)
    assert found.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-7)
    assert found.rank_90 == int(np.argmax(np.cumsum(squares) >= 0.9 * squares.sum())) + 1
    assert (found.method, found.share_computed) == ("exact", 1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ratio", [0.99, 0.9, 0.3])
def test_all_values_equal_numpy(shape: tuple[int, int], ratio: float) -> None:
    """From all but equal ones to ones that AᵀA would lose."""
    change = with_values(ratio ** torch.arange(min(shape), dtype=torch.float64), *shape)
    check(of_update(change), change.numpy())
    base = normal(3, *shape)
    check(of(base, base + change), ((base + change) - base).numpy())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_values_of_rounded_numbers_equal_numpy(shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, finetuned = normal(1, *shape).to(dtype), normal(2, *shape).to(dtype)
        check(of(base, finetuned), finetuned.double().numpy() - base.double().numpy())


def test_the_worked_case() -> None:
    """σ = 3, 4 in units of their own: Σσ² = 25."""
    found = of_update(torch.tensor([[0.0, 3.0], [-4.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert found.singular_values == pytest.approx([4, 3])
    assert found.stable_rank == pytest.approx(25 / 16)
    assert found.effective_rank == pytest.approx((7 / 3) ** (3 / 7) * (7 / 4) ** (4 / 7))
    assert (found.rank_90, found.adapter_rank, found.rounding_norm) == (2, None, 0)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140])
def test_the_scale_does_not_matter(scale: float) -> None:
    change = scale * with_values(0.8 ** torch.arange(20, dtype=torch.float64), 50, 20)
    check(of_update(change), change.numpy())


@pytest.mark.parametrize("scale", [1e-164, 1e-162, 1e-160, 1e-155, 1e150, 1e152, 1e155])
def test_at_the_ends_of_float64_s_range_the_spectrum_is_right_or_none(scale: float) -> None:
    change = normal(1, 60, 40)
    pair = UpdatePair(MemoryView(torch.zeros_like(change), ""), MemoryView(scale * change, "float64"))
    found = spectrum(pair, 0, "float64")
    if found is not None:
        sigma = np.linalg.svd(change.numpy(), compute_uv=False)
        assert found.spectral_norm == pytest.approx(scale * sigma[0], rel=1e-9)
        assert found.stable_rank == pytest.approx(np.sum(sigma**2) / sigma[0] ** 2, rel=1e-9)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", [(400, 300), (300, 400)], ids=str)
def test_both_routes_agree_where_the_spectrum_falls(shape: tuple[int, int]) -> None:
    sigma = 1 / torch.arange(1, 301, dtype=torch.float64)
    change = with_values(sigma, *shape)
    exact, randomised = of_update(change, "exact"), of_update(change, "randomised")
    check(exact, change.numpy())
    assert randomised.spectral_norm == pytest.approx(1, rel=1e-9)
    np.testing.assert_allclose(randomised.singular_values, sigma[:32], rtol=1e-3)
    assert randomised.stable_rank == pytest.approx(exact.stable_rank, rel=1e-9)
    assert (randomised.method, randomised.effective_rank) == ("randomised", None)
    assert randomised.rank_90 == exact.rank_90 == 6
    assert randomised.n_singular_values == 64
    held = float(sigma[:64].square().sum() / sigma.square().sum())
    assert held - 1e-3 < randomised.share_computed <= held


@pytest.mark.usefixtures("small_chunks")
def test_the_sketch_grows_until_it_holds_enough() -> None:
    """Of 300 equal values 256 hold 85 %; of 261, 98 %."""
    flat = of_update(with_values(torch.ones(300, dtype=torch.float64), 320, 310), "randomised")
    assert (flat.n_singular_values, flat.rank_90) == (256, None)
    assert flat.share_computed == pytest.approx(256 / 300)
    assert flat.stable_rank == pytest.approx(300)
    enough = of_update(with_values(torch.ones(261, dtype=torch.float64), 320, 310), "randomised")
    assert (enough.n_singular_values, enough.rank_90) == (256, 235)
    whole = of_update(with_values(torch.ones(39, dtype=torch.float64), 50, 39), "randomised")
    assert (whole.n_singular_values, whole.rank_90) == (39, 36)
    assert whole.share_computed == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("planted", [0, 8])
def test_the_randomised_values_of_noise_are_never_too_large_and_little_too_small(planted: int) -> None:
    """Rank 8 stands far above the noise that is left below it, on which the sketch is at its worst."""
    noise = normal(1, 1300, 1300)
    change = 1e-3 * noise + adapter(planted, 1300, 1300, 1.0) if planted else noise
    found = of_update(change)
    exact = np.linalg.svd(change.numpy(), compute_uv=False)
    ratios = np.array(found.singular_values) / exact[:32]
    assert found.method == "randomised"
    assert ratios.max() <= 1 + 1e-9
    assert ratios[0] >= 0.99
    assert ratios.min() >= 0.94
    held = np.sum(exact[: found.n_singular_values] ** 2) / np.sum(exact**2)
    assert found.share_computed <= held + 1e-9


def test_the_route_is_chosen_by_the_smaller_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_EXACT", 20)
    assert of_update(normal(1, 100, 20)).method == of_update(normal(1, 20, 100)).method == "exact"
    assert of_update(normal(1, 21, 21)).method == "randomised"


def test_the_seed_decides() -> None:
    change = normal(1, 400, 300)
    one = of_update(change, "randomised", seed=1)
    assert one == of_update(change, "randomised", seed=1)
    assert one != of_update(change, "randomised", seed=2)


def test_no_direction_has_no_spectrum() -> None:
    base = normal(1, 5, 4)
    broken, signed = base.clone(), torch.zeros(5, 4, dtype=torch.float64)
    for value in (math.nan, math.inf):
        broken[2, 2] = value
        pair = ViewPair(MemoryView(base, "float64"), MemoryView(broken, "float64"))
        assert spectrum(pair, 0, "float64") is None
    pair = ViewPair(MemoryView(signed, "float64"), MemoryView(-signed, "float64"))
    assert spectrum(pair, 0, "float64") is None


def ulp(numbers: Floats, precision: int, smallest: float) -> Floats:
    """The distance to the next number away from 0 that the type has, by its definition."""
    exponents = np.frexp(np.maximum(np.abs(numbers), smallest))[1]
    return np.asarray(np.ldexp(1.0, exponents - precision))


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, 24),
        (torch.float16, 11),
        (torch.bfloat16, 8),
        (torch.float8_e4m3fn, 4),
        (torch.float8_e5m2, 3),
    ],
    ids=str,
)
def test_the_energy_of_rounding_is_as_expected_and_as_measured(dtype: torch.dtype, precision: int) -> None:
    exact = normal(1, 200, 150) * 0.05
    exact[:20] *= 1e-3  # denormal in the small types
    rounded = exact.to(dtype)
    found = of(exact, rounded)
    smallest = float(torch.finfo(dtype).smallest_normal)
    expected = np.sqrt((ulp(rounded.double().numpy(), precision, smallest) ** 2).sum() / 12)
    assert found.rounding_norm == pytest.approx(expected, rel=1e-12)
    assert found.rounding_norm == pytest.approx(float((rounded.double() - exact).norm()), rel=0.1)
    if dtype in (torch.float32, torch.float16):
        native = rounded.numpy()
        spacing = np.spacing(np.maximum(np.abs(native), native.dtype.type(smallest)))
        assert expected == pytest.approx(np.linalg.norm(spacing.astype(np.float64)) / math.sqrt(12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8, 8), (16, 48), (64, 64), (200, 50)], ids=str)
def test_rounding_alone_never_looks_like_an_adapter(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """No σ is above the edge, so the rank is 0; rows and columns of unlike size too."""
    for seed in range(30):
        exact = normal(seed, *shape) * 0.05
        if seed % 2:
            exact *= torch.logspace(-2, 0, shape[0])[:, None]
        rounded = exact.to(dtype)
        pair = ViewPair(MemoryView(exact, ""), MemoryView(rounded, ""))
        _, rounding = module._look(pair, name(rounded))
        assert rounding is not None
        assert of(exact, rounded).spectral_norm < rounding.edge
        assert of(exact, rounded).adapter_rank is None


def adapter(rank: int, rows: int, columns: int, size: float) -> Tensor:
    return size * normal(8, rows, rank) @ normal(9, rank, columns) / math.sqrt(rank)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("shape", [(128, 96), (96, 128), (40, 400)], ids=str)
@pytest.mark.parametrize("method", ["exact", "randomised"])
def test_a_planted_update_is_found_with_its_rank(method: Method, shape: tuple[int, int], rank: int) -> None:
    update = adapter(rank, *shape, 1e-3)
    base = normal(1, *shape).float() * 0.05
    assert of(base, (base + update).float(), method).adapter_rank == rank
    assert of(base, base + update, method).adapter_rank == rank  # not rounded
    assert of_update(update, method).adapter_rank == rank


def test_a_planted_update_is_found_in_bfloat16_where_it_is_above_the_rounding() -> None:
    """Weights of 0.05 are rounded by about 8e-5: updates of 5e-3 and 1e-5 each."""
    base = (normal(1, 200, 160) * 0.05).bfloat16()
    for rank in (1, 4, 8):
        assert of(base, (base + adapter(rank, 200, 160, 5e-3)).bfloat16()).adapter_rank == rank
    lost = of(base, (base + adapter(8, 200, 160, 1e-5)).bfloat16())
    assert lost.adapter_rank is None


@pytest.mark.parametrize("method", ["exact", "randomised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_a_full_fine_tune_does_not_look_like_an_adapter(
    method: Method, dtype: torch.dtype, size: float
) -> None:
    """Its spectrum falls, as real ones do, and goes on.

    One that falls as steeply as 1/k² is told from rank 1 only where what follows is above the rounding.
    """
    base = (normal(1, 160, 120) * 0.05).to(dtype)
    for power in (0.5, 1.0) if dtype == torch.bfloat16 else (0.5, 1.0, 2.0):
        sigma = 10 * size / torch.arange(1, 121, dtype=torch.float64) ** power
        finetuned = (base + with_values(sigma, 160, 120)).to(dtype)
        assert of(base, finetuned, method).adapter_rank is None


def test_too_many_or_too_weak_are_no_adapter() -> None:
    base = (normal(1, 64, 64) * 0.05).float()
    assert of(base, (base + adapter(16, 64, 64, 1e-2)).float()).adapter_rank == 16
    assert of(base, (base + adapter(17, 64, 64, 1e-2)).float()).adapter_rank is None
    wide = adapter(4, 64, 64, 1e-3) + 1e-5 * normal(5, 64, 64)  # something small on top
    assert of(base, (base + wide).float()).adapter_rank is None
    assert of_update(wide).adapter_rank is None


@pytest.mark.parametrize(
    ("largest", "others", "rank"),
    [(20.0, 0.9, 4), (20.0, 1.9, None), (2.6, 0.9, None)],
    ids=["an adapter", "more than rounding is left", "less than half is held"],
)
def test_what_is_left_decides(largest: float, others: float, rank: int | None) -> None:
    """Four σ and sixty equal ones that are below the edge of rounding, in units of R/√n; the edge is 2."""
    finetuned = (normal(1, 64, 64) * 0.05).float()
    unit = (of(0 * finetuned, finetuned).rounding_norm or 0) / 8
    sigma = torch.tensor([largest] * 4 + [others] * 60, dtype=torch.float64) * unit
    found = of(finetuned.double() - with_values(sigma, 64, 64), finetuned)
    assert found.adapter_rank == rank
