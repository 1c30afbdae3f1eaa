"""Pairs that share less than their token ids: other tokenizers, other depths, other widths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

import lazarus
from factories import TEXT, perturbed, save_model, tiny_llama, tiny_tokenizer, word_tokenizer
from lazarus import activation_diff
from lazarus.errors import ShapeMismatchError, TokenizerMismatchError, UsageError
from lazarus.models import dissect
from reference import States, block_outputs, cosine, recorded_states, unbiased_cka

PROMPTS = ["Hello, how are you?", "What is AI?", TEXT[0][20:60], "the capital of France is Paris", "42"]
SIZES = (300, 270)
MANY = [[(7 * p + 11 * t * t + p * t) % 97 + 1 for t in range(2 + p % 5)] for p in range(52)]
MANY_TEXTS = [" ".join(f"t{i}" for i in ids) for ids in MANY]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models that read the same texts as other ids."""
    folder = tmp_path_factory.mktemp("apart")
    models = (tiny_llama(), perturbed(tiny_llama()))
    base, finetuned = (
        save_model(folder / str(size), model, tiny_tokenizer(size))
        for size, model in zip(SIZES, models, strict=True)
    )
    return base, finetuned


def compare(pair: tuple[Path, Path], **options: Any) -> lazarus.ActivationDiff:
    return activation_diff(*pair, PROMPTS, **options)


def readings() -> list[tuple[list[int], list[int]]]:
    """The ids of each prompt by both tokenizers."""
    one, other = (tiny_tokenizer(size) for size in SIZES)
    return [(one(text)["input_ids"], other(text)["input_ids"]) for text in PROMPTS]


def state(states: States, position: str) -> States:
    """The last token's, or the mean over all tokens but the first."""
    return states[-1:] if position == "last" else states[min(1, len(states) - 1) :].mean(0, keepdims=True)


# The same texts, each with the model's own tokenizer


def test_other_ids_are_refused_and_align_text_is_offered(apart: tuple[Path, Path]) -> None:
    assert all(ours != theirs for ours, theirs in readings()[:4])
    with pytest.raises(TokenizerMismatchError, match=r'different ids.*`align="text"`'):
        compare(apart)


@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
@pytest.mark.parametrize("position", ["last", "mean"])
def test_each_model_reads_its_own_ids(apart: tuple[Path, Path], position: str, batch_tokens: int) -> None:
    """The oracle runs each model on its own tokenizer's ids, one prompt at a time, unpadded."""
    models = (tiny_llama(), perturbed(tiny_llama()))
    diff = compare(apart, align="text", position=position, batch_tokens=batch_tokens)
    expected = []
    for ids in readings():
        b, f = (
            block_outputs(model, dissect(model).blocks, mine) for model, mine in zip(models, ids, strict=True)
        )
        expected.append(
            [cosine(state(x, position), state(y, position))[0] for x, y in zip(b, f, strict=True)]
        )
    np.testing.assert_allclose(diff.results.column("cosine_similarity"), expected, rtol=0, atol=1e-6)
    final = [
        cosine(*(state(recorded_states(m, mine)[-1], position) for m, mine in zip(models, ids, strict=True)))
        for ids in readings()
    ]
    assert diff.sites[-1].name == "final_norm"
    assert diff.sites[-1].cosine_similarity == pytest.approx(np.mean(final), abs=1e-6)


def test_the_record_has_both_readings_and_no_output(apart: tuple[Path, Path], tmp_path: Path) -> None:
    compare(apart, align="text").save(tmp_path / "diff.json")
    diff = lazarus.ActivationDiff.load(tmp_path / "diff.json")
    assert diff.record.settings.align == "text"
    assert diff.record.settings.position == "last"
    counts = [(prompt.n_tokens, prompt.finetuned_n_tokens) for prompt in diff.prompts]
    assert counts == [(len(ours), len(theirs)) for ours, theirs in readings()]
    assert any(ours != theirs for ours, theirs in counts)
    assert diff.record.output is None
    n_other = sum(ours != theirs for ours, theirs in readings())
    assert (
        f"each model read the texts with its own tokenizer: {n_other} of 5 prompts have other ids; "
        "next-token distributions over two vocabularies are not compared"
    ) in diff.notes
    assert "output-not-measured" not in diff.note_codes


