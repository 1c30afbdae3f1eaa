"""The fastest float32 product of this CPU that is exact: measured on the model's shapes, the same for both.

torch has two: its default, MKL on x86, and oneDNN. On some AMD processors MKL runs at less than half of
oneDNN's rate, on others they are within a tenth. The one switch to oneDNN also allows it to round to
bfloat16, which it does on processors with tiles (AMX). So errors are measured, and a path that rounds is
never taken. The switch holds for mm, addmm, bmm, all that is made of them, and torch's own attention on
prompts of hundreds of tokens; float64 is not touched.

How many tokens a batch has is not chosen: with SmolLM2-135M, 512 are not slower than 1,024 on either path.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from lazarus.models import LoadedModel

Path = Literal["default", "onednn"]
Shape = tuple[int, int]
"""[out, in] of a weight"""

_ONEDNN: Any = torch.backends.mkldnn  # which is what oneDNN was called once

LARGEST_ERROR = 1e-6
"""Of the worst row, relative. float32 stays below 9e-7 with 65,536 features; TF32: 3e-4, bfloat16: 2e-3."""
FASTER = 1.25
"""How many times as fast as the default another path must be. A run sees only a part of it: where oneDNN was
1.1 times as fast by this measure, whole passes of SmolLM2-135M took a tenth longer with it. And two runs of
one command must not part in their last digits because one was measured in a busy moment."""
FEWEST_FLOPS = 1e12
"""A run of fewer takes five seconds on two cores: too little is gained to measure for a tenth of one."""
MOST_SHAPES = 3
MOST_ROWS = 1024
MOST_OUT = 256
"""Of a larger weight, the first rows are taken."""
TIMED_ROWS = 256
TIMED_IN = 1024
TIMED_FLOPS = 3e7
"""A third of a millisecond: between two turns of whatever else the machine does, several fit."""
ROUNDS = 20
"""Each product's best of so many, the paths in turn: 40 ms in all."""

_FEW_ROWS = (1, 3, 16)
"""Kernels go by the number of rows, and last batches and heads have few."""
_SAMPLED = 64


@dataclass(frozen=True)
class Candidate:
    """One path, as it was measured."""

    path: Path
    gflops: float
    """10⁹ operations a second over all products"""
    error: float
    """the worst row's ‖error‖ / ‖product‖, against float64"""


@dataclass(frozen=True)
class Product:
    """What multiplies float32 matrices in a run, and what it was chosen from."""

    path: Path | None = None
    """None where nothing was chosen: torch's settings stand"""
    candidates: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Multiply this way while the context lasts, in the whole process; then torch is set as it was."""
        if self.path != "onednn":
            yield
            return
        settings = _ONEDNN.matmul
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"  # no other value takes oneDNN's path
        try:
            yield
        finally:
            settings.fp32_precision = before

    def as_json(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Product:
        """The product that `as_json` told of, also after a way through a file."""
        candidates = tuple(Candidate(**candidate) for candidate in found["candidates"])
        return cls(found["path"], candidates, tuple(found["notes"]))


def choose_product(model: LoadedModel, n_tokens: int, batch_tokens: int) -> Product:
    """Choose how float32 matrices are multiplied in a run of so many tokens through two models, on a CPU.

    Each path is measured on the largest weights of the block in the middle, with as many rows as a batch
    has. A process measures once. Where the caller has set the precision of products, that stands, and a
    note says so.
    """
    if not _on_cpu_in_float32(model):
        return Product()
    precision = _precision_set()
    if precision is not None:
        return Product(notes=(_left_alone(precision),))
    shapes = _shapes(model)
    if not shapes or not _has_switch(model) or _flops(model, n_tokens) < FEWEST_FLOPS:
        return Product()
    candidates = measure_products(shapes, min(batch_tokens, MOST_ROWS))
    return Product(fastest_exact(candidates).path, candidates)


def confirm_product(product: Product, model: LoadedModel, batch_tokens: int) -> Product:
    """What another process chose, where that is exact on this machine too; else the default, and a note."""
    if product.path != "onednn":
        return product
    if _precision_set() is None and _has_switch(model):
        error = worst_error(product, _operands(_shapes(model), min(batch_tokens, MOST_ROWS)))
        if error <= LARGEST_ERROR:
            return product
    note = (
        "this run was begun with oneDNN's products, which on this machine round or are not there: torch's "
        "default ones were used"
    )
    return replace(product, path="default", notes=(*product.notes, note))


def fastest_exact(candidates: Sequence[Candidate]) -> Candidate:
    """The first, which is torch's default, unless another is exact and clearly faster."""
    default, *others = candidates
    exact = [other for other in others if other.error <= LARGEST_ERROR]
    best = max(exact, key=lambda other: other.gflops, default=default)
    return best if best.gflops >= FASTER * default.gflops else default


def _on_cpu_in_float32(model: LoadedModel) -> bool:
    return model.run_dtype == "float32" and model.device.type == "cpu"


def _precision_set() -> str | None:
    """The precision of float32 products, where the caller has set one; None where it is torch's own."""
    settings = getattr(_ONEDNN, "matmul", None)
    if settings is None:  # a torch that has only the older setting
        legacy = torch.get_float32_matmul_precision()
        return None if legacy == "highest" else legacy
    above = _ONEDNN.fp32_precision  # a setting of matmul could not be told from this one
    if above != "none":
        return str(above)
    own = str(settings.fp32_precision)
    return None if own in ("none", "ieee") else own


def _left_alone(precision: str) -> str:
    return (
        f"torch's precision of float32 products was set to {precision} before the run and was left so: the "
        "differences may be those of rounding"
    )


