"""Every token of a few prompts: whose, against the oracle, and the way through memory, streams and shards."""

from __future__ import annotations

import copy
from math import exp, inf, isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import lazarus
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer, word_tokenizer
from lazarus.activation import runplan
from lazarus.errors import UsageError
from lazarus.metrics import NextTokens, Outcomes, TokenOutputs, compare_logits, margin_motion
from lazarus.tokens import token_text
from reference import block_outputs, cosine, output_metrics

IDS = [[5, 17, 80, 3, 41], [9], [12, 77, 31], [64, 2, 50, 23, 8, 91, 36, 70, 19], [44, 6], [9]]
TEXTS = [" ".join(f"t{i}" for i in ids) for ids in IDS]


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    base = tiny_llama()
    return base, perturbed(base)


def compare(models: Any, texts: Any = TEXTS, **options: Any) -> lazarus.ActivationDiff:
    base, finetuned = models
    options = {"position": "all", "batch_tokens": 16, **options}
    return lazarus.activation_diff(base, finetuned, texts, tokenizer=word_tokenizer(), **options)


def traces(diff: lazarus.ActivationDiff) -> dict[int, Any]:
    assert diff.record.tokens is not None
    return {trace.prompt_index: trace for trace in diff.record.tokens}


def test_each_token_has_the_oracles_divergence(models: Any) -> None:
    found = traces(compare(models, token_prompts="0,1,2,3,4,5"))
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    for prompt, ids in enumerate(IDS):
        base, finetuned = (block_outputs(model, model.model.layers, ids) for model in models)
        first = min(1, len(ids) - 1)  # position 0 is left out where there are more
        expected = 1 - np.stack([cosine(b, f) for b, f in zip(base, finetuned, strict=True)], axis=1)
        np.testing.assert_allclose(found[prompt].divergence, expected[first:], atol=1e-6)
        assert found[prompt].positions == list(range(first, len(ids)))
        assert found[prompt].tokens == [f"t{i}" for i in ids[first:]]


def test_the_mean_over_a_prompts_tokens_is_the_prompts_own_value(models: Any) -> None:
    diff = compare(models)
    for prompt, trace in traces(diff).items():
        own = diff.results.column("divergence")[prompt]
        np.testing.assert_allclose(np.mean(trace.divergence, axis=0), own, rtol=1e-14)


def test_auto_takes_the_most_divergent_and_no_repeats(models: Any) -> None:
    texts = [*TEXTS, *(f"t{i} t{i + 1}" for i in range(10, 30))]
    diff = compare(models, texts)
    largest = diff.results.column("divergence").max(axis=1)
    distinct = [i for i in range(len(texts)) if i != TEXTS.index("t9", 2)]
    expected = sorted(distinct, key=lambda i: (-largest[i], i))[:8]
    assert list(traces(diff)) == sorted(expected)
    assert "kept-tokens" not in diff.note_codes


def test_of_very_many_tokens_the_first_prompts_are_chosen_from(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runplan, "MOST_TRACED_TOKENS", 9)
    diff = compare(models)
    assert list(traces(diff)) == [0, 1, 2]
    assert any("the first 3 of 5 prompts" in note and "--token-prompts" in note for note in diff.notes)
    assert list(traces(compare(models, token_prompts="3"))) == [3]
    monkeypatch.setattr(runplan, "MOST_TRACED_TOKENS", 4)
    none = compare(models)
    assert none.record.tokens is None
    assert any("no prompt's tokens are kept" in note for note in none.notes)


@pytest.mark.parametrize("options", [{"position": "last"}, {"position": "mean"}, {"token_prompts": "none"}])
def test_without_every_token_or_the_wish_there_is_none(models: Any, options: dict[str, Any]) -> None:
    assert compare(models, **options).record.tokens is None


def test_models_of_other_widths_have_none(models: Any) -> None:
    texts = [f"t{i} t{i + 1}" for i in range(3, 60)]
    assert compare((models[0], tiny_llama(hidden_size=48)), texts, token_prompts="0").record.tokens is None


def test_streams_keep_the_same(models: Any, tmp_path: Path) -> None:
    base, finetuned = (
        save_model(tmp_path / name, model, word_tokenizer())
        for name, model in zip(("base", "finetuned"), models, strict=True)
    )
    resident, stream = (
        lazarus.activation_diff(base, finetuned, TEXTS, position="all", batch_tokens=16, memory=memory)
        for memory in ("resident", "stream")
    )
    assert stream.record.settings.memory == "stream"
    assert traces(stream) == traces(resident)


