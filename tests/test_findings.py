"""Every number of a result against NumPy in float64, from states that no model made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lazarus import Accumulation, ModelFacts, PairFacts, Plan, StatePair, WeightFacts, conclude
from lazarus.activation.findings import Findings
from lazarus.facts import Rounded
from lazarus.results import ActivationDiffRecord, NotCompared
from lazarus.statistics import FACTOR

Floats = NDArray[np.float64]

N_PROMPTS, N_LAYERS, WIDTH, VOCABULARY = 6, 4, 8, 12
ROWS = np.repeat(np.arange(N_PROMPTS), [1, 2, 1, 3, 2, 1])
CHANGE = {"embedding": 0.0, 0: 0.0, 1: 0.3, 2: 0.9, 3: 0.5, "final_norm": 0.5}
LOCAL = {0: 0.0, 1: 0.02, 2: 0.4, 3: 0.1}
NOISE = (1e-5, 3e-5)


def drawn() -> tuple[dict[Any, Floats], dict[Any, Floats], dict[Any, Floats], list[dict[Any, Floats]]]:
    """States of base and of the fine-tuned model, what its blocks make of base's, and two trials of noise."""
    random = np.random.default_rng(0)

    def near(states: Floats, size: float) -> Floats:
        return states + size * random.normal(size=states.shape)

    common = random.normal(size=WIDTH)
    base = {site: common + random.normal(size=(len(ROWS), WIDTH)) for site in CHANGE}
    finetuned = {site: near(base[site], size) for site, size in CHANGE.items()}
    local = {layer: near(base[layer], size) for layer, size in LOCAL.items()}
    trials = [{site: near(base[site], size) for site in CHANGE} for size in NOISE]
    return base, finetuned, local, trials


BASE, FINETUNED, BY_BLOCK, TRIALS = drawn()
BASE_LOGITS, FINETUNED_LOGITS = np.random.default_rng(1).normal(size=(2, N_PROMPTS, VOCABULARY)) * 3


def facts(**changes: Any) -> PairFacts:
    base, finetuned = (
        replace(ModelFacts.of(name, N_LAYERS, WIDTH, has_final_norm=True), uses_layer_norm=True, **changes)
        for name in ("one", "two")
    )
    return PairFacts(base, finetuned)


def accumulated(
    pair: PairFacts | None = None,
    *,
    base: Any = None,
    finetuned: Any = None,
    trials: int = 2,
    logits: bool = True,
    **settings: Any,
) -> Accumulation:
    """Everything that was drawn, taken in; with other states of a model, or fewer trials."""
    pair, ours, theirs = pair or facts(), {**BASE, **(base or {})}, {**FINETUNED, **(finetuned or {})}
    plan = Plan.of(pair, [f"prompt {i}" for i in range(N_PROMPTS)], **settings)
    plan = replace(plan, prompts=[_grouped(prompt) for prompt in plan.prompts])
    seen = Accumulation(pair, plan)
    tensor = torch.from_numpy
    for site in pair.sites:
        local = tensor(BY_BLOCK[site]) if site in BY_BLOCK else None
        seen.take([StatePair(site, tensor(ROWS), tensor(ours[site]), tensor(theirs[site]), local)])
        for number, trial in enumerate(TRIALS[:trials]):
            seen.take([StatePair.of(site, ROWS, BASE[site], trial[site], trial=number)])
    if logits:
        seen.take([StatePair.of("logits", range(N_PROMPTS), BASE_LOGITS, FINETUNED_LOGITS)])
    return seen


def _grouped(prompt: Any) -> Any:
    return msgspec.structs.replace(prompt, group="odd" if prompt.index % 2 else "even")


@pytest.fixture(scope="module")
def record() -> ActivationDiffRecord:
    return conclude(accumulated()).record


def by_prompt(values: Floats) -> Floats:
    """The mean over each prompt's rows."""
    return np.array([values[prompt == ROWS].mean() for prompt in range(N_PROMPTS)])


