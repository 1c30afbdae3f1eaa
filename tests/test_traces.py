"""Every token of a few prompts: whose, against the oracle, and the way through memory, streams and shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

import lazarus
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer, word_tokenizer
from lazarus.activation import runplan
from lazarus.errors import UsageError
from lazarus.tokens import token_text
from reference import block_outputs, cosine

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


def test_a_part_of_a_character_is_told_from_another() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    assert [tokenizer.decode([i]) for i in ids] == ["\ufffd", "\ufffd"]
    assert [token_text(tokenizer, i) for i in ids] == ["<0xC3>", "<0xA9>"]
    assert token_text(tokenizer, tokenizer(" is")["input_ids"][-1]) == " is"
