"""The singular values of an update f − b, and whether it looks like a low-rank adapter's.

All are found where the smaller side is at most `MOST_EXACT`, else the largest by a randomised SVD. Both read
the pair in chunks, a few times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lazarus.results.weights import Spectrum
from lazarus.weights.numbers import Pair

Method = Literal["exact", "randomised"]

MOST_EXACT = 1024
"""The smaller side up to which all σ are computed: 0.2 s for 2048 × 1024, 3.5 s for twice the sides."""
_N_NUMBERS = 2**18
_MOST_HELD = 2**20
"""how many elements are read at once, and held of a wide matrix"""
_SKETCHES = ((64, 3), (256, 2))
"""Columns of the sketch, and its products with AᵀA; the next where the last does not hold enough."""
_ENOUGH = 0.9
_N_SAVED = 32
_GRAM_SAFE = 1e-10
"""Where λ_min of AᵀA is above this share of λ_max, its rounding moves no σ by more than 1e-10 σ₁."""
_TINY = 1e-250
_LEAST_ENERGY = 1e-290
"""Where squares sum to less, single ones were rounded to denormals, or to 0."""
_TAIL, _TAIL_SPREAD = 1.1, 6.0
"""How much more than expected the energy of n rounded values may be: a tenth and 6/√n, three deviations."""
_GAP = 1.5
"""An adapter's σ end, those of a full fine-tune sink into the noise: the next is smaller by this factor."""
_FLOAT64_NOISE = 1e-12
_TRACY_WIDOM = 4.0
"""The largest eigenvalue of noise is further beyond the edge in about one of 5,000 matrices."""
_PRECISION = {"float32": 24, "float16": 11, "bfloat16": 8, "float8_e4m3fn": 4, "float8_e5m2": 3}
_EXPONENT_BITS = 0x7FF0000000000000


def spectrum(pair: Pair, seed: int, finetuned_dtype: str, method: Method | None = None) -> Spectrum | None:
    """Return the singular values of f − b, with sides above 1; None where its squares are not finite, or 0.

    `finetuned_dtype` is the dtype to which f was rounded; `method` forces one, else the size decides.

    Stable rank: Rudelson & Vershynin 2007. Effective rank: Roy & Vetterli 2007.

    Raises:
        OSError: a file is missing or too short.
    """
    energy, rounding = _look(pair, finetuned_dtype)
    if not _LEAST_ENERGY < energy < math.inf:
        return None
    if method is None:
        method = "exact" if min(pair.matrix) <= MOST_EXACT else "randomised"
    sigma = _all_values(pair) if method == "exact" else _largest_values(pair, seed, energy)
    squares = sigma.square()
    if method == "exact":
        energy = float(squares.sum())
    held = squares.cumsum(0) / energy
    enough = torch.nonzero(held >= _ENOUGH).flatten()
    return Spectrum(
        method=method,
        n_singular_values=len(sigma),
        spectral_norm=float(sigma[0]),
        stable_rank=energy / float(squares[0]),
        effective_rank=_effective_rank(sigma) if method == "exact" else None,
        rank_90=int(enough[0]) + 1 if len(enough) else None,
        share_computed=1.0 if method == "exact" else min(float(held[-1]), 1.0),
        rounding_norm=None if rounding is None else rounding.norm,
        adapter_rank=None if rounding is None else _adapter_rank(sigma, energy, rounding, pair.matrix),
        singular_values=sigma[:_N_SAVED].tolist(),
    )


def _effective_rank(sigma: Tensor) -> float:
    shares = sigma / sigma.sum()
    # xlogy gives 0 for 0 · log 0.
    return math.exp(float(-torch.xlogy(shares, shares).sum()))


@dataclass(frozen=True)
class _Rounding:
    """Effect of rounding f to its dtype: the expected Frobenius norm, and the largest σ to be expected."""

    norm: float
    edge: float


def _adapter_rank(sigma: Tensor, energy: float, rounding: _Rounding, matrix: tuple[int, int]) -> int | None:
    """Return how many σ are clear of the noise, if they are few, hold half of all, and leave only noise."""
    numerical = max(matrix) * torch.finfo(torch.float64).eps * float(sigma[0])
    rank = int((sigma > max(rounding.edge, numerical)).sum())
    # A rank near the full one is no adapter, and where no σ is left there is no tail to judge.
    if not 1 <= rank <= min(matrix) // 4 or rank == len(sigma):
        return None
    above = float(sigma[:rank].square().sum())
    spread = _TAIL + _TAIL_SPREAD / math.sqrt(math.prod(matrix))
    most = spread * rounding.norm**2 + _FLOAT64_NOISE * energy
    clear = float(sigma[rank - 1]) > _GAP * float(sigma[rank])
    return rank if clear and above >= energy / 2 and energy - above <= most else None