def cosines(b: Floats, f: Floats) -> Floats:
    found: Floats = (b * f).sum(1) / np.linalg.norm(b, axis=1) / np.linalg.norm(f, axis=1)
    return found


def centred(states: Floats) -> Floats:
    found: Floats = states - states.mean(axis=1, keepdims=True)
    return found


def relative_l2(b: Floats, f: Floats) -> Floats:
    found: Floats = np.linalg.norm(f - b, axis=1) / np.linalg.norm(b, axis=1)
    return found


def units(states: Floats) -> Floats:
    found: Floats = states / np.linalg.norm(states, axis=1, keepdims=True)
    return found


def of_site(record: ActivationDiffRecord, site: Any) -> Any:
    if isinstance(site, int):
        return record.layers[site]
    return next(found for found in record.sites if found.name == site)


@pytest.mark.parametrize("site", CHANGE)
def test_the_means_of_a_site_are_those_of_numpy(record: ActivationDiffRecord, site: Any) -> None:
    found, b, f = of_site(record, site), BASE[site], FINETUNED[site]
    cosine = by_prompt(cosines(b, f)).mean()
    assert found.cosine_similarity == pytest.approx(cosine, abs=1e-12)
    assert found.divergence == pytest.approx(1 - cosine, abs=1e-12)
    assert found.flagged == (1 - cosine > 0.1)
    assert found.n_prompts == N_PROMPTS
    assert found.relative_l2 == pytest.approx(by_prompt(relative_l2(b, f)).mean(), abs=1e-12)
    ratio = np.linalg.norm(f, axis=1) / np.linalg.norm(b, axis=1)
    assert found.norm_ratio == pytest.approx(by_prompt(ratio).mean(), rel=1e-12)
    centred_cosine = by_prompt(cosines(centred(b), centred(f))).mean()
    assert found.centered_cosine_similarity == pytest.approx(centred_cosine, abs=1e-12)


@pytest.mark.parametrize("site", CHANGE)
def test_what_stands_beside_them_is_that_of_numpy(record: ActivationDiffRecord, site: Any) -> None:
    found = of_site(record, site)
    trials = [(relative_l2(BASE[site], t[site]), 1 - cosines(BASE[site], t[site])) for t in TRIALS]
    largest = [max(by_prompt(trial[which]).mean() for trial in trials) for which in (0, 1)]
    assert found.noise_floor == pytest.approx(FACTOR * largest[0], rel=1e-9)
    assert found.noise_floor_divergence == pytest.approx(FACTOR**2 * largest[1], rel=1e-6)
    unrelated = (units(BASE[site]) @ units(FINETUNED[site]).T)[ROWS[:, None] != ROWS].mean()
    assert found.unrelated_similarity == pytest.approx(unrelated, rel=1e-9)
    assert found.normalized_divergence == pytest.approx(found.divergence / (1 - unrelated), abs=1e-12)


@pytest.mark.parametrize("site", [1, 2, 3, "final_norm"])
def test_the_interval_holds_the_mean(record: ActivationDiffRecord, site: Any) -> None:
    found = of_site(record, site)
    low, high = found.interval
    assert 0 <= low < found.divergence < high <= 2
    assert high - low > by_prompt(1 - cosines(BASE[site], FINETUNED[site])).std() / np.sqrt(N_PROMPTS)


@pytest.mark.parametrize("site", CHANGE)
def test_the_share_of_the_largest_dimensions_is_that_of_numpy(
    record: ActivationDiffRecord, site: Any
) -> None:
    found, b, f = of_site(record, site), BASE[site], FINETUNED[site]
    products = b * f / (np.linalg.norm(b, axis=1) * np.linalg.norm(f, axis=1))[:, None]
    mean = np.mean([products[prompt == ROWS].mean(axis=0) for prompt in range(N_PROMPTS)], axis=0)
    sorted_shares = np.sort(mean)[::-1] / mean.sum()
    assert found.top1_share == pytest.approx(sorted_shares[0], rel=1e-9)
    assert found.top3_share == pytest.approx(sorted_shares[:3].sum(), rel=1e-9)