def test_a_shared_prefix_leaves_the_tokens_as_they_are(models: Any) -> None:
    common = " ".join(f"t{i}" for i in range(40, 72))
    texts = [f"{common} t{i} t{i + 3}" for i in range(30)]
    with_prefix = compare(models, texts, token_prompts="4", batch_tokens=256)
    assert any("first 32 tokens, the same in all prompts, ran once" in n for n in with_prefix.notes)
    alone = traces(compare(models, texts[4:5], token_prompts="0"))[0]
    found = traces(with_prefix)[4]
    assert (found.positions, found.tokens) == (alone.positions, alone.tokens)
    np.testing.assert_allclose(found.divergence, alone.divergence, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"token_prompts": "0,6"}, "no prompt 6 among 6"),
        ({"token_prompts": "-1"}, "auto, none, or numbers"),
        ({"token_prompts": "first"}, "auto, none, or numbers"),
        ({"token_prompts": "0", "position": "last"}, "`position` is last"),
    ],
)
def test_prompts_that_are_none_are_refused(models: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        compare(models, **options)


def next_token_logits(model: PreTrainedModel, ids: list[int]) -> Any:
    """Every token's next-token logits, in float64, by the model itself."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().numpy()


def test_each_tokens_output_is_the_oracles(models: Any) -> None:
    found = traces(compare(models, token_prompts="0,1,2,3,4,5"))
    for prompt, ids in enumerate(IDS):
        trace, first = found[prompt], min(1, len(ids) - 1)
        b, f = (next_token_logits(model, ids)[first:] for model in models)
        kl = [float("nan") if value is None else value for value in trace.kl]
        np.testing.assert_allclose(kl, output_metrics(b, f)["kl_base_finetuned"], rtol=1e-5, atol=1e-9)
        assert trace.agrees == (b.argmax(-1) == f.argmax(-1)).tolist()
        for choices, logits in ((trace.base_choices, b), (trace.finetuned_choices, f)):
            probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
            for each, row in zip(choices, probabilities, strict=True):
                assert [c.token_id for c in each] == np.argsort(-row)[:3].tolist()
                np.testing.assert_allclose([c.probability for c in each], np.sort(row)[:-4:-1], rtol=1e-5)
                assert [c.token for c in each] == [token_text(word_tokenizer(), c.token_id) for c in each]


def test_the_mean_of_the_tokens_kl_is_that_of_the_output(models: Any) -> None:
    diff = compare(models, token_prompts="0,1,2,3,4,5")
    own = [np.mean(trace.kl) for trace in traces(diff).values()]
    assert diff.record.output is not None
    assert np.mean(own) == pytest.approx(diff.record.output.kl_base_finetuned, rel=1e-12)


def test_the_parting_is_the_first_place_where_first_choices_differ(models: Any) -> None:
    for prompt, trace in traces(compare(models, token_prompts="0,1,2,3,4,5")).items():
        b, f = (next_token_logits(model, IDS[prompt])[min(1, len(IDS[prompt]) - 1) :] for model in models)
        at = int(np.argmax(b.argmax(-1) != f.argmax(-1)))
        ours, theirs = b[at].argmax(), f[at].argmax()
        assert ours != theirs
        assert trace.parting.position == trace.positions[at]
        assert trace.parting.token_base == token_text(word_tokenizer(), int(ours))
        assert trace.parting.token_finetuned == token_text(word_tokenizer(), int(theirs))
        np.testing.assert_allclose(trace.parting.margin_base, b[at, ours] - b[at, theirs], rtol=1e-4)
        np.testing.assert_allclose(trace.parting.margin_finetuned, f[at, theirs] - f[at, ours], rtol=1e-4)
        assert trace.parting.cause == "change"


def test_models_that_say_the_same_do_not_part(models: Any) -> None:
    for trace in traces(compare((models[0], models[0]))).values():
        assert trace.parting is None
        assert trace.kl == [0.0] * len(trace.tokens)
        assert trace.agrees == [True] * len(trace.tokens)


def test_without_the_noise_the_cause_of_a_parting_is_not_known(models: Any) -> None:
    partings = [trace.parting for trace in traces(compare(models, no_noise_floor=True)).values()]
    assert partings
    assert {(p.noise_margin, p.cause) for p in partings} == {(None, None)}


def tied(base: PreTrainedModel, prompt: list[int], by: float) -> PreTrainedModel:
    """A copy whose second choice after a prompt is its first one's twin, above it by `by` logits."""
    model = copy.deepcopy(base)
    first, second = next_token_logits(base, prompt)[-1].argsort()[:-3:-1].tolist()
    with torch.no_grad():
        state = block_inputs_of_head(base, prompt)
        model.lm_head.weight[second] = model.lm_head.weight[first] + by * state / state.square().sum()
    return model


def block_inputs_of_head(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """What the head reads after the last token."""
    with torch.no_grad():
        states: torch.Tensor = model.model(input_ids=torch.tensor([ids])).last_hidden_state
    return states[0, -1]


@pytest.mark.parametrize(
    ("by", "dtype", "cause"),
    [(0.015, torch.bfloat16, "noise"), (0.015, torch.float32, "change"), (1.0, torch.bfloat16, "change")],
)
def test_a_planted_near_tie_is_told_from_a_planted_change(
    models: Any, by: float, dtype: torch.dtype, cause: str
) -> None:
    base, ids = models[0], [5, 17]
    pair = tied(base, ids, -by).to(dtype), tied(base, ids, by).to(dtype)
    diff = compare(pair, ["t5 t17"], token_prompts="0")
    parting = traces(diff)[0].parting
    assert parting.position == 1
    assert parting.noise_margin > 0
    assert (parting.margin_base <= parting.noise_margin) == (cause == "noise")
    assert parting.cause == cause


def test_of_two_vocabularies_a_choice_that_only_one_has_is_no_agreement() -> None:
    outcomes = Outcomes(torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1]), (4, 3))
    base = torch.tensor([[0.0, 1.0, 2.0, 5.0], [3.0, 1.0, 2.0, 0.0], [nan, 0.0, 0.0, 0.0]])
    finetuned = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    prompts = torch.tensor([7, 7, 7])
    kept = TokenOutputs([7])
    kept.update(prompts, (base, finetuned), compare_logits(base, finetuned, outcomes), outcomes)
    own, same, broken = (NextTokens.of(row) for row in kept.of_prompt[7])
    # Base's first choice, 3, is a token of its own; the fine-tuned model's, 1, is base's 2.
    assert own.agrees is False
    assert own.margins == (3.0, inf)
    assert [i for i, _ in own.choices[0]] == [3, 2, 1]
    assert same.agrees is True
    assert same.margins == (0.0, 0.0)
    np.testing.assert_allclose(same.choices[1][0], [2, exp(4) / (exp(4) + exp(2) + exp(1))], rtol=1e-6)
    assert (broken.agrees, broken.choices) == (None, ([], []))