def _look(pair: Pair, dtype: str) -> tuple[float, _Rounding | None]:
    """Return ‖f − b‖² and the rounding: a value in [2ᵉ, 2ᵉ⁺¹) is rounded with an error of variance ulp²/12.

    The rounding is None where it is not known, as of quantised elements.

    Independent noise with variances v_ij has its largest σ at about max_i √Σ_j v_ij + max_j √Σ_i v_ij
    (Bandeira & van Handel 2016; of equal variances the edge of Marchenko & Pastur 1967).
    """
    energy, largest_row, columns = 0.0, 0.0, torch.zeros(pair.matrix[1], dtype=torch.float64)
    precision = _PRECISION.get(dtype)
    is_known = precision is not None or dtype == "float64"
    for chunk in pair.chunks(_N_NUMBERS):
        change = chunk.change.reshape(-1)
        energy += torch.dot(change, change).item()
        if precision is not None:
            # The exponent bits alone are the power of two below |f|, which its ulp is a fixed share of.
            powers = (chunk.base + chunk.change).view(torch.int64).bitwise_and_(_EXPONENT_BITS)
            # Below its smallest normal value, the ulp of a dtype gets no smaller.
            squares = powers.view(torch.float64).clamp_(min=_smallest_normal(dtype)).square_()
            largest_row = max(largest_row, float(squares.sum(1).max()))
            columns += squares.sum(0)
    ulp = 2.0 ** (1 - precision) if precision is not None else 0.0
    unit = ulp / math.sqrt(12)
    edge = math.sqrt(largest_row) + math.sqrt(float(columns.max()))
    if not is_known:
        return energy, None
    return energy, _Rounding(unit * math.sqrt(float(columns.sum())), unit * edge * _beyond(pair.matrix))


def _smallest_normal(dtype: str) -> float:
    return float(torch.finfo(getattr(torch, dtype)).smallest_normal)


def _beyond(matrix: tuple[int, int]) -> float:
    """Return how far beyond the edge the largest σ of noise may be, as a factor (Johnstone 2001)."""
    rows, columns = (math.sqrt(side) for side in matrix)
    width = (1 / rows + 1 / columns) ** (1 / 3) / (rows + columns)
    return math.sqrt(1 + _TRACY_WIDOM * width)


def _all_values(pair: Pair) -> Tensor:
    """Every σ, falling: from AᵀA where that is precise enough, else from R of a QR decomposition."""
    size = min(pair.matrix)
    gram = torch.zeros(size, size, dtype=torch.float64)
    for block in _tall_blocks(pair, _N_NUMBERS):
        gram.addmm_(block.T, block)
    if bool(torch.isfinite(gram).all()):
        squares: Tensor = torch.linalg.eigvalsh(gram).flip(0)
        if float(squares[0]) > _TINY and float(squares[-1]) > _GRAM_SAFE * float(squares[0]):
            return squares.sqrt()
    # Blocks of less than twice the triangle would mostly factorise the triangle again.
    return _values(_tall_blocks(pair, max(_N_NUMBERS, 2 * size**2)))


def _values(blocks: Iterator[Tensor]) -> Tensor:
    """The σ, falling, of all blocks on top of each other.

    Communication-avoiding QR (TSQR; Demmel et al. 2012): R of R on top of the next block has the same.
    """
    triangle = torch.linalg.qr(next(blocks), mode="r").R
    for block in blocks:
        triangle = torch.linalg.qr(torch.cat([triangle, block]), mode="r").R
    sigma: Tensor = torch.linalg.svdvals(triangle)
    return sigma


def _tall_blocks(pair: Pair, n_elements: int) -> Iterator[Tensor]:
    """The rows of f − b in order, or its columns if there are more of these, as [some, smaller side].

    Columns take as many readings as the matrix is larger than what is held. A block is
    overwritten by the next.
    """
    n_rows, n_columns = pair.matrix
    if n_rows >= n_columns:
        for chunk in pair.chunks(n_elements):
            yield chunk.change
        return
    width = min(n_columns, max(n_rows, _MOST_HELD // n_rows))
    held = torch.empty(n_rows, width, dtype=torch.float64)
    for left in range(0, n_columns, width):
        part, row = held[:, : min(width, n_columns - left)], 0
        for chunk in pair.chunks(_N_NUMBERS):
            part[row : row + len(chunk.change)] = chunk.change[:, left : left + width]
            row += len(chunk.change)
        yield part.T


def _largest_values(pair: Pair, seed: int, energy: float) -> Tensor:
    """The largest σ, falling: subspace iterations with AᵀA from a seeded random start.

    Halko, Martinsson & Tropp 2011, algorithm 4.4, with both products in one reading. The sketch grows until
    it holds 90 % of the energy.
    """
    random = torch.Generator().manual_seed(seed)
    basis = torch.empty(pair.matrix[1], 0, dtype=torch.float64)
    sigma = torch.empty(0, dtype=torch.float64)
    for size, n_products in _SKETCHES:
        size = min(size, *pair.matrix)
        more = torch.randn(pair.matrix[1], size - basis.shape[1], generator=random, dtype=torch.float64)
        # The larger sketch goes on from what the smaller one has found.
        basis = torch.linalg.qr(torch.cat([basis, more], 1)).Q
        for _ in range(n_products):
            basis = torch.linalg.qr(_product(pair, basis)).Q
        blocks = (chunk.change @ basis for chunk in pair.chunks(_N_NUMBERS))
        sigma = _values(blocks)
        if float(sigma.square().sum()) >= _ENOUGH * energy or size == min(pair.matrix):
            break
    return sigma


def _product(pair: Pair, basis: Tensor) -> Tensor:
    """AᵀA times the basis."""
    total = torch.zeros_like(basis)
    for chunk in pair.chunks(_N_NUMBERS):
        total.addmm_(chunk.change.T, chunk.change @ basis)
    return total