@pytest.mark.parametrize("layer", LOCAL)
def test_the_local_change_is_that_of_numpy(record: ActivationDiffRecord, layer: int) -> None:
    local, b, f = record.layers[layer].local, BASE[layer], BY_BLOCK[layer]
    assert local is not None
    assert local.relative_l2 == pytest.approx(by_prompt(relative_l2(b, f)).mean(), abs=1e-12)
    assert local.cosine_similarity == pytest.approx(by_prompt(cosines(b, f)).mean(), abs=1e-12)


def test_outside_the_blocks_there_is_no_local_change(record: ActivationDiffRecord) -> None:
    assert [site.local for site in record.sites] == [None, None]


def test_each_row_is_that_of_numpy(record: ActivationDiffRecord) -> None:
    def table(values: Any) -> Floats:
        return np.stack([by_prompt(values(layer)) for layer in range(N_LAYERS)], axis=1)

    expected = {
        "cosine_similarity": table(lambda i: cosines(BASE[i], FINETUNED[i])),
        "divergence": table(lambda i: 1 - cosines(BASE[i], FINETUNED[i])),
        "relative_l2": table(lambda i: relative_l2(BASE[i], FINETUNED[i])),
        "norm_ratio": table(lambda i: np.linalg.norm(FINETUNED[i], axis=1) / np.linalg.norm(BASE[i], axis=1)),
        "centered_cosine_similarity": table(lambda i: cosines(centred(BASE[i]), centred(FINETUNED[i]))),
        "local_relative_l2": table(lambda i: relative_l2(BASE[i], BY_BLOCK[i])),
        "local_cosine_similarity": table(lambda i: cosines(BASE[i], BY_BLOCK[i])),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(record.results.column(name), values, atol=1e-12, err_msg=name)
    assert record.results.prompts == [f"prompt {i}" for i in range(N_PROMPTS)]


def test_the_summary_says_what_the_layers_say(record: ActivationDiffRecord) -> None:
    summary, divergences = record.summary, [layer.divergence or 0.0 for layer in record.layers]
    flagged = [layer.layer for layer in record.layers if layer.flagged]
    assert summary.most_divergent_layer == int(np.argmax(divergences)) == 2
    assert summary.max_divergence == max(divergences)
    assert (summary.first_flagged_layer, summary.n_flagged_layers) == (flagged[0], len(flagged)) == (2, 1)
    assert summary.verdict == "changed"
    assert summary.onset_layer == 1
    assert summary.most_changed_block == 2
    assert (summary.n_prompts_left_out, summary.n_outputs_left_out) == (0, 0)


def test_the_first_of_several_flagged_layers_is_named() -> None:
    summary = conclude(accumulated(threshold=1e-3)).summary
    assert (summary.first_flagged_layer, summary.n_flagged_layers) == (1, 3)


def test_the_threshold_is_itself_not_flagged(record: ActivationDiffRecord) -> None:
    limit = record.layers[2].divergence
    again = conclude(accumulated(threshold=limit)).record
    assert not again.layers[2].flagged
    assert again.summary.n_flagged_layers == 0
    assert again.summary.first_flagged_layer is None


def test_the_output_is_that_of_numpy(record: ActivationDiffRecord) -> None:
    def log_softmax(logits: Floats) -> Floats:
        found: Floats = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return found

    p, q = log_softmax(BASE_LOGITS), log_softmax(FINETUNED_LOGITS)
    m = np.log((np.exp(p) + np.exp(q)) / 2)
    found = record.output
    assert found is not None
    assert found.kl_base_finetuned == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-9)
    assert found.kl_finetuned_base == pytest.approx((np.exp(q) * (q - p)).sum(1).mean(), rel=1e-9)
    js = ((np.exp(p) * (p - m)).sum(1) + (np.exp(q) * (q - m)).sum(1)).mean() / 2
    assert found.js == pytest.approx(js, rel=1e-9)
    assert found.top1_agreement == (p.argmax(1) == q.argmax(1)).mean()
    ranks = [1 + (row > row[choice]).sum() for row, choice in zip(p, q.argmax(1), strict=True)]
    assert found.base_rank_of_finetuned_top1 == pytest.approx(np.mean(ranks))
    assert found.logits_relative_l2 == pytest.approx(relative_l2(BASE_LOGITS, FINETUNED_LOGITS).mean())


