"""Identical, within the noise, or changed: the floor, and what it is held against."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import lazarus
from factories import perturbed, tiny_llama, tiny_tokenizer, word_tokenizer
from layouts import most
from lazarus.metrics import Rows, compare_rows
from lazarus.statistics import Floor, find_verdict, noise_floor
from lazarus.statistics.verdict import FACTOR

NAN = float("nan")
FLOORS = {0: Floor(1e-6, 1e-12), 1: Floor(1e-3, 1e-6), "logits": Floor(1e-5, 1e-10)}
PROMPTS = ["Hello, how are you?", "What is AI?"]
ULPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def changed(model: LlamaForCausalLM, amount: float) -> LlamaForCausalLM:
    """A copy with one matrix of block 2 changed by so much of its norm."""
    other = copy.deepcopy(model)
    weight = other.model.layers[2].mlp.down_proj.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight.add_(noise * amount * weight.norm() / noise.norm())
    return other


def compare(
    base: LlamaForCausalLM, finetuned: LlamaForCausalLM, dtype: torch.dtype = torch.float32
) -> lazarus.ActivationDiff:
    ours, theirs = (copy.deepcopy(model).to(dtype) for model in (base, finetuned))
    return lazarus.activation_diff(ours, theirs, PROMPTS, tokenizer=tiny_tokenizer())


# The floor


def test_the_floor_is_a_factor_times_the_largest_noise() -> None:
    floor = noise_floor([(1e-4, 3e-9), (4e-4, 1e-9), (2e-4, 2e-9)], "float32")
    assert floor.relative_l2 == pytest.approx(FACTOR * 4e-4, rel=1e-15)
    assert floor.divergence == pytest.approx(FACTOR**2 * 3e-9, rel=1e-15)
    assert FACTOR > 1


def test_a_change_of_twice_the_noise_is_a_change_and_one_of_half_as_much_again_is_none() -> None:
    """The factor is 1.75: docs/how-to-read-it.md says how it was calibrated."""
    floors = {0: noise_floor([(1e-4, 1e-9)], "float32")}
    assert find_verdict({0: 2e-4}, floors) == "changed"
    assert find_verdict({0: 1.5e-4}, floors) == "within_noise"


@pytest.mark.parametrize("trials", [[], [(0.0, 0.0)], [(1e-20, 1e-40)]])
@pytest.mark.parametrize("dtype", ULPS)
def test_the_floor_is_never_below_half_an_ulp(dtype: str, trials: list[tuple[float, float]]) -> None:
    half = torch.finfo(getattr(torch, dtype)).eps / 2
    assert half == ULPS[dtype] / 2
    assert noise_floor(trials, dtype) == Floor(half, half**2 / 2)


def test_a_type_without_an_epsilon_has_that_of_float32() -> None:
    assert noise_floor([], "float8_e4m3fn") == noise_floor([], "float32")


# The verdict


def test_identical_is_when_every_site_and_the_logits_are_exactly_the_same() -> None:
    same = {0: 0.0, 1: 0.0, "logits": 0.0}
    assert find_verdict(same, FLOORS) == "identical"
    assert find_verdict(same, {}) == "identical"
    for site in same:
        assert find_verdict({**same, site: 1e-300}, FLOORS) == "within_noise"


@pytest.mark.parametrize("site", FLOORS)
def test_one_site_above_its_own_floor_is_a_change(site: int | str) -> None:
    quiet = {0: 1e-7, 1: 5e-4, "logits": 0.0}
    assert find_verdict(quiet, FLOORS) == "within_noise"
    at = FLOORS[site].relative_l2
    assert find_verdict({**quiet, site: at}, FLOORS) == "within_noise"
    assert find_verdict({**quiet, site: at * 1.001}, FLOORS) == "changed"


@pytest.mark.parametrize("site", FLOORS)
def test_a_site_that_was_not_measured_says_nothing(site: int | str) -> None:
    quiet, loud = dict.fromkeys(FLOORS, 1e-7), dict.fromkeys(FLOORS, 1.0)
    assert find_verdict({**quiet, site: NAN}, FLOORS) == "within_noise"
    assert find_verdict({**loud, site: NAN}, FLOORS) == "changed"
    assert find_verdict({**dict.fromkeys(FLOORS, 0.0), site: NAN}, FLOORS) == "identical"


@pytest.mark.parametrize("site", FLOORS)
def test_a_difference_where_the_noise_is_not_known_makes_no_verdict(site: int | str) -> None:
    floors = {each: floor for each, floor in FLOORS.items() if each != site}
    quiet = dict.fromkeys(FLOORS, 0.0)
    assert find_verdict({**quiet, site: 1.0}, floors) is None
    assert find_verdict(dict.fromkeys(FLOORS, 1e-7), floors) is None
    assert find_verdict(dict.fromkeys(FLOORS, 1.0), floors) == "changed"  # by the other sites
    assert find_verdict({**dict.fromkeys(FLOORS, 1e-7), site: 0.0}, floors) == "within_noise"


def test_nothing_measured_makes_no_verdict() -> None:
    assert find_verdict({}, FLOORS) is None
    assert find_verdict(dict.fromkeys(FLOORS, NAN), FLOORS) is None


@pytest.mark.parametrize("scale", [0.5, 1.001, 2.0])
def test_a_change_of_scale_alone_is_a_change(scale: float) -> None:
    base = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    divergence, l2 = compare_rows(Rows.of(base, scale * base), centered=False).values[:, :2].mean(0)
    assert divergence < 1e-30
    assert float(l2) == pytest.approx(abs(scale - 1), rel=1e-12)
    assert find_verdict({0: float(l2)}, {0: Floor(9e-4, 1.0)}) == "changed"


# On models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_identical_to_its_copy(dtype: torch.dtype) -> None:
    base = tiny_llama()
    diff = compare(base, base, dtype)
    assert diff.summary.verdict == "identical"
    assert diff.record.output is not None
    assert (diff.record.output.logits_relative_l2, diff.record.output.js) == (0.0, 0.0)
    assert (diff.results.column("relative_l2") == 0).all()


def test_one_matrix_changed_by_a_ten_thousandth_is_a_change_in_float32() -> None:
    base = tiny_llama()
    assert compare(base, changed(base, 1e-4)).summary.verdict == "changed"


def test_a_change_below_the_rounding_is_within_the_noise() -> None:
    base = tiny_llama()
    diff = compare(base, changed(base, 1e-7))
    assert diff.summary.verdict == "within_noise"
    assert most(diff) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neurons_in_another_order_are_no_change(dtype: torch.dtype) -> None:
    base = tiny_llama()
    permuted = copy.deepcopy(base)
    for seed, layer in enumerate(permuted.model.layers):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = getattr(layer.mlp, name).weight
            weight.data = weight.data.index_select(axis, order)
    diff = compare(base, permuted, dtype)
    assert diff.summary.verdict != "changed"
    assert (most(diff) > 0) == (dtype == torch.float32)  # in bfloat16 the sums of so few round to the same


def test_a_change_of_scale_alone_is_a_change_of_a_model() -> None:
    """Twice the embedding and twice what every block adds: a stream of twice the length, that norms undo."""
    base = tiny_llama(rms_norm_eps=1e-12)
    scaled = copy.deepcopy(base)
    with torch.no_grad():
        scaled.model.embed_tokens.weight.mul_(2)
        for layer in scaled.model.layers:
            layer.self_attn.o_proj.weight.mul_(2)
            layer.mlp.down_proj.weight.mul_(2)
    diff = compare(base, scaled)
    np.testing.assert_allclose(diff.results.column("relative_l2"), 1.0, rtol=1e-5)
    assert diff.results.column("divergence").max() < 1e-10
    assert diff.record.output is not None
    assert (diff.record.output.logits_relative_l2 or 0) < 1e-4
    assert diff.summary.verdict == "changed"


def test_a_changed_head_alone_is_a_change() -> None:
    base = tiny_llama()
    other = copy.deepcopy(base)
    other.lm_head.weight.data = perturbed(base).lm_head.weight.data
    diff = compare(base, other)
    assert (diff.results.column("relative_l2") == 0).all()
    assert [site.relative_l2 for site in diff.sites] == [0, 0]
    assert diff.summary.verdict == "changed"
    assert diff.summary.weights_identical is False


def test_a_state_that_is_not_finite_in_one_model_alone_is_a_change() -> None:
    base, finetuned = tiny_llama(), tiny_llama()
    with torch.no_grad():
        finetuned.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    diff = lazarus.activation_diff(base, finetuned, ["Hello"], tokenizer=word_tokenizer())
    assert diff.summary.verdict == "changed"
    assert "states that cannot be compared; see the notes" in str(diff)


def test_a_state_that_is_zero_in_both_models_is_no_change() -> None:
    base, tokenizer = tiny_llama(), word_tokenizer()
    with torch.no_grad():
        base.model.embed_tokens.weight[9] = 0
    diff = lazarus.activation_diff(base, base, ["t5 t17 t9"], tokenizer=tokenizer)
    assert any("embedding: states that are zero or not finite were left out" in n for n in diff.notes)
    assert diff.summary.verdict == "identical"


@pytest.mark.parametrize("broken", [0, 1])
def test_logits_that_are_not_finite_leave_no_verdict_but_a_change(broken: int) -> None:
    base, finetuned = pair = (tiny_llama(), tiny_llama())
    with torch.no_grad():
        pair[broken].lm_head.weight[3, 3] = NAN
    diff = lazarus.activation_diff(base, finetuned, ["t5 t17"], tokenizer=word_tokenizer())
    assert diff.summary.verdict is None
    assert [layer.divergence for layer in diff.layers] == [0.0] * 4
