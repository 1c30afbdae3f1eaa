"""compare: what both lenses show, against plain transformers, NumPy and small examples by hand."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from factories import perturbed, save_model, tiny_llama, tiny_tokenizer, word_tokenizer
from lazarus.demo import BASE, FINETUNED
from lazarus.errors import (
    ChatTemplateError,
    NoDataError,
    PairError,
    PromptDataError,
    PromptsError,
    PromptTooLongError,
    UsageError,
)
from lazarus.lens import compare
from lazarus.lens.distance import Outcomes, lens_pair, same_token
from lazarus.lens.lens import Lens
from lazarus.lens.tracking import find_tracked
from lazarus.lens.vocabulary import Vocabulary
from lazarus.options import CompareArguments, CompareOptions, parse_track
from lazarus.results import CompareRecord, LensModel, read_json, write_json
from lazarus.tokens import token_text
from reference import run_whole

Floats = NDArray[np.float64]
PROMPT = "The answer is"


# The worked example of the documentation, by hand.


def by_hand(folder: Path, prompt: str) -> tuple[list[Floats], Any]:
    """Each layer's next-token probabilities: plain transformers, then final norm and head of a Llama."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        # hidden_states[0] is the embedding, and the last one has been through the final norm already.
        normed = [model.model.norm(h[0, -1]) for h in states[1:-1]] + [states[-1][0, -1]]
        logits = [model.lm_head(h).double().numpy() for h in normed]
    return [np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in logits], tokenizer


def emergence_of(token: int, probabilities: Sequence[Floats]) -> int | None:
    """Backwards from the end, for as long as the token is the first choice."""
    found = None
    for layer in reversed(range(len(probabilities))):
        if int(np.argmax(probabilities[layer])) != token:
            break
        found = layer
    return found


EXPECTED: dict[str, list[tuple[str, int | None, int | None]]] = {
    "The answer is": [(" a", 7, None), (" ", None, 0)],
    "Calculate 7 * 8:": [(" ", 4, 2)],
    "20 - 14 equals": [(" in", 7, None), (" ", None, 1)],
}
"""Of each prompt the tracked tokens, and where they emerge in the base and in the fine-tuned model."""


@pytest.mark.parametrize("prompt", EXPECTED)
def test_the_worked_example_is_right(prompt: str) -> None:
    record = compare(BASE, FINETUNED, prompt).record
    found = zip(record.tracked, record.model1.tracked, record.model2.tracked, strict=True)
    assert [(t, a.emergence_layer, b.emergence_layer) for t, a, b in found] == EXPECTED[prompt]
    for folder, model in ((BASE, record.model1), (FINETUNED, record.model2)):
        probabilities, tokenizer = by_hand(folder, prompt)
        assert len(model.layers) == len(probabilities) == 8
        for layer, p in zip(model.layers, probabilities, strict=True):
            order = np.argsort(-p, kind="stable")[:5].tolist()
            assert [t.token_id for t in layer.top] == order
            assert [t.token for t in layer.top] == [tokenizer.decode([i]) for i in order]
            assert [t.probability for t in layer.top] == pytest.approx(p[order], rel=1e-5)
        for each in model.tracked:
            token = each.token_id
            assert token is not None
            assert each.token == each.tracked == tokenizer.decode([token])
            assert each.emergence_layer == emergence_of(token, probabilities)
            assert each.rank == [1 + int((p > p[token]).sum()) for p in probabilities]
            assert each.probability == pytest.approx([p[token] for p in probabilities], rel=1e-5)
            assert each.final_probability == each.probability[-1]


# One lens, on logits by hand.


