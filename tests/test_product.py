"""How float32 matrices are multiplied on a CPU: what is chosen, that it is exact, and torch as it was."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.models.llama.modeling_llama import LlamaMLP

import lazarus
from factories import perturbed, tiny_llama, word_tokenizer
from lazarus.engine import Product, choose_product, confirm_product
from lazarus.engine.product import (
    FEWEST_FLOPS,
    LARGEST_ERROR,
    Candidate,
    Operands,
    fastest_exact,
    measure_products,
    worst_error,
)
from lazarus.models import wrap_model
from reference import block_outputs, cosine

SHAPES = ((512, 192), (192, 512))
ONEDNN = Product("onednn")
PROMPTS = ["t5 t17 t9 t30", "t8", "t40 t41 t42 t43 t44 t45 t46 t47"]

settings: Any = torch.backends.mkldnn
backends: Any = torch.backends
needs_switch = pytest.mark.skipif(not hasattr(settings, "matmul"), reason="this torch has no such switch")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Whatever a test sets."""
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(settings, "matmul"):
        backends.fp32_precision = "none"
        settings.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


def default(gflops: float, error: float = 3e-7) -> Candidate:
    return Candidate("default", float(gflops), error)


def onednn(gflops: float, error: float = 4e-7) -> Candidate:
    return Candidate("onednn", float(gflops), error)


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ((default(225), onednn(478)), "onednn"),
        ((default(225), onednn(230)), "default"),
        ((default(225), onednn(100)), "default"),
        ((default(100), onednn(1000, error=1.1e-6)), "default"),
        ((default(100), onednn(1000, error=2.8e-4)), "default"),  # TF32
        ((default(100), onednn(1000, error=2.2e-3)), "default"),  # bfloat16
        ((default(100), onednn(1000, error=float("nan"))), "default"),
        ((default(100, error=2e-6), onednn(110, error=1e-7)), "default"),
        ((default(100),), "default"),
    ],
)
def test_the_default_stands_unless_another_is_exact_and_clearly_faster(
    candidates: tuple[Candidate, ...], expected: str
) -> None:
    assert fastest_exact(candidates).path == expected


def test_what_is_chosen_is_exact_here() -> None:
    candidates = measure_products(SHAPES, 96)
    assert [candidate.path for candidate in candidates] == ["default", "onednn"]
    assert all(candidate.gflops > 0 for candidate in candidates)
    chosen = fastest_exact(candidates)
    generator = torch.Generator().manual_seed(7)
    with Product(chosen.path).used():
        for n_rows, n_out, n_in in ((1, 700, 96), (5, 33, 1024), (96, 512, 192), (200, 64, 5000)):
            rows = torch.randn(n_rows, n_in, generator=generator)
            rows *= torch.logspace(-4, 4, n_rows)[:, None]  # rows of unequal scale
            rows *= torch.randn(n_in, generator=generator).exp()  # and features
            weight = torch.randn(n_out, n_in, generator=generator)
            exact = rows.double() @ weight.double().T
            errors = (linear(rows, weight) - exact).norm(dim=1) / exact.norm(dim=1)
            assert errors.max() < LARGEST_ERROR, (n_rows, n_out, n_in)


