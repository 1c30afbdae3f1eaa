"""Where two models' first choices part: against greedy decoding, and read by compare there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import lazarus
from factories import notes_of, perturbed, tiny_llama, tiny_tokenizer, word_tokenizer
from lazarus.errors import NoDataError, UsageError
from lazarus.lens import compare
from lazarus.render.activation.summary import summary_lines

PROMPTS = [[5 + i, 17 + 2 * i % 50, 80 - i] for i in range(40)]
N_NEW = 12


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    base = tiny_llama(vocab_size=100, eos_token_id=None)
    return base, perturbed(base, 0.03)


def generated(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """The tokens that greedy decoding adds to a prompt."""
    given = torch.tensor([ids])
    made: Any = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=N_NEW, do_sample=False
    )
    return [int(i) for i in made[0, len(ids) :]]


def spelled(ids: list[int]) -> str:
    return " ".join(f"t{i}" for i in ids)


def parted_at(ours: list[int], theirs: list[int]) -> int | None:
    """The number of the first new token that differs."""
    return next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


def test_first_choices_part_where_greedy_decoding_does(models: Any) -> None:
    answers = [[generated(model, ids) for model in models] for ids in PROMPTS]
    expected = [parted_at(*each) for each in answers]
    assert len({n for n in expected if n is not None}) > 3
    # Base's own answer is read by both.
    rows = [
        {"prompt": f"{spelled(ids)} ", "response": spelled(ours)}
        for ids, (ours, _) in zip(PROMPTS, answers, strict=True)
    ]
    every = ",".join(map(str, range(len(rows))))
    diff = lazarus.activation_diff(
        models[0], models[1], rows, tokenizer=word_tokenizer(), position="response", token_prompts=every
    )
    assert diff.record.tokens is not None
    for trace, ids, n in zip(diff.record.tokens, PROMPTS, expected, strict=True):
        assert trace.positions == list(range(len(ids) - 1, len(ids) + N_NEW))
        # New token n is chosen after the one before it; what follows the last one is not known.
        last = len(ids) + N_NEW - 1
        found = trace.parting.position if trace.parting and trace.parting.position < last else None
        assert found == (None if n is None else len(ids) - 1 + n)


def test_compare_looks_for_the_parting_in_the_response(models: Any) -> None:
    ids = next(ids for ids in PROMPTS if parted_at(*(generated(model, ids) for model in models)))
    ours, theirs = (generated(model, ids) for model in models)
    n = parted_at(ours, theirs)
    assert n is not None
    row = {"prompt": f"{spelled(ids)} ", "response": spelled(ours)}
    found = compare(models[0], models[1], row, tokenizer=word_tokenizer(), at="parting").record
    assert found.position == len(ids) - 1 + n
    ends = [model.layers[-1].top[0].token_id for model in (found.model1, found.model2)]
    assert ends == [ours[n], theirs[n]]


def test_compare_reads_the_first_place_where_first_choices_part(models: Any) -> None:
    text = spelled(PROMPTS[0] + generated(models[0], PROMPTS[0]))
    trace = lazarus.activation_diff(
        models[0], models[1], [text], tokenizer=word_tokenizer(), position="all"
    ).record.tokens
    assert trace is not None
    parting = trace[0].parting
    assert parting is not None
    found = compare(models[0], models[1], text, tokenizer=word_tokenizer(), at="parting").record
    assert found.settings.at == "parting"
    assert found.position == parting.position
    assert found.prompt == text
    assert [m.layers[-1].top[0].token.strip() for m in (found.model1, found.model2)] == [
        parting.token_base,
        parting.token_finetuned,
    ]
    cut = " ".join(text.split()[: parting.position + 1])
    alone = compare(models[0], models[1], cut, tokenizer=word_tokenizer()).record
    assert found.layers == alone.layers
    assert alone.settings.at == "last"


def test_where_nothing_parts_the_last_token_is_read_and_a_note_says_so(models: Any) -> None:
    comparison = compare(models[0], models[0], "t5 t6 t7", tokenizer=word_tokenizer(), at="parting")
    assert comparison.record.position == 2
    assert len(notes_of(comparison, "no-parting")) == 1


def test_prompts_of_other_ids_have_no_common_place(tmp_path: Any) -> None:
    for name, tokenizer in (("words", word_tokenizer()), ("bytes", tiny_tokenizer())):
        tiny_llama().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(UsageError, match="as other ids"):
        compare(tmp_path / "words", tmp_path / "bytes", "t5 t6", at="parting")


def test_a_place_that_is_none_is_refused(models: Any) -> None:
    with pytest.raises(UsageError, match="parting"):
        compare(models[0], models[1], "t5", tokenizer=word_tokenizer(), at="first")


def test_logits_that_are_not_finite_are_not_taken_for_agreement(models: Any) -> None:
    broken = perturbed(models[0])
    with torch.no_grad():
        broken.lm_head.weight[7] = float("nan")
    texts = ["t5 t6 t7", "t9 t3 t1 t2"]
    diff = lazarus.activation_diff(
        models[0], broken, texts, tokenizer=word_tokenizer(), position="all", attribute="blocks"
    )
    assert diff.record.attribution is None
    assert len(notes_of(diff, "no-attribution")) == 1
    assert not [line for line in summary_lines(diff.record) if line.startswith("Token by token")]
    with pytest.raises(NoDataError, match="finite at no layer"):
        compare(models[0], broken, texts[0], tokenizer=word_tokenizer(), at="parting")