@pytest.mark.parametrize("position", ["all", 0, -1])
def test_a_token_that_has_no_counterpart_is_a_usage_error(
    apart: tuple[Path, Path], position: str | int
) -> None:
    with pytest.raises(UsageError, match=rf"`align=.text.`.*`position` is {position}.*last or mean"):
        compare(apart, align="text", position=position)


@pytest.mark.parametrize("position", ["last", "mean"])
def test_with_one_tokenizer_text_is_ids(base_folder: Path, finetuned_folder: Path, position: str) -> None:
    pair = (base_folder, finetuned_folder)
    ids, text = (compare(pair, align=align, position=position) for align in ("ids", "text"))
    assert text.results == ids.results
    assert text.layers == ids.layers
    assert text.sites == ids.sites
    assert text.summary == ids.summary
    assert any("0 of 5 prompts have other ids" in note for note in text.notes)
    assert [prompt.finetuned_n_tokens for prompt in ids.prompts] == [None] * 5
    assert [p.finetuned_n_tokens for p in text.prompts] == [p.n_tokens for p in text.prompts]


def test_each_reading_must_fit_its_own_model(tmp_path: Path, base_folder: Path) -> None:
    """What is short enough for base may be too long for the other, whose tokenizer cuts it finer.

    Both read the same beginning of the text.
    """
    short = save_model(tmp_path / "short", tiny_llama(max_position_embeddings=24), tiny_tokenizer(SIZES[1]))
    prompts = ["Hello, how are you? What is AI?"]

    def fits(text: str) -> bool:
        return len(tiny_tokenizer(SIZES[1])(text)["input_ids"]) <= 24

    n_ours, n_theirs = (len(tiny_tokenizer(size)(prompts[0])["input_ids"]) for size in SIZES)
    assert n_ours < 24 < n_theirs
    with pytest.raises(lazarus.LazarusError, match=rf"has {n_theirs} tokens; the models' context is 24"):
        activation_diff(base_folder, short, prompts, align="text")
    diff = activation_diff(base_folder, short, prompts, align="text", truncate=True)
    kept = max(n for n in range(len(prompts[0])) if fits(prompts[0][:n]))
    lengths = [len(tiny_tokenizer(size)(prompts[0][:kept])["input_ids"]) for size in SIZES]
    assert [diff.prompts[0].n_tokens, diff.prompts[0].finetuned_n_tokens] == lengths
    assert lengths[1] == 24
    assert "prompts cut to what fits both contexts, of 64 and 24 tokens: 0 (1 of 1)" in diff.notes


# Another depth


@pytest.mark.parametrize(("depth", "matched"), [(7, [0, 2, 4, 6]), (2, [0, 0, 1, 1]), (1, [0, 0, 0, 0])])
def test_blocks_are_matched_by_relative_depth(depth: int, matched: list[int]) -> None:
    base, finetuned = tiny_llama(), tiny_llama(seed=4, num_hidden_layers=depth)
    texts, ids = MANY_TEXTS[:4], MANY[:4]
    diff = activation_diff(base, finetuned, texts, tokenizer=word_tokenizer(), position="last")
    expected = [
        [cosine(b[-1:], f[-1:])[0] for b, f in zip(ours, theirs, strict=True)]
        for ours, theirs in ((blocks(base, p), [blocks(finetuned, p)[i] for i in matched]) for p in ids)
    ]
    np.testing.assert_allclose(diff.results.column("cosine_similarity"), expected, rtol=0, atol=1e-6)
    told = [
        i if layer.finetuned_layer is None else layer.finetuned_layer for i, layer in enumerate(diff.layers)
    ]
    assert told == matched
    assert any(f"has 4 layers, LlamaForCausalLM has {depth}" in note for note in diff.notes)
    assert diff.record.output is not None
    assert diff.record.finetuned.n_layers == depth