def test_each_group_has_its_curve(record: ActivationDiffRecord) -> None:
    assert record.groups is not None
    divergence = record.results.column("divergence")
    for start, curve in enumerate(record.groups.curves):
        assert (curve.group, curve.n_prompts) == (("even", "odd")[start], 3)
        np.testing.assert_allclose(np.array(curve.divergence, float), divergence[start::2].mean(axis=0))
    (contrast,) = record.groups.contrasts
    assert (contrast.group_a, contrast.group_b) == ("even", "odd")
    logs = np.log(divergence[:, 1:])
    found = np.array(contrast.log_ratio[1:], dtype=np.float64)
    np.testing.assert_allclose(found, logs[::2].mean(axis=0) - logs[1::2].mean(axis=0), atol=1e-6)
    assert contrast.log_ratio[0] is None
    assert contrast.layer == 1 + int(np.argmax(found))


SAME = {site: BASE[site] for site in CHANGE}
WITHIN = {site: TRIALS[0][site] for site in CHANGE}
MERGED = Rounded("two", "one", "bfloat16", 3, None)


@pytest.mark.parametrize(
    ("states", "trials", "rounding", "verdict"),
    [
        (SAME, 2, None, "identical"),
        (SAME, 0, None, "identical"),
        (WITHIN, 2, None, "within_noise"),
        (WITHIN, 2, MERGED, "within_noise"),
        (FINETUNED, 2, None, "changed"),
        (FINETUNED, 2, MERGED, "within_rounding"),
        (FINETUNED, 0, None, None),
        ({**SAME, "final_norm": FINETUNED["final_norm"]}, 2, None, "changed"),
        ({**SAME, "embedding": WITHIN["embedding"]}, 2, None, "within_noise"),
    ],
)
def test_the_verdict(states: Any, trials: int, rounding: Rounded | None, verdict: str | None) -> None:
    seen = accumulated(finetuned=states, trials=trials, logits=False)
    assert conclude(seen, WeightFacts(rounding=rounding)).summary.verdict == verdict


def with_nan(states: dict[Any, Floats], prompt: int) -> dict[Any, Floats]:
    """The states, those of a prompt at layer 1 not finite."""
    broken = states[1].copy()
    broken[prompt == ROWS] = np.nan
    return {**states, 1: broken}


def with_logits(seen: Accumulation, base: Floats, finetuned: Floats) -> Accumulation:
    """What was seen, and these logits of every prompt, with noise in both trials."""
    seen.take([StatePair.of("logits", range(N_PROMPTS), base, finetuned)])
    for number in (0, 1):
        near = BASE_LOGITS + NOISE[number]
        seen.take([StatePair.of("logits", range(N_PROMPTS), BASE_LOGITS, near, trial=number)])
    return seen


@pytest.mark.parametrize("rounding", [None, MERGED])
def test_a_state_that_one_model_alone_has_finite_is_a_change(rounding: Rounded | None) -> None:
    seen = accumulated(finetuned=with_nan(SAME, 3), logits=False)
    summary = conclude(seen, WeightFacts(rounding=rounding)).summary
    assert (summary.verdict, summary.n_prompts_left_out) == ("changed", 1)
    assert conclude(seen).layers[1].n_prompts == N_PROMPTS - 1
    assert conclude(seen).layers[0].n_prompts == N_PROMPTS


