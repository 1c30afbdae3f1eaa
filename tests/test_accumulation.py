"""The seam for other runtimes: pairs of states go in, from wherever, and a result comes out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import lazarus
from factories import perturbed, tiny_llama, tiny_tokenizer
from lazarus import (
    Accumulation,
    ModelFacts,
    PairFacts,
    Plan,
    StatePair,
    WeightFacts,
    conclude,
    iter_state_pairs,
)
from lazarus.demo import BASE
from lazarus.errors import UsageError

TEXTS = ["Hello", "What is AI?", "Hello", "The capital", "Calculate 2 + 2", "a list"]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return tiny_llama(), perturbed(tiny_llama())


def as_arrays(pairs: Any) -> list[StatePair]:
    """The pairs as NumPy arrays, which know nothing of torch."""
    return [
        StatePair.of(p.site, p.prompts.numpy(), p.base.numpy(), p.finetuned.numpy(), p.trial) for p in pairs
    ]


@pytest.mark.parametrize("position", ["last", "mean", "all"])
def test_states_from_arrays_give_the_result_of_a_run(position: str, models: tuple[Any, Any]) -> None:
    options: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "position": position}
    expected = lazarus.activation_diff(*models, TEXTS, **options).record
    pairs = iter_state_pairs(*models, TEXTS, **options, with_noise=True)
    seen = Accumulation(pairs.facts, pairs.plan).take(as_arrays(pairs))
    found = conclude(seen, WeightFacts(identical=False)).record
    assert found.summary == expected.summary
    assert found.settings == expected.settings
    for name in ("base", "finetuned", "prompts", "layers", "sites", "output"):
        assert getattr(found, name) == getattr(expected, name), name
    for column in ("divergence", "relative_l2", "norm_ratio"):
        ours, theirs = (record.results.column(column) for record in (found, expected))
        np.testing.assert_array_equal(ours, theirs)


def test_parts_that_went_to_a_file_and_back_are_the_whole(models: tuple[Any, Any]) -> None:
    pairs = iter_state_pairs(*models, TEXTS, tokenizer=tiny_tokenizer(), batch_tokens=16)
    every = list(pairs)
    whole = Accumulation(pairs.facts, pairs.plan).take(every)
    joined = Accumulation(pairs.facts, pairs.plan)
    for part in (every[::2], every[1::2]):
        joined.add(Accumulation(pairs.facts, pairs.plan).take(part).state())
    for ours, theirs in zip(conclude(joined).layers, conclude(whole).layers, strict=True):
        assert ours.divergence == theirs.divergence
        assert ours.relative_l2 == theirs.relative_l2
        assert ours.unrelated_similarity == pytest.approx(theirs.unrelated_similarity, rel=1e-12)


def test_every_prompt_comes_with_its_own_rows(models: tuple[Any, Any]) -> None:
    """A prompt that is repeated runs once, and its rows come again under its own number."""
    owners: dict[Any, list[int]] = {}
    for pair in iter_state_pairs(*models, TEXTS, tokenizer=tiny_tokenizer()):
        assert pair.trial is None
        assert len(pair.base) == len(pair.finetuned) == len(pair.prompts)
        owners.setdefault(pair.site, []).extend(pair.prompts.tolist())
    assert list(owners) == ["embedding", 0, 1, 2, 3, "final_norm", "logits"]
    assert all(sorted(found) == list(range(len(TEXTS))) for found in owners.values())


def facts_of(n_layers: int = 2, width: int = 8) -> PairFacts:
    base, finetuned = (ModelFacts.of(name, n_layers, width) for name in ("one", "two"))
    return PairFacts(base, finetuned)


def test_without_noise_and_weights_nothing_is_claimed_but_identity() -> None:
    facts, states = facts_of(), np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    for change, verdict in ((0.0, "identical"), (1e-3, None)):
        seen = Accumulation(facts, Plan.of(facts, ["a", "b", "c"]))
        seen.take(StatePair.of(site, [0, 1, 2], states, states + np.float32(change)) for site in facts.sites)
        summary = conclude(seen).summary
        assert (summary.verdict, summary.weights_identical) == (verdict, None)


def test_a_trial_of_the_noise_is_the_floor() -> None:
    facts, random = facts_of(), np.random.default_rng(0)
    states = random.normal(size=(3, 8))
    near, far = (states + size * random.normal(size=(3, 8)) for size in (1e-6, 1e-3))
    for other, verdict in ((near, "within_noise"), (far, "changed")):
        seen = Accumulation(facts, Plan.of(facts, ["a", "b", "c"]))
        seen.take(StatePair.of(site, [0, 1, 2], states, other) for site in facts.sites)
        seen.take(StatePair.of(site, [0, 1, 2], states, near, trial=0) for site in facts.sites)
        assert conclude(seen).summary.verdict == verdict


def test_lists_and_other_dtypes_are_taken() -> None:
    pair = StatePair.of(0, (0, 1), [[1.0, 2.0], [3.0, 4.0]], np.ones((2, 2), np.float16))
    assert pair.prompts.dtype == torch.int64
    assert pair.finetuned.dtype == torch.float16


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_a_precision_of_products_that_the_caller_has_set_is_told(
    precision: str, models: tuple[Any, Any]
) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        notes = lazarus.activation_diff(*models, TEXTS, tokenizer=tiny_tokenizer(), device="cpu").notes
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert any("precision of float32 products was set to" in note for note in notes)
    plain = lazarus.activation_diff(*models, TEXTS, tokenizer=tiny_tokenizer(), device="cpu").notes
    assert not any("precision of float32 products" in note for note in plain)


def test_a_layer_that_is_not_there_is_told_before_a_position_that_is_not() -> None:
    with pytest.raises(UsageError, match='`readout="99"`: there is no layer 99'):
        lazarus.activation_diff(BASE, BASE, ["12 + 7 ="], position=99, readout="99")


@pytest.mark.parametrize("norms", [(True, True), (True, False), (False, True), (False, False)])
def test_a_centred_cosine_is_given_where_both_models_subtract_the_mean(norms: tuple[bool, bool]) -> None:
    plain = facts_of()
    facts = PairFacts(
        replace(plain.base, uses_layer_norm=norms[0]), replace(plain.finetuned, uses_layer_norm=norms[1])
    )
    base, finetuned = np.random.default_rng(0).normal(size=(2, 3, 8)) + 1
    seen = Accumulation(facts, Plan.of(facts, ["a", "b", "c"]))
    seen.take(StatePair.of(site, [0, 1, 2], base, finetuned) for site in facts.sites)
    expected = np.mean([np.corrcoef(b, f)[0, 1] for b, f in zip(base, finetuned, strict=True)])
    for layer in conclude(seen).layers:
        found = layer.centered_cosine_similarity
        assert found == (pytest.approx(expected, rel=1e-12) if all(norms) else None)


NAN, INF = float("nan"), float("inf")


def with_broken_logits(facts: PairFacts) -> tuple[Accumulation, Accumulation]:
    """Two halves of a comparison of four prompts; in one of them some rows of logits are no distribution."""
    plan = Plan.of(facts, list("abcd"))
    broken, sound = (Accumulation(facts, plan) for _ in range(2))
    base = [[0.0, 1.0, 2.0], [NAN, 0.0, 0.0], [1.0, -INF, 0.0], [1.0, INF, 0.0]]
    finetuned = [[0.0, 1.0, 2.0], [1.0, 0.0, 0.0], [0.0, NAN, 0.0], [NAN, 0.0, 0.0]]
    broken.take([StatePair.of("logits", [0, 2, 2, 2], base, finetuned)])
    sound.take([StatePair.of("logits", [1, 3], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, np.log(3)]])])
    return broken, sound


def test_logits_that_are_no_distribution_are_counted_for_each_prompt_and_model() -> None:
    broken, sound = with_broken_logits(facts_of())
    assert broken.n_logits_not_finite.tolist() == [[0, 0, 2, 0], [0, 0, 2, 0]]
    assert broken.n_logits_not_finite.dtype == np.int64
    assert broken.output.n_rows.tolist() == [1, 0, 0, 0]
    assert broken.output.n_excluded.tolist() == [0, 0, 3, 0]
    assert not sound.n_logits_not_finite.any()


def test_parts_add_up_to_what_both_have_seen_of_the_logits() -> None:
    facts = facts_of()
    broken, sound = with_broken_logits(facts)
    joined = Accumulation(facts, Plan.of(facts, list("abcd")))
    for part in (sound, broken, broken):
        joined.add(part.state())
    assert joined.n_logits_not_finite.tolist() == [[0, 0, 4, 0], [0, 0, 4, 0]]
    assert joined.output.n_rows.tolist() == [2, 1, 0, 1]
    half, quarters = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    expected = [0.0, 0.0, NAN, (half * np.log(half / quarters)).sum()]
    np.testing.assert_allclose(joined.output.means()["kl_base_finetuned"], expected, rtol=1e-12)


def test_parts_add_up_to_what_both_have_seen_of_the_noise() -> None:
    facts, states = facts_of(), np.random.default_rng(0).normal(size=(3, 8))
    plan, factors = Plan.of(facts, ["a", "b", "c"]), (1 + 1e-6, 1 - 3e-6)
    joined = Accumulation(facts, plan)
    for prompts in ([0, 2], [1]):
        rows = states[prompts]
        part = Accumulation(facts, plan).take(
            StatePair.of(site, prompts, rows, rows * factor, trial=trial)
            for site in facts.sites
            for trial, factor in enumerate(factors)
        )
        joined.add(part.state())
    assert [list(trial) for trial in joined.noise] == [facts.sites, facts.sites]
    for trial, factor in zip(joined.noise, factors, strict=True):
        for means in trial.values():
            assert means.means()["relative_l2"] == pytest.approx(np.full(3, abs(factor - 1)), rel=1e-6)


def test_a_prompt_has_one_token_where_their_number_is_not_known() -> None:
    assert [prompt.n_tokens for prompt in Plan.of(facts_of(), ["a", "b"]).prompts] == [1, 1]
    assert [prompt.n_tokens for prompt in Plan.of(facts_of(), ["a", "b"], [3, 4]).prompts] == [3, 4]


def test_of_many_prompts_a_seeded_sample_is_kept_for_cka() -> None:
    facts = facts_of()

    def kept(n_prompts: int, seed: int = 0) -> dict[int, int]:
        plan = Plan.of(facts, ["a"] * n_prompts, seed=seed)
        return Accumulation(facts, plan).sites["embedding"].kept.slots

    assert kept(128) == {prompt: prompt for prompt in range(128)}
    sample = kept(300)
    assert list(sample) == sorted(sample)
    assert set(sample) < set(range(300))
    assert list(sample.values()) == list(range(128))
    assert kept(300) == sample != kept(300, seed=1)