def test_models_of_one_depth_have_no_counterparts_to_tell() -> None:
    diff = activation_diff(tiny_llama(), perturbed(tiny_llama()), MANY_TEXTS[:4], tokenizer=word_tokenizer())
    assert [layer.finetuned_layer for layer in diff.layers] == [None] * 4


def blocks(model: PreTrainedModel, ids: Sequence[int]) -> list[States]:
    return block_outputs(model, dissect(model).blocks, ids)


# Another width


@pytest.mark.parametrize("position", ["last", "all"])
def test_states_of_another_width_have_a_cka(position: str) -> None:
    """One row a prompt: its compared token, or the mean of those."""
    base, finetuned = tiny_llama(), tiny_llama(hidden_size=48, num_hidden_layers=3)
    diff = activation_diff(base, finetuned, MANY_TEXTS, tokenizer=word_tokenizer(), position=position)
    ours, theirs = ([blocks(model, ids) for ids in MANY] for model in (base, finetuned))
    kept = "last" if position == "last" else "mean"
    for layer, counterpart in zip(diff.layers, [0, 1, 1, 2], strict=True):
        b = np.concatenate([state(states[layer.layer], kept) for states in ours])
        f = np.concatenate([state(states[counterpart], kept) for states in theirs])
        assert layer.cka == pytest.approx(unbiased_cka(b, f), abs=1e-5)
        assert layer.cosine_similarity is None
        assert layer.divergence is None
        assert not layer.flagged
    assert diff.summary.verdict == "changed"
    assert "residual streams of 32 and 48 features have no cosine: CKA is given instead" in diff.notes


def test_the_table_has_a_column_of_cka() -> None:
    diff = activation_diff(tiny_llama(), tiny_llama(hidden_size=48), MANY_TEXTS, tokenizer=word_tokenizer())
    lines = str(diff).splitlines()
    start = lines.index("Layer    Avg Cos Sim    Divergence         CKA")
    assert lines[start + 1] == "-" * 47
    for line, layer in zip(lines[start + 2 : start + 6], diff.layers, strict=True):
        assert line == f"{layer.layer:<10}     nan           nan{layer.cka:>12.6f}"


def test_cka_is_given_beside_the_cosine_and_is_one_for_a_copy() -> None:
    diff = activation_diff(tiny_llama(), tiny_llama(), MANY_TEXTS, tokenizer=word_tokenizer())
    assert [layer.cka for layer in diff.layers] == [pytest.approx(1.0, abs=1e-9)] * 4
    assert "CKA" not in str(diff)
    few = activation_diff(tiny_llama(), tiny_llama(), MANY_TEXTS[:49], tokenizer=word_tokenizer())
    assert [layer.cka for layer in few.layers] == [None] * 4


def test_fewer_than_50_prompts_are_refused() -> None:
    with pytest.raises(ShapeMismatchError, match=r"32 and 48 features.*from 50 prompts on, and these are 49"):
        activation_diff(tiny_llama(), tiny_llama(hidden_size=48), MANY_TEXTS[:49], tokenizer=word_tokenizer())


def test_other_tokenizers_and_another_width_at_once(tmp_path: Path, base_folder: Path) -> None:
    wide = save_model(tmp_path / "wide", tiny_llama(hidden_size=48), tiny_tokenizer(SIZES[1]))
    prompts = [f"{TEXT[p % 2][: 8 + p]} {p}" for p in range(50)]
    diff = activation_diff(base_folder, wide, prompts, align="text", position="mean")
    assert all(layer.cka is not None and -0.5 < layer.cka < 1 for layer in diff.layers)
    assert diff.summary.verdict == "changed"