@pytest.mark.parametrize(("states", "verdict"), [(SAME, None), (FINETUNED, "changed")])
def test_a_state_that_is_finite_in_neither_keeps_a_verdict_from_being_whole(
    states: dict[Any, Floats], verdict: str | None
) -> None:
    """It proves no change, but nothing may be called unchanged, or changed by rounding alone."""
    seen = accumulated(base=with_nan(BASE, 0), finetuned=with_nan(states, 0), logits=False)
    summary = conclude(seen, WeightFacts(rounding=MERGED)).summary
    assert (summary.verdict, summary.n_prompts_left_out) == (verdict, 1)


def test_logits_that_are_not_finite_keep_a_verdict_from_being_whole() -> None:
    logits = BASE_LOGITS.copy()
    logits[2] = np.nan
    seen = with_logits(accumulated(finetuned=SAME, logits=False), logits, logits)
    summary = conclude(seen, WeightFacts(rounding=MERGED)).summary
    assert (summary.verdict, summary.n_outputs_left_out, summary.n_prompts_left_out) == (None, 1, 0)


def test_the_logits_of_the_other_prompts_are_compared_where_those_of_one_are_not_finite() -> None:
    logits = FINETUNED_LOGITS.copy()
    logits[2] = np.nan
    seen = with_logits(accumulated(finetuned=SAME, logits=False), BASE_LOGITS, logits)
    record = conclude(seen).record
    assert (record.summary.verdict, record.summary.n_outputs_left_out) == ("changed", 1)
    assert record.output is not None
    expected = np.delete(relative_l2(BASE_LOGITS, FINETUNED_LOGITS), 2).mean()
    assert record.output.logits_relative_l2 == pytest.approx(expected)


def test_a_token_that_one_model_alone_can_give_is_a_change() -> None:
    logits = BASE_LOGITS.copy()
    logits[0, 3] = -np.inf
    seen = with_logits(accumulated(finetuned=SAME, logits=False), BASE_LOGITS, logits)
    assert conclude(seen).summary.verdict == "changed"


def test_states_of_another_width_are_a_change() -> None:
    pair = facts()
    wider = replace(pair, finetuned=replace(pair.finetuned, width=WIDTH + 2))
    states = {site: np.pad(BASE[site], [(0, 0), (0, 2)]) for site in CHANGE}
    seen = accumulated(wider, finetuned=states, logits=False)
    assert conclude(seen).summary.verdict == "changed"
    assert not Findings(seen).may_be_rounding


def deeper() -> PairFacts:
    """A pair of which the fine-tuned model has one block more."""
    pair = facts()
    info = msgspec.structs.replace(pair.finetuned.info, n_layers=N_LAYERS + 1)
    return replace(pair, finetuned=replace(pair.finetuned, info=info))


def test_rounding_may_explain_a_change_that_all_prompts_show_in_two_models_of_one_shape() -> None:
    def may_be_rounding(pair: PairFacts | None = None, **states: Any) -> bool:
        return Findings(accumulated(pair, logits=False, **states)).may_be_rounding

    assert may_be_rounding()
    assert not may_be_rounding(finetuned=WITHIN)
    assert not may_be_rounding(deeper())
    assert not may_be_rounding(finetuned=with_nan(FINETUNED, 0))
    assert not may_be_rounding(base=with_nan(BASE, 0), finetuned=with_nan(FINETUNED, 0))
    logits = FINETUNED_LOGITS.copy()
    logits[2] = np.nan
    seen = with_logits(accumulated(logits=False), BASE_LOGITS, logits)
    assert not Findings(seen).may_be_rounding


def test_logits_that_differ_are_a_change_where_no_state_differs() -> None:
    seen = with_logits(accumulated(finetuned=SAME, logits=False), BASE_LOGITS, FINETUNED_LOGITS)
    record = conclude(seen).record
    assert record.summary.verdict == "changed"
    assert record.output is not None
    largest = relative_l2(BASE_LOGITS, BASE_LOGITS + NOISE[1]).mean()
    assert record.output.noise_floor == pytest.approx(FACTOR * largest, rel=1e-6)


