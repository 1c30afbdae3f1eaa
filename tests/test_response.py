"""The tokens of a response: which they are, and that every way through a run compares those and no others."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, ByT5Tokenizer, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import lazarus
from factories import (
    TEMPLATE,
    TEXT,
    notes_of,
    perturbed,
    save_model,
    tiny_llama,
    tiny_tokenizer,
    word_tokenizer,
)
from lazarus.cli import app
from lazarus.errors import LazarusError, PositionError, PromptsError, PromptTooLongError, UsageError
from lazarus.models import ChatTemplate, render_responses
from lazarus.models.turns import NO_HEADER
from lazarus.prompts import Prompt, make_prompts
from lazarus.responses import Responses, mark_responses
from lazarus.tokens import TokenizedPrompt
from reference import block_outputs, cosine

ROWS: list[dict[str, Any]] = [
    {"prompt": "t5 t17 t80", "response": " t3 t41"},
    {"prompt": "t12", "completion": " t77 t31 t64 t4"},
    {"prompt": "t50 t23 t8 t91 t36", "response": " t9"},
    {"prompt": "t44 t6", "response": " t7 t88 t1"},
    {"prompt": "t19 t20 t21", "response": " t22 t23"},
]
MARKED = [[2, 3, 4], [0, 1, 2, 3, 4], [4, 5], [1, 2, 3, 4], [2, 3, 4]]
"""by hand: the tokens of each response, and the one before them"""
IDS = [[int(t[1:]) for t in (r["prompt"] + list(r.values())[1]).split()] for r in ROWS]

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is AI?"},
    {"role": "assistant", "content": "The answer is 42"},
    {"role": "user", "content": "And Paris?"},
    {"role": "assistant", "content": "It is the capital."},
]
MARKS = (
    "{{ bos_token }}{% for m in messages %}\n"
    "{%- if m.role == 'assistant' %}[assistant] {% generation %}{{ m.content }}\n{% endgeneration %}\n"
    "  {%- else %}[{{ m.role }}] {{ m.content }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
MACRO = (
    "  {% macro turn(m) %}[{{ m.role }}] {% if m.role == 'assistant' %}"
    "{%- generation -%} {{ m.content }} {%- endgeneration -%}|{% else %}{{ m.content }}|{% endif %}"
    "{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    base = tiny_llama(max_position_embeddings=256)
    return base, perturbed(base)


def compare(pair: Any, rows: Any = ROWS, **options: Any) -> lazarus.ActivationDiff:
    base, tuned = pair
    options = {"tokenizer": word_tokenizer(), "position": "response", "batch_tokens": 16, **options}
    return lazarus.activation_diff(base, tuned, rows, **options)


def log_softmax(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits.double().log_softmax(-1)


def kl(pair: Any, ids: Sequence[int], marked: Sequence[int]) -> float:
    """KL(base‖fine-tuned) of one prompt, teacher-forced: the mean over its marked tokens."""
    p, q = (log_softmax(model, ids)[list(marked)] for model in pair)
    return float((p.exp() * (p - q)).sum(-1).mean())


def traces(diff: lazarus.ActivationDiff) -> list[Any]:
    assert diff.record.tokens is not None
    return list(diff.record.tokens)


def compared(diff: lazarus.ActivationDiff) -> list[list[int]]:
    return [trace.positions for trace in traces(diff)]


def said(diff: lazarus.ActivationDiff) -> list[str]:
    """The compared tokens of each prompt, as one text."""
    return ["".join(trace.tokens) for trace in traces(diff)]


# --- The numbers


def test_kl_and_divergence_are_those_of_the_teacher_forced_response(pair: Any) -> None:
    diff = compare(pair, token_prompts="0,1,2,3,4")
    expected = np.mean([kl(pair, ids, marked) for ids, marked in zip(IDS, MARKED, strict=True)])
    assert diff.record.output is not None
    assert diff.record.output.kl_base_finetuned == pytest.approx(expected, rel=1e-4)
    assert diff.record.settings.position == "response"
    assert compared(diff) == MARKED
    for prompt, ids in enumerate(IDS):
        base, tuned = (block_outputs(model, model.model.layers, ids) for model in pair)
        each = 1 - np.stack([cosine(b, f) for b, f in zip(base, tuned, strict=True)], axis=1)
        own = each[MARKED[prompt]]
        np.testing.assert_allclose(traces(diff)[prompt].divergence, own, atol=1e-6)
        np.testing.assert_allclose(diff.results.column("divergence")[prompt], own.mean(0), atol=1e-6)


def test_all_but_the_last_compared_token_predict_the_response(pair: Any) -> None:
    """What the definition is for: the likelihood of a response is read from those rows alone."""
    for ids, found, row in zip(IDS, compared(compare(pair)), ROWS, strict=True):
        predicted = [f"t{ids[position + 1]}" for position in found[:-1]]
        assert predicted == list(row.values())[1].split()


def test_the_record_says_what_was_read(pair: Any) -> None:
    diff = compare(pair)
    assert [p.text for p in diff.prompts] == [row["prompt"] for row in ROWS]
    assert [p.rendered for p in diff.prompts] == [row["prompt"] + list(row.values())[1] for row in ROWS]
    assert [p.n_tokens for p in diff.prompts] == [len(ids) for ids in IDS]
    assert diff.record.settings.token_prompts == "auto"


# --- From characters to tokens


@cache
def tokenizers() -> dict[str, Any]:
    core = Tokenizer(models.Unigram([("<unk>", 0.0)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(TEXT * 8, trainer)
    unigram = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    core.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    wordpiece = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    # Merges across an edge: `==` first, so that `y=` of a beginning is parted in the whole text.
    vocabulary = {
        token: i for i, token in enumerate(["x", "y", "=", " ", "z", "==", "y=", " y", "\n", "\n\n", "zz"])
    }
    core = Tokenizer(models.BPE(vocabulary, [("=", "="), ("\n", "\n"), ("y", "="), (" ", "y"), ("z", "z")]))
    core.decoder = decoders.Fuse()
    merging = PreTrainedTokenizerFast(tokenizer_object=core)
    return {"bytes": tiny_tokenizer(), "unigram": unigram, "wordpiece": wordpiece, "merging": merging}


SENTENCE = "Hello,  how are you?\nWhat is AI? The answer is 42."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bytes", SENTENCE),
        ("bytes", "Calculate é 2 + 2 🙂🙂 list"),
        ("unigram", SENTENCE),
        ("wordpiece", SENTENCE),
        ("merging", "x y==z y=y\n\nzzz==="),
    ],
)
def test_tokens_are_those_of_which_a_character_is_in_the_response(name: str, text: str) -> None:
    """At every place a response may begin and end, against the offsets that a fast tokenizer tells."""
    tokenizer = tokenizers()[name]
    read = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = read["input_ids"], read["offset_mapping"]
    n_differing = 0
    for begin in range(1, len(text)):
        for end in (begin + 1, begin + 5, len(text)):
            # A token of no characters is a special one, or white space that the tokenizer drops.
            own = [i for i, (s, e) in enumerate(offsets) if s < min(end, e) and e > begin]
            if not own:
                continue
            prompt = TokenizedPrompt(0, ids)
            [marked] = mark_responses([prompt], Responses([text], [[(begin, end)]], special=True), tokenizer)
            found = [token for span in marked.response for token in span]
            if found != list(range(max(0, own[0] - 1), own[-1] + 1)):
                n_differing += 1
    assert n_differing == 0


def test_a_tokenizer_that_tells_no_offsets_marks_each_byte() -> None:
    tokenizer = ByT5Tokenizer()
    text = "Ja, 42 ist grün. Gut"
    ids = tokenizer(text)["input_ids"]
    assert not tokenizer.is_fast
    assert ids[-1] == tokenizer.eos_token_id
    begin, end = text.index("42"), text.index(" Gut")
    [marked] = mark_responses(
        [TokenizedPrompt(0, ids)], Responses([text], [[(begin, end)]], special=True), tokenizer
    )
    # One id a byte, of which ü has two; the end of the text has a token of no response.
    assert marked.response == (range(begin - 1, end + 1),)
    [marked] = mark_responses(
        [TokenizedPrompt(0, ids)], Responses([text], [[(begin, len(text))]], special=True), tokenizer
    )
    assert marked.response == (range(begin - 1, len(ids) - 1),)


def test_several_responses_are_one_where_they_touch() -> None:
    text = "t1 t2 t3 t4 t5 t6 t7 t8"
    tokenizer, prompt = word_tokenizer(), TokenizedPrompt(0, list(range(1, 9)))

    def marked(*spans: tuple[int, int]) -> tuple[range, ...]:
        [found] = mark_responses([prompt], Responses([text], [spans], special=True), tokenizer)
        return found.response

    assert marked((3, 5), (12, 14)) == (range(2), range(3, 5))
    assert marked((3, 5), (9, 11)) == (range(2), range(2, 4))
    assert marked((3, 5), (6, 11)) == (range(4),)
    assert marked((0, 2), (2, 2)) == (range(1),)


# --- Chats


def rendered(rows: Any, template: str) -> tuple[list[str], list[list[str]], dict[str, list[int]]]:
    """The texts of chats, and the responses in each."""
    own = ChatTemplate(tiny_tokenizer(template=None), "base", template)
    texts, spans, remarks = render_responses(make_prompts(rows, responses=True).prompts, own)
    return texts, [[t[a:b] for a, b in each] for t, each in zip(texts, spans, strict=True)], remarks


def test_the_assistants_turns_are_responses_with_marks_and_without(pair: Any) -> None:
    for template in (TEMPLATE, MARKS):
        _, [found], remarks = rendered([{"messages": CHAT}], template)
        assert found == ["The answer is 42\n", "It is the capital.\n"]
        assert remarks == {}
        tokenizer = tiny_tokenizer(template=template)
        diff = compare(pair, [{"messages": CHAT}], tokenizer=tokenizer, chat_template="base")
        assert said(diff) == [" The answer is 42\n It is the capital.\n"]


def test_marked_tokens_are_those_that_transformers_masks(pair: Any) -> None:
    tokenizer = tiny_tokenizer(template=MARKS)
    for chat in (CHAT, CHAT[:4], CHAT[2:]):
        read = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        mask = [*read["assistant_masks"], 0]
        diff = compare(pair, [{"messages": chat}], tokenizer=tokenizer, chat_template="base")
        assert compared(diff) == [[i for i in range(len(mask) - 1) if mask[i] or mask[i + 1]]]


def test_marks_within_a_macro_are_where_they_stand(pair: Any) -> None:
    [text], [found], _ = rendered([{"messages": CHAT}], MACRO)
    assert found == ["The answer is 42", "It is the capital."]
    assert text.endswith("[assistant] It is the capital.|")


def test_marks_that_a_template_moves_are_not_followed(pair: Any) -> None:
    """It trims what it has marked, so that characters around a mark would keep white space in the text."""
    said = "{% set said %}{% generation %} {{ m.content }} {% endgeneration %}{% endset %}{{ said | trim }}"
    template = MARKS.replace("{% generation %}{{ m.content }}\n{% endgeneration %}", f"{said}{{{{ '\\n' }}}}")
    assert template != MARKS
    [text], [found], _ = rendered([{"messages": CHAT}], template)
    assert text == rendered([{"messages": CHAT}], MARKS)[0][0]
    assert found == ["The answer is 42\n", "It is the capital.\n"]


def test_a_chat_that_ends_with_the_user_is_read_up_to_where_the_assistant_begins(pair: Any) -> None:
    tokenizer = tiny_tokenizer()
    diff = compare(pair, [{"messages": CHAT[:4]}], tokenizer=tokenizer, chat_template="base")
    assert diff.prompts[0].rendered is not None
    assert diff.prompts[0].rendered.endswith("[user] And Paris?\n[assistant] ")
    assert said(diff) == [" The answer is 42\n"]


def test_of_a_row_with_a_response_that_alone_is_one() -> None:
    before, answer = CHAT[:4], "Paris."
    turn = {"role": "assistant", "content": answer}
    rows = [
        {"prompt": "Hello", "response": answer},
        {"prompt": before, "completion": [turn]},
        {"prompt": before, "response": answer},
        {"messages": before, "response": answer},
        {"prompt": "Hello", "response": [turn, {"role": "user", "content": "Why?"}, turn]},
    ]
    for template in (TEMPLATE, MARKS):
        texts, found, _ = rendered(rows, template)
        assert found == [[f"{answer}\n"]] * 4 + [[f"{answer}\n"] * 2]
        assert texts[0] == f"<s>[user] Hello\n[assistant] {answer}\n"
        assert texts[1] == texts[2] == texts[3]
        assert texts[1].startswith("<s>[system] Be brief.\n")


REWRITES = TEMPLATE.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '-')")
LAST_IS_OTHER = TEMPLATE.replace("{{ m['content'] }}", "{{ '+' if loop.last }}{{ m['content'] }}")
THINKS = TEMPLATE.replace("[assistant] ", "[assistant] <think>")
ALTERNATES = (
    "{% if messages[-1].role == 'user' and messages | length > 1 %}{{ raise_exception('no') }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (REWRITES, CHAT[1:], 1),
        (LAST_IS_OTHER, CHAT[1:], 1),
        (ALTERNATES + TEMPLATE, CHAT[1:], 3),
        (THINKS, CHAT[1:3], 1),
        (TEMPLATE, CHAT[2:], 0),
    ],
)
def test_a_template_by_which_turns_cannot_be_told_apart_is_refused(
    pair: Any, template: str, chat: Any, message: int
) -> None:
    rows = [{"messages": chat}]
    says = f"Prompt 0 .* the response in message {message} begins and ends cannot be seen"
    options: Any = {"tokenizer": tiny_tokenizer(template=template), "chat_template": "base"}
    with pytest.raises(PositionError, match=says) as caught:
        compare(pair, rows, **options)
    assert caught.value.option == "position"
    assert "{% generation %}" in str(caught.value)


def test_a_template_that_rewrites_turns_before_the_response_is_refused_with_marks_too() -> None:
    template = MARKS.replace(
        "{% generation %}{{ m.content }}", "{% generation %}{{ m.content if loop.last }}"
    )
    assert rendered([{"messages": CHAT[1:]}], template)[1] == [["\n", "It is the capital.\n"]]
    with pytest.raises(PositionError, match="in message 4 begins and ends cannot be seen"):
        rendered([{"prompt": [*CHAT[1:4], CHAT[4]], "response": "Yes."}], template)


def test_a_template_without_a_beginning_of_answers_is_told_of(pair: Any) -> None:
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    _, [found], remarks = rendered([{"messages": CHAT[1:3]}], template)
    assert found == ["<assistant> The answer is 42\n"]
    assert remarks == {NO_HEADER: [0]}
    diff = compare(
        pair,
        [{"messages": CHAT[1:3]}],
        tokenizer=tiny_tokenizer(template=template),
        chat_template="base",
    )
    assert notes_of(diff, "chat-template") == [f"{NO_HEADER}: prompts 0 (1 of 1)"]


def test_a_template_that_marks_nothing_of_a_chat_names_it(pair: Any) -> None:
    template = MARKS.replace("== 'assistant'", "== 'model'")
    with pytest.raises(PositionError, match=r"Prompt 0: none of the \d+ tokens .* marks none"):
        compare(pair, [{"messages": CHAT}], tokenizer=tiny_tokenizer(template=template), chat_template="base")


# --- Rows


def files(folder: Path) -> Iterator[Path]:
    """The same rows in every kind of file."""
    lines = [json.dumps(row) for row in ROWS]
    (folder / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "p.json").write_text(f"[{','.join(lines)}]", encoding="utf-8")
    whole = [{"response": None, "completion": None, **row} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), folder / "p.parquet")
    with (folder / "p.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "response", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
    yield from (folder / f"p.{suffix}" for suffix in ("jsonl", "json", "parquet", "csv"))


def test_every_form_of_rows_gives_the_same_prompts(tmp_path: Path) -> None:
    expected = [Prompt(row["prompt"], response=list(row.values())[1]) for row in ROWS]
    assert make_prompts(ROWS, responses=True).prompts == expected
    assert make_prompts(expected, responses=True).prompts == expected
    for path in files(tmp_path):
        found = make_prompts(path, responses=True)
        assert found.prompts == expected, path
        assert found.notes.texts == []


def test_a_chat_in_parquet_keeps_no_key_that_it_does_not_have(tmp_path: Path) -> None:
    turn = {"role": "assistant", "content": "It is."}
    row = {"prompt": CHAT[1:2], "completion": [turn, {"role": "tool", "content": "4", "name": "add"}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "p.parquet")
    found = make_prompts(tmp_path / "p.parquet", responses=True)
    assert found.prompts == make_prompts([row], responses=True).prompts


@pytest.mark.parametrize("position", ["last", "mean", "all", "1"])
def test_other_positions_leave_responses_out_and_say_so(pair: Any, position: str) -> None:
    rows = [
        {**row, "response": row.get("response", 42)} for row in ROWS
    ]  # of what is not read, nothing is asked
    told = "prompts: rows that have `{}`, which --position response of activation-diff reads: {}"
    plain = compare(pair, [row["prompt"] + " t3" for row in rows], position=position)
    diff = compare(pair, [{**row, "prompt": row["prompt"] + " t3"} for row in rows], position=position)
    assert diff.results == plain.results
    assert notes_of(diff, "prompt-rows") == [told.format("response", 5), told.format("completion", 1)]


def test_prompts_that_were_made_with_responses_are_compared_without(pair: Any) -> None:
    prompts = [Prompt(f"{row['prompt']} t3", response=" t4") for row in ROWS]
    diff = compare(pair, prompts, position="last")
    assert diff.results == compare(pair, [prompt.text for prompt in prompts], position="last").results
    [note] = notes_of(diff, "prompt-rows")
    assert note.startswith(
        "responses are left out, which --position response of activation-diff compares: prompts 0, 1, 2"
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "response": " "}, "line 2: `response` is empty"),
        ({"prompt": "a", "completion": 42}, "line 2: `completion` is 42, not a text"),
        ({"prompt": "a", "response": [{"role": "assistant"}]}, "line 2: `response` is not a chat: message 0"),
        ({"prompt": "a", "response": "\ud83d"}, "line 2: `response` is not valid Unicode"),
    ],
)
def test_a_response_that_is_none_names_its_line(tmp_path: Path, row: Any, says: str) -> None:
    rows = [{"prompt": "a", "response": "b"}, row]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(PromptsError, match=says):
        make_prompts(tmp_path / "p.jsonl", responses=True)


def test_of_two_responses_the_first_is_read() -> None:
    found = make_prompts([{"prompt": "a", "completion": "c", "response": "b"}], responses=True)
    assert found.prompts == [Prompt("a", response="b")]
    assert found.notes.texts == [
        "prompts: rows that have `response` and `completion`, of which `response` was read: 1"
    ]


@pytest.mark.parametrize(
    "row",
    ["t5", {"prompt": "t5"}, {"prompt": "t5", "response": ""}, {"text": "t5", "group": "g"}],
)
def test_a_prompt_without_a_response_is_named_before_a_model_is_loaded(row: Any) -> None:
    kind, says = PositionError, r"Prompt 1 \('t5'\) has no response"
    if isinstance(row, dict) and "response" in row:
        kind, says = PromptsError, "prompt 1: `response` is empty"  # type: ignore[assignment]
    with pytest.raises(kind, match=says):
        lazarus.activation_diff("not loaded", "not loaded", [ROWS[0], row], position="response")


def test_a_chat_without_a_turn_of_the_assistant_is_named() -> None:
    options: Any = {"position": "response", "chat_template": "base"}
    with pytest.raises(PositionError, match=r"Prompt 0 .* has no response") as caught:
        lazarus.activation_diff("not loaded", "not loaded", [{"messages": CHAT[:2]}], **options)
    assert caught.value.option == "position"
    rows = [{"prompt": "Hi", "response": CHAT[1:2]}]
    with pytest.raises(PositionError, match=r"Prompt 0 .* has no response"):
        lazarus.activation_diff("not loaded", "not loaded", rows, **options)


def test_a_response_of_messages_needs_a_template() -> None:
    for row in ({"prompt": "Hi", "response": CHAT[2:3]}, Prompt("Hi", response=tuple(CHAT[2:3]))):
        with pytest.raises(PromptsError, match="Prompt 0 is a chat"):
            lazarus.activation_diff("not loaded", "not loaded", [row], position="response")


# --- Ways through a run


def test_what_is_cut_off_is_not_compared(pair: Any) -> None:
    small = tuple(tiny_llama(seed, max_position_embeddings=5) for seed in (0, 1))
    rows = [{"prompt": "t1 t2 t3", "response": " t4 t5 t6 t7"}, {"prompt": "t8 t9", "response": " t10"}]
    with pytest.raises(PromptTooLongError, match=r"Prompt 0 .* has 7 tokens"):
        compare(small, rows)
    diff = compare(small, rows, truncate=True)
    assert compared(diff) == [[2, 3, 4], [1, 2]]
    expected = (kl(small, [1, 2, 3, 4, 5], [2, 3, 4]) + kl(small, [8, 9, 10], [1, 2])) / 2
    assert diff.record.output is not None
    assert diff.record.output.kl_base_finetuned == pytest.approx(expected, rel=1e-4)
    gone = {"prompt": "t1 t2 t3 t4 t5", "response": " t6"}
    with pytest.raises(PositionError, match=r"Prompt 2: none of the 5 tokens .* was cut off") as caught:
        compare(small, [*rows, gone], truncate=True)
    assert caught.value.option == "position"


def test_the_same_text_with_another_response_is_no_repeat(pair: Any) -> None:
    rows = [
        {"prompt": "t5 t17", "response": " t80 t3"},
        {"prompt": "t5 t17 t80", "response": " t3"},
        {"prompt": "t5 t17", "response": " t80 t3"},
    ]
    diff = compare(pair, rows)
    [note] = notes_of(diff, "repeated-prompts")
    assert note.startswith("1 of 3 prompts are repeats")
    own = [kl(pair, [5, 17, 80, 3], marked) for marked in ([1, 2, 3], [2, 3])]
    assert diff.record.output is not None
    assert diff.record.output.kl_base_finetuned == pytest.approx((2 * own[0] + own[1]) / 3, rel=1e-4)


@pytest.mark.parametrize("first", [40, 32])
def test_a_shared_prefix_ends_before_the_first_response(pair: Any, first: int) -> None:
    """Forty tokens are the same in all; the response of one prompt begins after `first` of them."""
    common = [f"t{i}" for i in range(20, 60)]
    rows = [{"prompt": " ".join([*common, f"t{i}"]), "response": f" t{i + 3} t{i + 5}"} for i in range(30)]
    rows[7] = {"prompt": " ".join(common[:first]), "response": " ".join(["", *common[first:], "t70", "t71"])}
    diff = compare(pair, rows, batch_tokens=512, token_prompts="7,8")
    [note] = notes_of(diff, "shared-prefix")
    assert note == f"the first {min(first - 1, 40)} tokens, the same in all prompts, ran once"
    for prompt in (7, 8):
        alone = compare(pair, [rows[prompt]], token_prompts="0")
        ours, [theirs] = traces(diff)[prompt - 7], traces(alone)
        assert ours.positions == theirs.positions
        np.testing.assert_allclose(ours.divergence, theirs.divergence, atol=1e-6)


def test_streams_shards_and_batches_give_the_same(pair: Any, tmp_path: Path) -> None:
    base, tuned = (
        save_model(tmp_path / name, model, word_tokenizer())
        for name, model in zip(("base", "tuned"), pair, strict=True)
    )
    options: Any = {"position": "response", "localize": True, "batch_tokens": 16}
    resident = lazarus.activation_diff(base, tuned, ROWS, **options)
    work = str(tmp_path / "work")
    ways: list[Any] = [{"memory": "stream"}, {"work_dir": work}, {"work_dir": work}]
    for more in ways:
        other = lazarus.activation_diff(base, tuned, ROWS, **options, **more)
        for name in ("divergence", "relative_l2", "local_relative_l2"):
            np.testing.assert_allclose(
                other.results.column(name), resident.results.column(name), rtol=1e-5, atol=1e-7
            )
        assert compared(other) == compared(resident) == MARKED
        assert other.record.output is not None
        assert resident.record.output is not None
        assert other.record.output.kl_base_finetuned == pytest.approx(
            resident.record.output.kl_base_finetuned
        )
        assert other.record.layers[0].noise_floor is not None
    assert "shards-reused" in other.note_codes
    # The same ids, of which others are compared, are another run.
    rows = [{**ROWS[0], "prompt": "t5 t17", "response": " t80 t3 t41"}, *ROWS[1:]]
    with pytest.raises(UsageError, match="base prompts"):
        lazarus.activation_diff(base, tuned, rows, work_dir=work, **options)


def test_an_attribution_adds_up_to_the_kl_of_the_response() -> None:
    base = tiny_llama(num_hidden_layers=2)
    options: Any = {"batch_tokens": 512, "no_noise_floor": True}
    found = compare((base, perturbed(base, 0.01)), ROWS[:2], attribute="blocks", **options).record
    assert found.attribution is not None
    assert found.output is not None
    assert found.attribution.kl == pytest.approx(found.output.kl_base_finetuned, rel=1e-4)
    assert found.attribution.completeness_error < 0.02
    assert sum(group.nats for group in found.attribution.groups) == pytest.approx(found.attribution.sum)


def test_an_encoder_compares_the_response_and_not_what_ends_the_text() -> None:
    settings: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    base = BertForMaskedLM(BertConfig(vocab_size=120, intermediate_size=64, **settings)).eval()
    rows = [{"prompt": "What is AI?", "response": " The answer"}]
    diff = compare((base, perturbed(base)), rows, tokenizer=tokenizers()["wordpiece"])
    [trace] = traces(diff)
    assert trace.tokens[0] == "?"
    assert trace.positions[-1] == diff.prompts[0].n_tokens - 2
    assert "[SEP]" not in trace.tokens


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"align": "text"}, "compares where the text ends, and `position` is response"),
        ({"token_prompts": "0,9"}, "there is no prompt 9 among 5"),
    ],
)
def test_what_does_not_go_with_it(pair: Any, options: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        compare(pair, **options)


def test_token_prompts_choose_of_which_prompts_tokens_are_kept(pair: Any) -> None:
    assert compared(compare(pair, token_prompts="3,1")) == [MARKED[1], MARKED[3]]
    assert compare(pair, token_prompts="none").record.tokens is None


def test_a_part_of_the_text_that_has_no_token_is_told(pair: Any) -> None:
    """A beginning of the text may have no token where the whole has one."""
    core = Tokenizer(models.WordLevel({"t1": 1, "t2t3": 2}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="t1")
    with pytest.raises(LazarusError, match="Prompt 0: the tokenizer fails"):
        compare(pair, [{"prompt": "t1 t2", "response": "t3"}], tokenizer=tokenizer)


# --- The command line


def test_the_command_compares_the_responses_of_a_file(pair: Any, tmp_path: Path) -> None:
    for name, model in zip(("base", "tuned"), pair, strict=True):
        save_model(tmp_path / name, model, word_tokenizer())
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = ["-b", str(tmp_path / "base"), "-f", str(tmp_path / "tuned"), "-p", f"@{tmp_path / 'p.jsonl'}"]
    command = ["introspect", "activation-diff", *given, "--position", "response"]
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, [*command, "-o", str(out), "-o", str(tmp_path / "out.html")])
    assert result.exit_code == 0, result.stderr
    assert "Compared: every token of the response and the one before it" in result.stdout
    saved = json.loads(out.read_text())
    assert saved["settings"]["position"] == "response"
    assert [trace["positions"] for trace in saved["tokens"]] == MARKED
    expected = np.mean([kl(pair, ids, marked) for ids, marked in zip(IDS, MARKED, strict=True)])
    assert saved["output"]["kl_base_finetuned"] == pytest.approx(expected, rel=1e-4)
    (tmp_path / "p.jsonl").write_text("\n".join([*lines, '{"prompt": "t1"}']), encoding="utf-8")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "Prompt 5 ('t1') has no response, and --position response compares nothing else" in result.stderr