def test_parts_of_a_prompt_and_shards_are_the_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    base, finetuned = (torch.randn(6, 20, generator=generator) for _ in range(2))
    prompts = torch.tensor([4, 4, 2, 2, 2, 9])
    parts, whole = [TokenOutputs([2, 4]) for _ in range(3)], TokenOutputs([2, 4])
    for kept, rows in ((whole, slice(0, 6)), (parts[0], slice(0, 3)), (parts[0], slice(3, 6))):
        values = compare_logits(base[rows], finetuned[rows])
        kept.update(prompts[rows], (base[rows], finetuned[rows]), values, None)
    for part in (parts[0].state(), parts[2].state()):
        parts[1].add(part)
    for kept in parts[:2]:
        assert sorted(kept.of_prompt) == [2, 4]
        for prompt, expected in whole.of_prompt.items():
            np.testing.assert_array_equal(kept.of_prompt[prompt], expected)


def test_the_margins_motion_is_of_the_two_likeliest_tokens() -> None:
    base = torch.tensor([[3.0, 2.0, 0.0], [1.0, 5.0, 2.0], [nan, 0.0, 0.0]])
    moved = torch.tensor([[3.5, 2.25, 9.0], [1.0, 5.0, 3.5], [0.0, 0.0, 0.0]])
    assert margin_motion(base, moved) == 1.5
    assert isnan(margin_motion(base[2:], moved[2:]))


def test_a_part_of_a_character_is_told_from_another() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    assert [tokenizer.decode([i]) for i in ids] == ["\ufffd", "\ufffd"]
    assert [token_text(tokenizer, i) for i in ids] == ["<0xC3>", "<0xA9>"]
    assert token_text(tokenizer, tokenizer(" is")["input_ids"][-1]) == " is"