def _has_switch(model: LoadedModel) -> bool:
    """Whether the path can be switched: not where a model is compiled, which asks for the older setting."""
    if not (hasattr(_ONEDNN, "matmul") and _ONEDNN.is_available() and _ONEDNN.enabled):
        return False
    compiled = any(module._compiled_call_impl is not None for module in model.model.modules())
    return not compiled and getattr(model.model.config, "_attn_implementation", None) != "flex_attention"


def _shapes(model: LoadedModel) -> tuple[Shape, ...]:
    """The few largest weights of the block in the middle, each shape once; experts count as one."""
    blocks = model.anatomy.blocks
    weights = [w for w in blocks[len(blocks) // 2].parameters() if w.dim() >= 2 and w.dtype == torch.float32]
    shapes = {(int(weight.shape[-2]), int(weight.shape[-1])) for weight in weights}
    return tuple(sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape), reverse=True)[:MOST_SHAPES])


def _flops(model: LoadedModel, n_tokens: int) -> float:
    """Of all products of weights, in both models."""
    n_weights = sum(w.numel() for block in model.anatomy.blocks for w in block.parameters() if w.dim() >= 2)
    return 2.0 * 2 * n_weights * n_tokens


@dataclass(frozen=True)
class Operands:
    """Random rows and a weight."""

    rows: Float[Tensor, "rows in"]
    weight: Float[Tensor, "out in"]

    @property
    def timed(self) -> Operands:
        """As much of it as is measured in time."""
        rows = self.rows[:TIMED_ROWS, :TIMED_IN].contiguous()
        n_out = max(_SAMPLED, int(TIMED_FLOPS / (2 * rows.numel())))
        return Operands(rows, self.weight[:n_out, :TIMED_IN].contiguous())

    @property
    def flops(self) -> float:
        """Of their product."""
        return 2.0 * len(self.rows) * self.weight.numel()


def _operands(shapes: Sequence[Shape], n_rows: int) -> list[Operands]:
    """For each shape, rows of unequal scale: one scale for all of them would show in the small ones."""
    generator, found = torch.Generator().manual_seed(0), []
    scales = torch.logspace(-3, 3, n_rows)[:, None]
    for n_out, n_in in shapes:
        rows = torch.randn(n_rows, n_in, generator=generator) * scales
        weight = torch.randn(min(n_out, MOST_OUT), n_in, generator=generator)
        found.append(Operands(rows, weight))
    return found


@cache  # so that all runs of a process give the same numbers
def measure_products(shapes: tuple[Shape, ...], n_rows: int) -> tuple[Candidate, ...]:
    """The rate and the error of each path on weights of these shapes, torch's default first."""
    operands = _operands(shapes, n_rows)
    products = [Product("default"), Product("onednn")]
    errors = [worst_error(product, operands) for product in products]
    rates = _rates(products, operands)
    return tuple(
        Candidate(product.path or "default", rate / 1e9, error)
        for product, rate, error in zip(products, rates, errors, strict=True)
    )


@torch.no_grad()
def worst_error(product: Product, operands: Sequence[Operands]) -> float:
    """The worst row's relative error against float64: many rows and few, in batches, in attention."""
    errors = []
    with product.used():
        for given in operands:
            for n_rows in (len(given.rows), *_FEW_ROWS):
                rows = given.rows[:n_rows]
                errors.append(_row_error(linear(rows, given.weight), rows, given.weight))
            errors.append(_batched_error(given))
        errors.append(_attention_error())
    return float(torch.stack(errors).max())  # NaN where one of them is


def _row_error(
    found: Float[Tensor, "rows out"], rows: Float[Tensor, "rows in"], weight: Float[Tensor, "out in"]
) -> Float[Tensor, ""]:
    """Over rows and columns spread evenly: rounding is everywhere, and float64 is slow."""
    some, columns = (slice(None, None, max(1, len(all_) // _SAMPLED)) for all_ in (rows, weight))
    exact = rows[some].double() @ weight[columns].double().T
    return _worst(found[some, columns], exact)


def _batched_error(given: Operands) -> Float[Tensor, ""]:
    rows, weight = given.rows[-_SAMPLED:], given.weight
    batches = torch.bmm(torch.stack([rows, rows]), torch.stack([weight.T, weight.T]))
    return _row_error(batches[1], rows, weight)


def _attention_error() -> Float[Tensor, ""]:
    heads = torch.randn(3, 1, 2, 256, 64, generator=torch.Generator().manual_seed(0))
    heads[0] /= 10  # of large scores the exponentials lose digits, whatever the product
    exact = scaled_dot_product_attention(*heads.double())
    found = scaled_dot_product_attention(*heads)
    return _worst(found, exact)


def _worst(found: Float[Tensor, "*rows out"], exact: Float[Tensor, "*rows out"]) -> Float[Tensor, ""]:
    errors: Tensor = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    return errors.max()


@torch.no_grad()
def _rates(products: Sequence[Product], operands: Sequence[Operands]) -> list[float]:
    """Operations a second with each product: its best times, the products in turn."""
    timed = [given.timed for given in operands]
    best = [[float("inf")] * len(timed) for _ in products]
    with _one_thread():
        for _ in range(ROUNDS):
            for i, given in enumerate(timed):
                for product, seconds in zip(products, best, strict=True):
                    with product.used():
                        seconds[i] = min(seconds[i], _seconds(given))
    total = sum(given.flops for given in timed)
    return [total / sum(seconds) for seconds in best]


def _seconds(given: Operands) -> float:
    started = time.perf_counter()
    linear(given.rows, given.weight)
    return time.perf_counter() - started


@contextmanager
def _one_thread() -> Iterator[None]:
    """Several wait for each other, so beside other work they tell of the load and not of the paths."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
