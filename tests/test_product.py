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
        ((default(100), onednn(125)), "onednn"),  # 1.25 times as fast
        ((default(100), onednn(124.9)), "default"),
        ((default(100), onednn(1000, error=9e-7)), "onednn"),
        ((default(100), onednn(1000, error=LARGEST_ERROR)), "onednn"),
    ],
)
def test_the_default_stands_unless_another_is_exact_and_clearly_faster(
    candidates: tuple[Candidate, ...], expected: str
) -> None:
    assert fastest_exact(candidates).path == expected


def test_of_several_exact_ones_the_fastest_is_taken() -> None:
    candidates = default(100), onednn(200), onednn(400), onednn(300), onednn(900, error=1e-5)
    assert fastest_exact(candidates).gflops == 400


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


class Machine(TorchFunctionMode):
    """Another machine: those float32 products that `spoils` tells are wrong, and each product takes its time.

    One on a single thread takes a millisecond, with oneDNN half of one; most take longer, as in a busy hour.
    """

    def __init__(self, spoils: Callable[..., bool], spoilt: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.spoils, self.spoilt = spoils, spoilt
        self.seconds, self.n_products = 0.0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        products = (linear, torch.bmm, scaled_dot_product_attention)
        if func not in products or found.dtype != torch.float32:
            return found
        self.n_products += 1
        pace = (0.5 if with_onednn() else 1.0) * torch.get_num_threads()
        self.seconds += 1e-3 * pace * (1 + self.n_products % 7)
        return self.spoilt(found) if self.spoils(func, found) else found


def with_onednn(*_: Any) -> bool:
    return bool(getattr(settings, "matmul", settings).fp32_precision == "bf16")


def never(*_: Any) -> bool:
    return False


def rounded(product: torch.Tensor) -> torch.Tensor:
    return product.bfloat16().float()


def of_linear(n_rows: int) -> Callable[..., bool]:
    return lambda func, found: func is linear and len(found) == n_rows


def of(kernel: Any) -> Callable[..., bool]:
    return lambda func, _: func is kernel


def off_by_the_largest(product: torch.Tensor) -> torch.Tensor:
    """What one scale for all rows does: each element is off by a part of the largest."""
    return product + 1e-8 * product.abs().max()


def with_one_bad_row(product: torch.Tensor) -> torch.Tensor:
    """The last of the rows, or of the batch, is rounded."""
    return torch.cat([product[:-1], rounded(product[-1:])])


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    measure_products.cache_clear()
    yield
    measure_products.cache_clear()


@pytest.mark.parametrize(
    ("spoils", "spoilt"),
    [
        *((of_linear(n_rows), rounded) for n_rows in (1, 3, 16, 96)),
        (of(torch.bmm), rounded),
        (of(scaled_dot_product_attention), rounded),
        (of(linear), off_by_the_largest),
        (of_linear(3), with_one_bad_row),
        (of_linear(16), with_one_bad_row),
        (of(torch.bmm), with_one_bad_row),
        (of_linear(96), lambda product: torch.full_like(product, torch.nan)),
    ],
)
def test_a_kernel_that_rounds_is_found_wherever_it_is_used(
    spoils: Callable[..., bool], spoilt: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Kernels go by the number of rows, and attention and batches have their own."""
    with Machine(spoils, spoilt):
        candidates = measure_products(SHAPES, 96)
        confirmed = confirm_product(ONEDNN, wrap_model(tiny_llama(), "tiny"), 96)
    assert not any(candidate.error <= LARGEST_ERROR for candidate in candidates)
    assert confirmed.path == "default"
    assert "torch's default ones were used" in confirmed.notes[0]


@needs_switch
def test_where_onednn_rounds_the_default_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors with tiles: twice as fast, and of no use."""
    model = wrap_model(tiny_llama(), "tiny")
    with Machine(with_onednn, rounded) as machine:
        monkeypatch.setattr(time, "perf_counter", lambda: machine.seconds)
        chosen = choose_product(model, int(FEWEST_FLOPS), 64)
        confirmed = confirm_product(ONEDNN, model, 64)
    plain, other = chosen.candidates
    assert (chosen.path, confirmed.path) == ("default", "default")
    assert other.gflops == pytest.approx(2 * plain.gflops)
    assert plain.error <= LARGEST_ERROR < other.error


@needs_switch
def test_where_onednn_is_exact_and_faster_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap_model(tiny_llama(), "tiny")
    with Machine(with_onednn, lambda product: product.double().float()) as machine:
        monkeypatch.setattr(time, "perf_counter", lambda: machine.seconds)
        chosen = choose_product(model, int(FEWEST_FLOPS), 64)
    exact = chosen.candidates[1].error <= LARGEST_ERROR
    assert chosen.path == ("onednn" if exact else "default")


def test_the_errors_are_the_same_each_time() -> None:
    first = [candidate.error for candidate in measure_products(SHAPES, 96)]
    measure_products.cache_clear()
    assert [candidate.error for candidate in measure_products(SHAPES, 96)] == first


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The time of a machine on which products of several threads wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with Machine(never, rounded) as machine:
        monkeypatch.setattr(time, "perf_counter", lambda: machine.seconds)
        yield
    after = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    assert after == 2


@needs_switch
def test_rates_are_those_of_the_best_times(clock: None) -> None:
    """Two operations an element of the weight and row; the first 256 rows of a large weight are taken."""
    plain, other = measure_products(SHAPES, 96)
    operations = 2 * 96 * (256 * 192 + 192 * 512)
    assert plain.gflops == pytest.approx(operations / 2e-3 / 1e9)
    assert other.gflops == pytest.approx(operations / 1e-3 / 1e9)


@needs_switch
def test_the_largest_shapes_of_the_middle_block_are_measured(clock: None) -> None:
    """Three of float32, each shape once, with as many rows as a batch has; experts count as one."""
    model = tiny_llama()
    wide = copy.deepcopy(model.config)
    wide.intermediate_size = 96
    middle: Any = model.model.layers[2]
    middle.mlp = LlamaMLP(wide)
    middle.experts = torch.nn.Parameter(torch.zeros(50, 40, 32))
    middle.long, middle.flat = torch.nn.Linear(4, 60), torch.nn.Linear(60, 4)
    middle.narrow = torch.nn.Linear(99, 99).bfloat16()
    weights = 96 * 32 + 32 * 96 + 40 * 32
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


def test_nothing_is_chosen_for_a_narrow_model_with_a_float32_weight() -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.model.layers[2].spare = torch.nn.Linear(64, 64)
    assert choose_product(wrap_model(model, "tiny"), int(FEWEST_FLOPS), 512) == Product()


def test_nothing_is_chosen_where_the_middle_block_has_no_float32_weight() -> None:
    model = tiny_llama()
    model.model.layers[2].bfloat16()
    assert choose_product(wrap_model(model, "tiny"), int(FEWEST_FLOPS), 512) == Product()


def test_nothing_is_chosen_off_the_cpu() -> None:
    model = wrap_model(tiny_llama().to("meta"), "tiny")
    assert choose_product(model, int(FEWEST_FLOPS), 512) == Product()


@pytest.mark.parametrize("part", ["", "model.layers.1.mlp"])
def test_nothing_is_chosen_for_a_compiled_model(part: str) -> None:
    """Compiled code asks torch for its older setting, and torch refuses to tell it beside the newer one."""
    model = tiny_llama()
    model.get_submodule(part).compile()
    wrapped = wrap_model(model, "tiny")
    assert choose_product(wrapped, int(FEWEST_FLOPS), 512) == Product()
    assert confirm_product(ONEDNN, wrapped, 64).path == "default"


def test_nothing_is_chosen_for_flex_attention_which_is_compiled() -> None:
    model = tiny_llama()
    model.config._attn_implementation = "flex_attention"
    wrapped = wrap_model(model, "tiny")
    assert choose_product(wrapped, int(FEWEST_FLOPS), 512) == Product()
    assert confirm_product(ONEDNN, wrapped, 64).path == "default"


def test_nothing_is_chosen_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = wrap_model(tiny_llama(), "tiny")
    with monkeypatch.context() as patch:
        patch.setattr(settings, "enabled", False)
        assert choose_product(wrapped, int(FEWEST_FLOPS), 512) == Product()
    assert settings.enabled
    monkeypatch.setattr(settings, "is_available", lambda: False)
    assert choose_product(wrapped, int(FEWEST_FLOPS), 512) == Product()


@pytest.fixture
def _older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that has only the older setting."""
    monkeypatch.delattr(type(settings), "matmul", raising=False)


@pytest.mark.usefixtures("_older_torch")
def test_an_older_torch_has_no_switch_and_its_setting_stands() -> None:
    wrapped = wrap_model(tiny_llama(), "tiny")
    assert choose_product(wrapped, int(FEWEST_FLOPS), 512) == Product()
    assert confirm_product(ONEDNN, wrapped, 64).path == "default"
    torch.set_float32_matmul_precision("high")
    assert "set to high" in choose_product(wrapped, int(FEWEST_FLOPS), 512).notes[0]


@needs_switch
def test_the_precision_that_rounds_nothing_is_no_choice_of_the_callers() -> None:
    settings.matmul.fp32_precision = "ieee"
    product = choose_product(wrap_model(tiny_llama(), "tiny"), int(FEWEST_FLOPS), 512)
    assert product.notes == ()
    assert len(product.candidates) == 2


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