def lens_of(rows: Sequence[Sequence[float]]) -> Lens:
    nothing = cast(Any, None)
    return Lens(nothing, nothing, nothing, nothing, torch.tensor(rows))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("firsts", "expected"),
    [
        ([1, 1, 1, 1], 0),
        ([0, 1, 1, 1], 1),
        ([1, 0, 1, 1], 2),
        ([1, 1, 0, 1], 3),
        ([1, 1, 1, 0], None),
        ([0, 0, 0, 0], None),
    ],
)
def test_a_token_emerges_where_it_is_first_to_the_end(firsts: list[int], expected: int | None) -> None:
    lens = lens_of([[float(first == token) for token in range(3)] for first in firsts])
    assert lens.first_choices == firsts
    assert lens.emergence(1) == expected


def test_of_equal_tokens_the_lowest_id_is_first() -> None:
    lens = lens_of([[0.0, 2.0, 2.0, 1.0, 2.0]])
    assert lens.first_choices == [1]
    assert (lens.emergence(1), lens.emergence(2)) == (0, None)
    assert [token for token, _ in lens.top(0, 4)] == [1, 2, 4, 3]
    assert [token for token, _ in lens.top(0, 2)] == [1, 2]
    assert [lens.ranks(token)[0] for token in range(5)] == [5, 1, 1, 4, 1]


def test_a_layer_without_finite_logits_is_not_read_and_breaks_an_emergence() -> None:
    lens = lens_of([[0, 1, 0], [NAN, 1, 0], [0, 1, 0], [0, INF, 0], [-INF, 1, 0], [0, 1, 0]])
    assert lens.valid == [True, False, True, False, True, True]
    assert lens.first_choices == [1, None, 1, None, 1, 1]
    assert lens.emergence(1) == 4
    assert lens.top(1, 2) == []
    assert [p is None for p in lens.probabilities(0)] == [False, True, False, True, False, False]
    assert lens.probabilities(0)[4] == 0.0
    assert lens.ranks(1) == [1, None, 1, None, 1, 1]


def test_probabilities_are_a_softmax_in_float64() -> None:
    lens = lens_of([[100.0, 0.0, -50.0]])
    expected = np.exp([-100.0, -150.0]) / (1 + np.exp(-100.0) + np.exp(-150.0))
    assert [lens.probabilities(token)[0] for token in (1, 2)] == pytest.approx(expected, rel=1e-12)
    many = 20 * np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    lens = lens_of([many.tolist()])
    p = softmax(many.astype(np.float64))
    assert [lens.probabilities(token)[0] for token in range(1000)] == pytest.approx(p, rel=1e-12)


# Two models: distances.


def logits_of(model: Any, ids: Sequence[int]) -> Floats:
    """Each layer's logits at the last token of a tiny Llama, by hand: [layers, vocabulary]."""
    states = run_whole(model, ids, output_hidden_states=True).hidden_states
    with torch.no_grad():
        normed = [model.model.norm(h[0, -1]) for h in states[1:-1]] + [states[-1][0, -1]]
        return torch.stack([model.lm_head(h) for h in normed]).double().numpy()


def softmax(logits: Floats) -> Floats:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    p: Floats = shifted / shifted.sum(-1, keepdims=True)
    return p


def kl(p: Floats, q: Floats) -> float:
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def check_distances(record: CompareRecord, p: Floats, q: Floats, matched: Sequence[int]) -> None:
    assert [pair.layer for pair in record.layers] == list(range(len(p)))
    assert [pair.model2_layer for pair in record.layers] == list(matched)
    for pair in record.layers:
        a, b = p[pair.layer], q[pair.model2_layer]
        middle = (a + b) / 2
        assert pair.kl_1_2 == pytest.approx(kl(a, b), rel=1e-4)
        assert pair.kl_2_1 == pytest.approx(kl(b, a), rel=1e-4)
        assert pair.js == pytest.approx((kl(a, middle) + kl(b, middle)) / 2, rel=1e-4)
    js = [pair.js or 0.0 for pair in record.layers]
    assert record.summary.max_js == max(js) > 0
    assert record.summary.most_divergent_layer == js.index(max(js))


