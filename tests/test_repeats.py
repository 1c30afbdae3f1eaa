"""Prompts that repeat others: each text runs once, and every copy counts as a prompt of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import lazarus
from factories import perturbed, tiny_llama, word_tokenizer
from lazarus.activation import repeats
from lazarus.activation.runplan import RunPlan
from lazarus.notes import Notes
from lazarus.prompts import make_prompts
from lazarus.tokens import TokenOptions, tokenize_pair
from reference import unbiased_cka

DISTINCT = [" ".join(f"t{3 + (7 * i + k * k) % 90}" for k in range(1 + i % 7)) for i in range(30)]
ORDER = [*range(20), 3, 3, 7, *range(20, 30), 0, *[11] * 15, 29]
TEXTS = [DISTINCT[i] for i in ORDER]
NUMBERS = ("divergence", "relative_l2", "norm_ratio", "local_relative_l2", "local_cosine_similarity")
POSITIONS = ("last", "mean", "all")


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    base = tiny_llama()
    return base, perturbed(base)


def compare(models: tuple[PreTrainedModel, PreTrainedModel], texts: list[str], **options: Any) -> Any:
    return lazarus.activation_diff(*models, texts, tokenizer=word_tokenizer(), localize=True, **options)


@contextmanager
def tokens_seen(model: PreTrainedModel) -> Iterator[list[int]]:
    """The tokens of each pass through the first block, padding included."""
    seen: list[int] = []
    block = model.model.layers[0]
    handle = block.register_forward_hook(
        lambda _m, args, _o: seen.append(args[0].shape[0] * args[0].shape[1])
    )
    try:
        yield seen
    finally:
        handle.remove()


def states(model: PreTrainedModel, text: str, layer: int, position: str) -> np.ndarray[Any, Any]:
    """The compared rows of one prompt after a block, [rows, hidden], by transformers alone."""
    ids = torch.tensor([[int(word[1:]) for word in text.split()]])
    with torch.no_grad():
        found = model(ids, output_hidden_states=True).hidden_states[layer + 1][0].double().numpy()
    rows = found[-1:] if position == "last" or len(found) == 1 else found[1:]
    return np.asarray(rows.mean(0, keepdims=True) if position == "mean" else rows)


@pytest.mark.parametrize("position", POSITIONS)
def test_every_copy_has_the_numbers_of_its_text(models: Any, position: str) -> None:
    once = compare(models, DISTINCT, position=position)
    repeated = compare(models, TEXTS, position=position)
    for name in NUMBERS:
        expected = once.results.column(name)[ORDER]
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(repeated.results.column(name), expected)
    assert repeated.layers[1].divergence == pytest.approx(repeated.results.column("divergence")[:, 1].mean())
    assert repeated.layers[1].n_prompts == len(TEXTS)


@pytest.mark.parametrize("position", ["last", "all"])
def test_copies_count_in_the_references_as_prompts_of_their_own(models: Any, position: str) -> None:
    """An oracle in NumPy that runs every copy: the baseline over unrelated prompts, and the static share."""
    layer = 2
    diff = compare(models, TEXTS, position=position, readout=str(layer))
    b, f = ([states(m, text, layer, position) for text in TEXTS] for m in models)
    b_unit, f_unit = ([r / np.linalg.norm(r, axis=1, keepdims=True) for r in rows] for rows in (b, f))
    pairs = [(b_unit[i] @ f_unit[j].T).flatten() for i in range(len(b)) for j in range(len(b)) if i != j]
    assert diff.layers[layer].unrelated_similarity == pytest.approx(np.concatenate(pairs).mean(), rel=1e-5)
    shifts = np.array([(y - x).mean(0) for x, y in zip(b, f, strict=True)])
    n, mean = len(shifts), shifts.mean(0)
    unbiased = mean @ mean - np.square(shifts - mean).sum() / (n * (n - 1))
    expected = unbiased / np.square(shifts).sum(1).mean()
    assert diff.record.readout[0].static_share == pytest.approx(expected, rel=1e-4)


def test_copies_count_in_cka_and_in_the_output(models: Any) -> None:
    texts = [*TEXTS, *DISTINCT[:10]]
    diff = compare(models, texts)
    x, y = (np.concatenate([states(m, text, 2, "last") for text in texts]) for m in models)
    assert diff.layers[2].cka == pytest.approx(unbiased_cka(x, y), rel=1e-4)
    kl = []
    for text in texts:
        ids = torch.tensor([[int(word[1:]) for word in text.split()]])
        with torch.no_grad():
            p, q = (m(ids).logits[0, -1].double().log_softmax(-1) for m in models)
        kl.append(float((p.exp() * (p - q)).sum()))
    assert diff.record.output.kl_base_finetuned == pytest.approx(np.mean(kl), rel=1e-4)


def test_the_models_see_each_text_once(models: Any) -> None:
    for model in models:
        with tokens_seen(model) as once:
            compare(models, DISTINCT, no_noise_floor=True)
        with tokens_seen(model) as repeated:
            compare(models, TEXTS, no_noise_floor=True)
        assert sum(repeated) == sum(once)


def test_the_noise_is_that_of_the_distinct_prompts(models: Any) -> None:
    once, repeated = compare(models, DISTINCT), compare(models, TEXTS)
    assert [m.noise_floor for m in repeated.layers] == [m.noise_floor for m in once.layers]
    assert once.layers[0].noise_floor > 0


def test_it_is_noted_and_only_where_there_are_repeats(models: Any) -> None:
    n_repeats = len(TEXTS) - len(DISTINCT)
    told = f"{n_repeats} of {len(TEXTS)} prompts are repeats of others: each text ran once"
    assert told in compare(models, TEXTS).notes
    assert "repeated-prompts" not in compare(models, DISTINCT).note_codes


def test_texts_that_only_one_of_two_tokenizers_reads_alike_are_no_repeats() -> None:
    """Aligned by text, two texts are the same only where both models read the same ids."""
    reads_t5_as_t0 = word_tokenizer()
    reads_t5_as_t0.backend_tokenizer.model = type(reads_t5_as_t0.backend_tokenizer.model)(
        {f"t{i}": i for i in range(100) if i != 5}, unk_token="t0"
    )
    apart = _plan_of(word_tokenizer(), reads_t5_as_t0, ["t1 t5", "t1 t0", "t1 t5"])
    assert apart.repeats.distinct == [0, 1]
    same = _plan_of(reads_t5_as_t0, reads_t5_as_t0, ["t1 t5", "t1 t0", "t1 t5"])
    assert same.repeats.distinct == [0]


def _plan_of(base: Any, finetuned: Any, texts: list[str]) -> RunPlan:
    prompts = make_prompts(texts, no_split=True).prompts
    ours, theirs = tokenize_pair(prompts, (base, finetuned), TokenOptions(align="text"), Notes())
    return RunPlan(ours, theirs, (0, 0), 512, "last", False, False, 0)


@pytest.mark.parametrize("most_rows", [1, 7])
def test_portions_of_any_size_give_the_same(
    models: Any, most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(models, TEXTS, position="all")
    monkeypatch.setattr(repeats, "MOST_ROWS", most_rows)
    portions = compare(models, TEXTS, position="all")
    np.testing.assert_array_equal(portions.results.column("divergence"), whole.results.column("divergence"))
    for ours, theirs in zip(portions.layers, whole.layers, strict=True):
        assert ours.unrelated_similarity == pytest.approx(theirs.unrelated_similarity, rel=1e-12)