@pytest.mark.parametrize(
    ("identical", "differs", "expected"),
    [
        (True, (), True),
        (None, (), None),
        (False, (), False),
        (True, (None,), None),
        (None, (None,), None),
        (False, (None,), False),
        (True, (True,), False),
        (None, (None, True), False),
    ],
)
def test_weights_are_identical_where_nothing_else_differs(
    identical: bool | None, differs: tuple[bool | None, ...], expected: bool | None
) -> None:
    held = [NotCompared(what=f"part {i}", n_tensors=1, differs=each) for i, each in enumerate(differs)]
    pair = facts()
    info = msgspec.structs.replace(pair.base.info, not_compared=held)
    seen = accumulated(replace(pair, base=replace(pair.base, info=info)), finetuned=SAME, logits=False)
    summary = conclude(seen, WeightFacts(identical=identical, causes=("the same file",))).summary
    assert summary.weights_identical is expected
    assert summary.causes == ([] if differs else ["the same file"])


@pytest.mark.parametrize(
    ("states", "causes"), [(SAME, ["the same file"]), (WITHIN, ["the same file"]), (FINETUNED, [])]
)
def test_what_has_not_changed_has_its_cause(states: dict[Any, Floats], causes: list[str]) -> None:
    seen = accumulated(finetuned=states, logits=False)
    assert conclude(seen, WeightFacts(causes=("the same file",))).summary.causes == causes


def test_a_rounding_is_the_cause_where_it_is_the_verdict() -> None:
    seen = accumulated(logits=False)
    assert conclude(seen, WeightFacts(rounding=MERGED, causes=("other",))).summary.causes == [str(MERGED)]


def test_what_the_noise_hides_has_no_onset() -> None:
    assert conclude(accumulated(trials=0)).summary.onset_layer is None
    assert conclude(accumulated(finetuned=WITHIN)).summary.onset_layer is None


def test_the_onset_needs_the_noise_of_every_layer_and_of_nothing_else() -> None:
    seen = accumulated()
    for trial in seen.noise:
        del trial["embedding"], trial["final_norm"]
    assert conclude(seen).summary.onset_layer == 1
    for trial in seen.noise:
        del trial[3]
    assert conclude(seen).summary.onset_layer is None


def test_noise_that_could_not_be_measured_is_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_findings.TRIALS", [{**SAME, 1: np.full_like(BASE[1], np.nan)}])
    record = conclude(accumulated(trials=1)).record
    layer = record.layers[1]
    assert (layer.noise_floor, layer.noise_floor_divergence) == (None, None)
    assert record.layers[2].noise_floor is not None
    assert record.summary.onset_layer is None


def test_too_few_prompts_have_no_interval_at_the_layer_where_the_others_were_not_compared() -> None:
    states = with_nan(with_nan(FINETUNED, 0), 1)
    layers = conclude(accumulated(finetuned=states)).layers
    assert layers[1].interval is None
    assert layers[2].interval is not None


def test_groups_are_not_contrasted_where_both_are_within_the_noise() -> None:
    record = conclude(accumulated(finetuned=WITHIN)).record
    assert record.groups is not None
    (contrast,) = record.groups.contrasts
    assert contrast.log_ratio == [None] * N_LAYERS
    assert (contrast.layer, contrast.p_value) == (None, None)


def test_the_local_change_is_that_of_the_prompts_whose_local_states_are_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("test_findings.BY_BLOCK", {**BY_BLOCK, 1: with_nan(BY_BLOCK, 0)[1]})
    local = conclude(accumulated()).record.layers[1].local
    assert local is not None
    expected = by_prompt(relative_l2(BASE[1], BY_BLOCK[1]))[1:].mean()
    assert local.relative_l2 == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("local", [{}, {layer: BASE[layer] for layer in LOCAL}], ids=["none", "same"])
def test_without_a_local_change_there_is_no_block_to_name(
    monkeypatch: pytest.MonkeyPatch, local: dict[int, Floats]
) -> None:
    monkeypatch.setattr("test_findings.BY_BLOCK", local)
    record = conclude(accumulated()).record
    assert record.summary.most_changed_block is None
    assert [layer.local is None for layer in record.layers] == [not local] * N_LAYERS