def test_the_distances_equal_the_oracle() -> None:
    one, tokenizer = tiny_llama(), tiny_tokenizer()
    other = perturbed(one, 0.5)
    record = compare(one, other, PROMPT, tokenizer=tokenizer).record
    ids = tokenizer(PROMPT)["input_ids"]
    p, q = softmax(logits_of(one, ids)), softmax(logits_of(other, ids))
    assert abs(kl(p[-1], q[-1]) - kl(q[-1], p[-1])) > 1e-3
    check_distances(record, p, q, range(4))
    same = [int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q, strict=True)]
    assert [pair.same_first_choice for pair in record.layers] == same
    assert record.summary.same_first_choice == same[-1]
    assert record.summary.same_vocabulary
    assert "vocabularies-differ" not in record.note_codes


def test_a_model_against_itself_is_at_no_distance() -> None:
    model = tiny_llama()
    record = compare(model, model, PROMPT, tokenizer=tiny_tokenizer()).record
    assert [(x.kl_1_2, x.kl_2_1, x.js, x.same_first_choice) for x in record.layers] == [(0, 0, 0, True)] * 4
    assert len(record.tracked) == 1
    assert record.model1.layers == record.model2.layers


@pytest.mark.parametrize("depths", [(4, 7), (7, 4), (1, 4), (4, 1)])
def test_models_of_other_depth_are_matched_by_relative_depth(depths: tuple[int, int]) -> None:
    one, other = (tiny_llama(seed, num_hidden_layers=n) for seed, n in enumerate(depths))
    tokenizer = tiny_tokenizer()
    record = compare(one, other, PROMPT, tokenizer=tokenizer).record
    ids = tokenizer(PROMPT)["input_ids"]
    last = depths[1] - 1
    matched = [last] if depths[0] == 1 else [round(i * last / (depths[0] - 1)) for i in range(depths[0])]
    check_distances(record, softmax(logits_of(one, ids)), softmax(logits_of(other, ids)), matched)
    assert any("matched by relative depth" in note for note in record.notes)
    assert len(record.model2.layers) == depths[1]
    ends = [int(logits_of(model, ids)[-1].argmax()) for model in (one, other)]
    assert record.summary.same_first_choice == (ends[0] == ends[1])


def test_padding_logits_of_one_head_are_one_more_outcome() -> None:
    one, other = tiny_llama(0), tiny_llama(1, vocab_size=320)
    tokenizer = tiny_tokenizer()
    record = compare(one, other, PROMPT, tokenizer=tokenizer).record
    ids = tokenizer(PROMPT)["input_ids"]
    p, q = softmax(logits_of(one, ids)), softmax(logits_of(other, ids))
    merged = np.concatenate([q[:, :300], q[:, 300:].sum(-1, keepdims=True)], axis=-1)
    p = np.concatenate([p, np.zeros((len(p), 1))], axis=-1)
    for layer, a, b in zip(record.layers, p, merged, strict=True):
        middle = (a + b) / 2
        assert layer.kl_1_2 == pytest.approx(kl(a, b), rel=1e-4)
        assert layer.kl_2_1 is None  # infinite: model 1 cannot give the other tokens
        assert layer.js == pytest.approx((kl(a, middle) + kl(b, middle)) / 2, rel=1e-4)
    assert (record.model1.n_vocabulary, record.model2.n_vocabulary) == (300, 320)
    assert record.summary.same_vocabulary
    assert any("over the 300 that both have and one outcome for any other" in note for note in record.notes)


def saved(folder: Path, seed: int, tokenizer: Any, **changes: Any) -> Path:
    return save_model(folder, tiny_llama(seed, **changes), tokenizer)