@pytest.mark.parametrize(("n_bits", "name"), [(16, "bfloat16"), (13, "TF32")])
def test_an_error_like_that_of_rounding_is_found(n_bits: int, name: str) -> None:
    """A product of rounded rows is what a path that rounds gives: it must be far above the limit."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(96, 2048, generator=generator), torch.randn(64, 2048, generator=generator)
    mask = -1 << n_bits
    rounded = [(tensor.view(torch.int32) & mask).view(torch.float32) for tensor in (rows, weight)]
    exact = rows.double() @ weight.double().T
    errors = (linear(*rounded) - exact).norm(dim=1) / exact.norm(dim=1)
    assert errors.max() > 100 * LARGEST_ERROR, name
    assert worst_error(Product("default"), [Operands(rows, weight)]) < LARGEST_ERROR


class Kernels(TorchFunctionMode):
    """Kernels of another machine: the float32 products that `spoils` tells are made wrong in some way."""

    def __init__(self, spoils: Callable[..., bool], spoilt: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.spoils, self.spoilt = spoils, spoilt

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        products = (linear, torch.bmm, scaled_dot_product_attention)
        if func in products and found.dtype == torch.float32 and self.spoils(func, found):
            return self.spoilt(found)
        return found


def rounded(product: torch.Tensor) -> torch.Tensor:
    return product.bfloat16().float()


def of_linear(n_rows: int) -> Callable[..., bool]:
    return lambda func, found: func is linear and len(found) == n_rows


def of(kernel: Any) -> Callable[..., bool]:
    return lambda func, _: func is kernel


def off_by_the_largest(product: torch.Tensor) -> torch.Tensor:
    """What one scale for all rows does: each element is off by a part of the largest."""
    return product + 1e-6 * product.abs().max()


def with_one_bad_row(product: torch.Tensor) -> torch.Tensor:
    """The last row alone is rounded."""
    return torch.cat([product[:-1], rounded(product[-1:])])


@pytest.mark.parametrize(
    ("spoils", "spoilt"),
    [
        *((of_linear(n_rows), rounded) for n_rows in (1, 3, 16, 96)),
        (of(torch.bmm), rounded),
        (of(scaled_dot_product_attention), rounded),
        (of(linear), off_by_the_largest),
        (of(torch.bmm), off_by_the_largest),
        (of_linear(3), with_one_bad_row),
        (of_linear(96), lambda product: torch.full_like(product, torch.nan)),
    ],
)
def test_a_kernel_that_rounds_is_found_wherever_it_is_used(
    spoils: Callable[..., bool], spoilt: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Kernels go by the number of rows, and attention and batches have their own."""
    measure_products.cache_clear()
    with Kernels(spoils, spoilt):
        candidates = measure_products(SHAPES, 96)
        confirmed = confirm_product(ONEDNN, wrap_model(tiny_llama(), "tiny"), 96)
    measure_products.cache_clear()
    assert not any(candidate.error <= LARGEST_ERROR for candidate in candidates)
    assert confirmed.path == "default"
    assert "torch's default ones were used" in confirmed.notes[0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each product takes a millisecond, with oneDNN half of one; most take longer, as on a busy machine."""
    now, calls = 0.0, 0

    def read() -> float:
        nonlocal now, calls
        calls += 1
        share = 0.5 if getattr(settings, "matmul", settings).fp32_precision == "bf16" else 1.0
        now += 1e-3 * share * (1 + calls // 2 % 7)
        return now

    monkeypatch.setattr(time, "perf_counter", read)
    measure_products.cache_clear()
    yield
    measure_products.cache_clear()


@needs_switch
def test_rates_are_those_of_the_best_times(clock: None) -> None:
    """Two operations an element of the weight and row; the first 256 rows of a large weight are taken."""
    plain, other = measure_products(SHAPES, 96)
    operations = 2 * 96 * (256 * 192 + 192 * 512)
    assert plain.gflops == pytest.approx(operations / 2e-3 / 1e9)
    assert other.gflops == pytest.approx(operations / 1e-3 / 1e9)


@needs_switch
def test_the_largest_shapes_of_the_middle_block_are_measured(clock: None) -> None:
    """Three of them, each shape once, with as many rows as a batch has."""
    model = tiny_llama()
    wide = copy.deepcopy(model.config)
    wide.intermediate_size = 96
    model.model.layers[2].mlp = LlamaMLP(wide)
    weights = 96 * 32 + 32 * 96 + 32 * 32
    for batch_tokens, n_rows in ((10, 10), (100, 100), (5000, 256)):
        product = choose_product(wrap_model(model, "tiny"), int(FEWEST_FLOPS), batch_tokens)
        assert product.candidates[0].gflops == pytest.approx(2 * n_rows * weights / 3e-3 / 1e9)
        exact = product.candidates[1].error <= LARGEST_ERROR
        assert product.path == ("onednn" if exact else "default")


@needs_switch
def test_of_a_large_product_a_part_is_timed(clock: None) -> None:
    """1,024 features and 256 rows at most, and of the weight about 3e7 operations."""
    plain, _ = measure_products(((300, 2048),), 400)
    n_out = int(3e7 / (2 * 256 * 1024))
    assert n_out < 64
    assert plain.gflops == pytest.approx(2 * 256 * 64 * 1024 / 1e-3 / 1e9)
    small, _ = measure_products(((300, 512),), 256)
    assert small.gflops == pytest.approx(2 * 256 * int(3e7 / (2 * 256 * 512)) * 512 / 1e-3 / 1e9)


def test_a_run_is_long_from_a_number_of_operations_on() -> None:
    """Two a weight of a block and token, for each of two models."""
    model = tiny_llama()
    n_weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    n_tokens = int(FEWEST_FLOPS / (4 * n_weights))
    wrapped = wrap_model(model, "tiny")
    assert choose_product(wrapped, n_tokens - 1, 8) == Product()
    assert len(choose_product(wrapped, n_tokens + 1, 8).candidates) == 2


@needs_switch
@pytest.mark.parametrize("before", ["none", "ieee"])
def test_torch_is_set_as_it_was_even_after_an_error(before: str) -> None:
    settings.matmul.fp32_precision = before
    within = []

    def fail() -> None:
        with ONEDNN.used():
            within.append(settings.matmul.fp32_precision)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert within == ["bf16"]
    assert settings.matmul.fp32_precision == before
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cuda.matmul.fp32_precision == "none"


def test_measuring_leaves_torch_as_it_was() -> None:
    before = torch.get_num_threads(), settings.fp32_precision, torch.get_float32_matmul_precision()
    measure_products.cache_clear()
    measure_products(((64, 32),), 8)
    after = torch.get_num_threads(), settings.fp32_precision, torch.get_float32_matmul_precision()
    assert after == before


def test_a_short_run_stays_with_the_default_and_a_long_one_is_measured() -> None:
    model = wrap_model(tiny_llama(), "tiny")
    assert choose_product(model, 100, 512) == Product()
    chosen = choose_product(model, int(FEWEST_FLOPS), 512)
    assert chosen.path == fastest_exact(chosen.candidates).path
    assert choose_product(model, int(FEWEST_FLOPS), 512) == chosen


def test_nothing_is_chosen_for_other_types() -> None:
    model = wrap_model(tiny_llama().to(torch.bfloat16), "tiny")
    assert choose_product(model, int(FEWEST_FLOPS), 512) == Product()


def test_nothing_is_chosen_for_a_compiled_model() -> None:
    """Compiled code asks torch for its older setting, and torch refuses to tell it beside the newer one."""
    model = tiny_llama()
    model.compile()
    assert choose_product(wrap_model(model, "tiny"), int(FEWEST_FLOPS), 512) == Product()


@needs_switch
@pytest.mark.parametrize("precision", ["medium", "high"])
def test_a_precision_that_the_caller_has_set_stands_and_is_told(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = settings.matmul.fp32_precision
    diff = lazarus.activation_diff(
        tiny_llama(), perturbed(tiny_llama()), PROMPTS, tokenizer=word_tokenizer(), device="cpu"
    )
    assert (settings.matmul.fp32_precision, torch.get_float32_matmul_precision()) == (before, precision)
    assert diff.record.environment.matmul is None
    assert any(f"was set to {before} before the run" in note for note in diff.notes)


@needs_switch
def test_a_precision_set_for_all_of_torch_stands_too() -> None:
    backends.fp32_precision = "tf32"
    product = choose_product(wrap_model(tiny_llama(), "tiny"), int(FEWEST_FLOPS), 512)
    assert product.path is None
    assert "set to tf32" in product.notes[0]
    assert backends.fp32_precision == "tf32"


def test_the_choice_goes_through_json() -> None:
    product = Product("onednn", (default(225), onednn(478)), ("a note",))
    assert Product.from_json(json.loads(json.dumps(product.as_json()))) == product


def test_what_another_process_chose_is_kept_where_it_is_exact() -> None:
    model = wrap_model(tiny_llama(), "tiny")
    confirmed = confirm_product(ONEDNN, model, 64)
    with ONEDNN.used():
        generator = torch.Generator().manual_seed(3)
        rows, weight = torch.randn(64, 512, generator=generator), torch.randn(512, 512, generator=generator)
        exact = rows.double() @ weight.double().T
        error = ((linear(rows, weight) - exact).norm() / exact.norm()).item()
    assert confirmed.path == ("onednn" if error < LARGEST_ERROR else "default")
    assert confirm_product(Product("default"), model, 64) == Product("default")
    assert confirm_product(Product(), model, 64) == Product()


@needs_switch
def test_what_another_process_chose_gives_way_to_the_callers_precision() -> None:
    torch.set_float32_matmul_precision("medium")
    confirmed = confirm_product(ONEDNN, wrap_model(tiny_llama(), "tiny"), 64)
    assert confirmed.path == "default"
    assert "torch's default ones were used" in confirmed.notes[0]


def test_float64_is_not_touched() -> None:
    rows, weight = torch.randn(64, 96, dtype=torch.float64), torch.randn(80, 96, dtype=torch.float64)
    plain = linear(rows, weight)
    with ONEDNN.used():
        assert torch.equal(linear(rows, weight), plain)


def test_numbers_with_each_path_are_those_of_the_oracle() -> None:
    base = tiny_llama(hidden_size=128, intermediate_size=384)
    finetuned, tokenizer = perturbed(base), word_tokenizer()
    expected = []
    for text in PROMPTS:
        ids = tokenizer(text).input_ids
        ours, theirs = (block_outputs(model, model.model.layers, ids) for model in (base, finetuned))
        expected.append([cosine(b, f)[-1] for b, f in zip(ours, theirs, strict=True)])
    for path in ("default", "onednn"):
        with Product(path).used():
            diff = lazarus.activation_diff(base, finetuned, PROMPTS, tokenizer=tokenizer, device="cpu")
        found = diff.results.column("cosine_similarity").reshape(len(PROMPTS), -1)
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_base_against_itself_is_exactly_nothing_with_each_path() -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=384)
    for path in ("default", "onednn"):
        with Product(path).used():
            diff = lazarus.activation_diff(model, model, PROMPTS, tokenizer=word_tokenizer(), device="cpu")
        assert [layer.relative_l2 for layer in diff.layers] == [0.0] * 4
        assert diff.summary.verdict == "identical"