def test_two_vocabularies_are_compared_by_text_with_one_outcome_for_the_rest(tmp_path: Path) -> None:
    """One byte-level vocabulary is the other's without its last merges, with its special tokens elsewhere."""
    one = saved(tmp_path / "one", 0, tiny_tokenizer(300))
    other = saved(tmp_path / "other", 1, tiny_tokenizer(280))
    record = compare(one, other, PROMPT).record
    sides = []
    for folder in (one, other):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        p = softmax(logits_of(model, tokenizer(PROMPT)["input_ids"]))
        names = [tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else None for i in range(300)]
        sides.append((p, names))
    common = sorted({n for n in sides[0][1] if n} & {n for n in sides[1][1] if n})
    merged = []
    for p, names in sides:
        columns = [sum(p[:, i] for i, n in enumerate(names) if n == name) for name in common]
        rest = sum(p[:, i] for i, n in enumerate(names) if n not in common)
        merged.append(np.stack([*columns, rest], axis=1))
    assert 0.001 < merged[0][-1, -1] < 0.999
    check_distances(record, merged[0], merged[1], range(4))
    assert not record.summary.same_vocabulary
    assert any("they are lower bounds" in note for note in record.notes)
    assert "own-tokenizers" not in record.note_codes


def test_what_a_model_cannot_say_at_all_makes_kl_infinite_which_is_noted(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", 0, tiny_tokenizer(300))
    other = saved(tmp_path / "other", 1, tiny_tokenizer(280), vocab_size=280)
    record = compare(one, other, PROMPT).record
    assert [pair.kl_1_2 for pair in record.layers] == [None] * 4
    assert all(pair.kl_2_1 is not None and pair.js is not None for pair in record.layers)
    assert any(
        note.startswith("KL(model 1‖model 2) is infinite, and null, at layers 0") for note in record.notes
    )


# Tokens as texts.


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: a word is spelled with its space, and the first space of a text is dropped again."""
    words = ["<unk>", "<s>", "▁Paris", "Paris", "▁The", "▁", "▁answer", "▁is", "<0x0A>", "P", "ar", "▁Rome"]
    core = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", pad_token="<s>")


def test_a_token_is_read_with_the_space_that_it_adds() -> None:
    """Decoded alone, `▁Paris` and `Paris` are one text in SentencePiece."""
    tokenizer = metaspace_tokenizer()
    assert tokenizer.decode([2]) == tokenizer.decode([3]) == "Paris"
    vocabulary = Vocabulary(tokenizer, 14)
    assert [vocabulary.text(i) for i in (2, 3, 5, 1)] == [" Paris", "Paris", " ", "<s>"]
    assert vocabulary.text(13) == "[id 13]"
    assert vocabulary.texts[2:4] == [" Paris", "Paris"]
    assert vocabulary.texts[12:] == [None, None]


def test_a_byte_of_a_character_is_named_and_no_other_token_reads_so() -> None:
    tokenizer = tiny_tokenizer()
    texts = Vocabulary(tokenizer, 300).texts
    (a3,) = (i for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(300))) if token == "£")
    assert tokenizer.decode([a3]) == "\ufffd"
    assert texts[a3] == "<0xA3>"
    named = [text for i, text in enumerate(texts) if "\ufffd" in tokenizer.decode([i])]
    assert len(named) == 128
    assert {*named} == {f"<0x{byte:02X}>" for byte in range(128, 256)}
    assert len({*texts}) == 300


def test_a_byte_that_sentencepiece_falls_back_to_is_as_it_spells_it() -> None:
    core = Tokenizer(models.BPE({"<unk>": 0, "<0xC3>": 1, "a": 2}, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.ByteFallback()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert tokenizer.decode([1]) == "\ufffd"
    assert [token_text(tokenizer, i) for i in (1, 2)] == ["<0xC3>", "a"]


def test_a_word_is_its_first_token_with_and_without_a_space() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = Vocabulary(tokenizer, 300)
    bare, spaced = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("is", " is"))
    assert bare != spaced
    assert vocabulary.first_tokens("is") == [bare, spaced]
    assert vocabulary.first_tokens(" is") == [spaced]
    assert vocabulary.text(spaced) == " is"
    assert vocabulary.first_tokens("é")[0] == tokenizer("é", add_special_tokens=False)["input_ids"][0]
    assert vocabulary.first_tokens(" ") == tokenizer(" ", add_special_tokens=False)["input_ids"]


def test_a_word_after_no_space_is_found_where_a_tokenizer_adds_one() -> None:
    vocabulary = Vocabulary(metaspace_tokenizer(), 12)
    assert sorted(vocabulary.first_tokens("Paris")) == [2, 3]
    assert vocabulary.first_tokens("日") == []
    assert Vocabulary(metaspace_tokenizer(), 3).first_tokens("Paris") == [2]


def test_a_text_that_a_tokenizer_fails_on_has_no_token() -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="missing"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=core), 2)
    assert vocabulary.first_tokens("c") == []
    assert vocabulary.first_tokens("b") == [1]
    assert Vocabulary(word_tokenizer(), 100).first_tokens("t17") == [17]
    assert Vocabulary(word_tokenizer(), 100).first_tokens("x17") == []


# What is tracked.


def final(model: Any, tokenizer: Any) -> Floats:
    last: Floats = logits_of(model, tokenizer(PROMPT)["input_ids"])[-1]
    return last


def test_a_tracked_word_is_the_form_that_ends_more_probable_in_each_model() -> None:
    one, tokenizer = tiny_llama(), tiny_tokenizer()
    other = perturbed(one, 1.0)
    words = ["is", "the", "an", "a", "of", "in", "Hello", " is"]
    record = compare(one, other, PROMPT, tokenizer=tokenizer, track=words).record
    assert record.tracked == record.settings.track == words
    chosen = []
    for model, side in ((one, record.model1), (other, record.model2)):
        last = final(model, tokenizer)
        for word, found in zip(words, side.tracked, strict=True):
            forms = [word] if word[0] == " " else [word, f" {word}"]
            ids = [tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms]
            ids = [i for i in ids if tokenizer.decode([i]).strip()]
            assert found.token_id == max(ids, key=lambda i: last[i])
            chosen.append(found.token_id in ids[:1])
    assert {True, False} == set(chosen)


def test_a_word_of_several_tokens_and_one_without_a_token_are_noted(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "one", tiny_llama(vocab_size=100), word_tokenizer())
    byte_level = saved(tmp_path / "other", 1, tiny_tokenizer())
    record = compare(folder, byte_level, "t5 t17", track="t5,zebra").record
    t5, zebra = record.model1.tracked
    assert (t5.token, t5.token_id) == (" t5", 5)
    assert (zebra.token, zebra.token_id, zebra.emergence_layer, zebra.final_probability) == (None,) * 4
    assert zebra.probability == zebra.rank == [None] * 4
    assert f"tracked token 'zebra': {folder} has no token for it" in record.notes
    theirs = record.model2.tracked[1]
    assert theirs.token in ("z", " z")
    assert any(
        note.startswith(f"tracked token 'zebra': {byte_level} has no single token for it, so its first one")
        for note in record.notes
    )


def test_the_first_choices_are_tracked_in_the_other_model_by_their_text(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", 0, tiny_tokenizer(300))
    other = saved(tmp_path / "other", 3, tiny_tokenizer(280), vocab_size=280)
    record = compare(one, other, PROMPT).record
    firsts = [side.layers[-1].top[0] for side in (record.model1, record.model2)]
    assert record.tracked == [first.token for first in firsts]
    assert [side.tracked[i].token_id for i, side in enumerate(sides(record))] == [f.token_id for f in firsts]
    names = [Vocabulary(AutoTokenizer.from_pretrained(f), n).texts for f, n in ((one, 300), (other, 280))]
    for i, first in enumerate(firsts):
        theirs = sides(record)[1 - i].tracked[i]
        if first.token in names[1 - i]:
            assert theirs.token == first.token
            assert theirs.token_id == names[1 - i].index(first.token)
    assert any(first.token in names[1 - i] for i, first in enumerate(firsts))


def test_a_first_choice_is_that_very_text_in_the_other_model_even_if_its_other_form_is_likelier() -> None:
    nothing = cast(Any, None)
    lenses: list[Lens] = []
    ids: list[dict[str | None, int]] = []
    for size in (300, 280):
        vocabulary = Vocabulary(tiny_tokenizer(size), size)
        ids.append({text: i for i, text in enumerate(vocabulary.texts)})
        row = torch.zeros(1, size)
        row[0, ids[-1]["x" if lenses else " is"]] = 3.0
        row[0, ids[-1]["is"]] = 2.0
        lenses.append(Lens(nothing, nothing, vocabulary, nothing, row))
    spaced, x = find_tracked((lenses[0], lenses[1]), None, same_ids=False)
    assert (spaced.text, spaced.ids) == (" is", (ids[0][" is"], ids[1][" is"]))
    assert (x.text, x.ids) == ("x", (ids[0]["x"], ids[1]["x"]))
    assert ids[0][" is"] != ids[0]["is"]
    word = find_tracked((lenses[0], lenses[1]), ["is"], same_ids=False)[0]
    assert word.ids == (ids[0][" is"], ids[1]["is"])


def sides(record: CompareRecord) -> tuple[LensModel, LensModel]:
    return record.model1, record.model2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("42,Paris", ["42", "Paris"]),
        (" 42 ,  Paris ,", ["42", "Paris"]),
        ('"1,000"," Rome"," "', ["1,000", " Rome", " "]),
        ('"say ""hi"""', ['say "hi"']),
        ("a,a,b", ["a", "b"]),
        ([" a", "a,b"], [" a", "a,b"]),
    ],
)
def test_tracked_words_are_a_csv_row_or_a_list(given: Any, expected: list[str] | None) -> None:
    assert parse_track(given) == expected


# What is read.


def test_the_last_token_of_the_prompt_is_read() -> None:
    """Not the first, and not that of a longer prompt: each prompt's own next token."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    for prompt in ("The", "The answer", "The answer is 42, and the capital of"):
        record = compare(model, model, prompt, tokenizer=tokenizer, top_k=1).record
        logits = logits_of(model, tokenizer(prompt)["input_ids"])
        assert [layer.top[0].token_id for layer in record.model1.layers] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("chosen", ["model1", "base", "model2", "finetuned"])
def test_a_chat_template_is_that_of_the_model_it_names(chosen: str, tmp_path: Path) -> None:
    one = saved(tmp_path / "one", 0, tiny_tokenizer(template="<1>{{ messages[0]['content'] }}"))
    other = saved(tmp_path / "two", 1, tiny_tokenizer(template="<2>{{ messages[0]['content'] }}"))
    record = compare(one, other, PROMPT, chat_template=chosen).record
    number = 1 if chosen in ("model1", "base") else 2
    assert record.model1.rendered == record.model2.rendered == f"<{number}>{PROMPT}"
    assert "".join(record.model1.prompt_tokens) == f"<{number}>{PROMPT}"
    assert record.settings.chat_template == chosen
    assert record.prompt == PROMPT


def test_a_prompt_beyond_a_context_is_refused_or_cut_at_one_place_for_both(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", 0, tiny_tokenizer(), max_position_embeddings=4)
    other = saved(tmp_path / "other", 1, tiny_tokenizer())
    with pytest.raises(PromptTooLongError, match=r"context is 4.*`truncate=True`"):
        compare(one, other, PROMPT)
    record = compare(one, other, PROMPT, truncate=True).record
    assert len(record.model1.prompt_tokens) == 4
    assert record.model1.prompt_tokens == record.model2.prompt_tokens
    assert "prompts cut to what fits both contexts, of 4 and 64 tokens: 0 (1 of 1)" in record.notes


def test_tokens_of_two_ids_are_two_though_they_read_alike() -> None:
    alike = cast(Any, SimpleNamespace(text=lambda _: "£", n_tokens=3))
    nothing = cast(Any, None)
    lenses = [Lens(nothing, nothing, alike, nothing, torch.eye(3)[[i]]) for i in (0, 1)]
    pair = (lenses[0], lenses[1])
    assert same_token(pair, (0, 1), same_ids=True) is False
    assert same_token(pair, (0, 1), same_ids=False) is True
    assert same_token(pair, (1, 1), same_ids=True) is True
    assert same_token(pair, (None, 1), same_ids=True) is None
    assert [each.ids for each in find_tracked(pair, None, same_ids=True)] == [(0, 0), (1, 1)]
    assert lens_pair(pair, Outcomes(3, None, same_ids=True), (0, 0)).same_first_choice is False


@pytest.mark.parametrize(("chosen", "bos"), [("model1", "<s>"), ("model2", "<|b|>")])
def test_a_chat_template_writes_the_special_tokens_of_its_own_model(
    chosen: str, bos: str, tmp_path: Path
) -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    one = saved(tmp_path / "one", 0, tiny_tokenizer(template=template))
    theirs = tiny_tokenizer(template=template)
    theirs.add_special_tokens({"bos_token": "<|b|>"})
    other = saved(tmp_path / "two", 1, theirs, vocab_size=len(theirs))
    record = compare(one, other, PROMPT, chat_template=chosen).record
    assert record.model1.rendered == record.model2.rendered == f"{bos}{PROMPT}"
    assert sides(record)[chosen == "model2"].prompt_tokens[0] == bos
    assert any("begin and end a text with other tokens" in note for note in record.notes)


def test_logits_that_are_not_finite_are_null_with_a_note() -> None:
    model = tiny_llama()
    broken = perturbed(model)

    def spoil(_module: Any, _args: Any, output: Any) -> Any:
        spoiled = output.clone() if isinstance(output, torch.Tensor) else output[0].clone()
        spoiled[..., 0] = NAN
        return spoiled

    fine = broken.model.layers[3].forward
    broken.model.layers[2].register_forward_hook(spoil)
    broken.model.layers[3].forward = lambda states, *args, **kwargs: fine(
        torch.nan_to_num(states), *args, **kwargs
    )
    record = compare(model, broken, PROMPT, tokenizer=tiny_tokenizer()).record
    assert [bool(layer.top) for layer in record.model2.layers] == [True, True, False, True]
    assert [tracked.probability[2] for tracked in record.model2.tracked] == [None] * len(record.tracked)
    pair = record.layers[2]
    assert (pair.kl_1_2, pair.kl_2_1, pair.js, pair.same_first_choice) == (None,) * 4
    assert any("nothing is read, at layers 2 (1 of 4)" in note for note in record.notes)
    assert "infinite-kl" not in record.note_codes


def test_a_model_whose_logits_are_finite_nowhere_stops_the_run() -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight.fill_(NAN)
    with pytest.raises(
        NoDataError, match=r"the logits are finite at no layer.*1 weights hold NaN or infinity"
    ):
        compare(tiny_llama(), broken, PROMPT, tokenizer=tiny_tokenizer())


# The record and what is told on the way.


class Told:
    def __init__(self) -> None:
        self.names: list[tuple[str, str]] = []
        self.total = self.done = 0

    def loading(self, role: str, name: str) -> None:
        self.names.append((role, name))

    def running(self, n_layers: int) -> None:
        self.total = n_layers

    def advanced(self, n_layers: int) -> None:
        self.done += n_layers


def test_the_record_says_how_it_was_made(base_folder: Path, finetuned_folder: Path) -> None:
    told = Told()
    found = compare(str(base_folder), str(finetuned_folder), PROMPT, top_k=3, seed=7, observer=told)
    record = found.record
    assert told.names == [("base", str(base_folder)), ("finetuned", str(finetuned_folder))]
    assert told.total == told.done == 8
    assert (record.command, record.prompt, record.settings.top_k, record.settings.seed) == (
        "compare",
        PROMPT,
        3,
        7,
    )
    assert (record.settings.dtype, record.settings.device, record.settings.track) == ("float32", "cpu", None)
    assert record.model1.info.id == str(base_folder)
    assert record.model2.info.n_layers == 4
    assert {len(layer.top) for side in sides(record) for layer in side.layers} == {3}
    assert record.environment.torch == torch.__version__
    assert record.notes == []


def test_the_record_is_read_back_as_it_was_written(base_folder: Path, finetuned_folder: Path) -> None:
    record = compare(base_folder, finetuned_folder, PROMPT).record
    stream = io.BytesIO()
    write_json(record, stream)
    assert read_json(stream.getvalue()) == record


def test_an_adapter_alone_runs_on_model_1(base_folder: Path, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(base_folder)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    record = compare(base_folder, tmp_path / "adapter", PROMPT).record
    tokenizer = tiny_tokenizer()
    ids = tokenizer(PROMPT)["input_ids"]
    alone = LlamaForCausalLM.from_pretrained(base_folder)
    merged = adapted.merge_and_unload()
    check_distances(record, softmax(logits_of(alone, ids)), softmax(logits_of(merged, ids)), range(4))
    assert record.model2.info.kind == "adapter"


def test_the_arguments_are_the_options() -> None:
    assert list(CompareArguments.__annotations__) == [field.name for field in fields(CompareOptions)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"`top_k=0`: give a number of at least 1\."),
        ({"top_k": 301}, r"`top_k=301`: .* has 300 tokens\. Give a number of at most 300\."),
        ({"track": ""}, r"`track` '' holds no token\."),
        ({"track": " , "}, r"`track` ' , ' holds no token\."),
        ({"track": []}, r"`track` \[\] holds no token\."),
        ({"track": ["a", ""]}, r"`track`: '' is no token's text\."),
        ({"track": [5]}, r"`track`: 5 is no token's text\."),
        ({"track": ["a\ud800"]}, r"`track`: 'a\\ud800' is not valid Unicode at index 1\."),
        ({"track": "a\nb"}, r"`track` 'a\\nb': a line break outside of quotation marks\."),
        ({"dtype": "int8"}, r"`dtype=.int8.`: not a choice\."),
        ({"device": "tpu"}, r"`device=.tpu.`: not a device\."),
        ({"layers_path": ""}, r"`layers_path` is empty\."),
        ({"chat_template": "/nowhere"}, r"`chat_template=./nowhere.`: cannot be read"),
        ({"position": "last"}, r"unknown option 'position'\. The options are top_k, track,"),
    ],
)
def test_an_option_that_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(UsageError, match=message):
        compare(model, model, PROMPT, tokenizer=tiny_tokenizer(), **options)


@pytest.mark.parametrize("prompt", ["", "  \n", None, ["The answer is"], "a\ud800", {"text": ""}])
def test_a_prompt_that_is_none_is_refused(prompt: Any) -> None:
    model = tiny_llama()
    with pytest.raises(PromptsError, match=r"No prompt|is no prompt|is empty|not valid Unicode"):
        compare(model, model, prompt, tokenizer=tiny_tokenizer())


def test_models_that_cannot_read_the_prompt_are_refused() -> None:
    model, small = tiny_llama(), tiny_llama(vocab_size=100)
    with pytest.raises(PairError, match="brings a tokenizer"):
        compare(model, model, PROMPT)
    with pytest.raises(PromptDataError, match="has embeddings for 100"):
        compare(model, small, PROMPT, tokenizer=tiny_tokenizer())
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        compare(model, model, PROMPT, tokenizer=tiny_tokenizer(template=None), chat_template="model1")
