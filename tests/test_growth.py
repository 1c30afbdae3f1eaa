"""A tokenizer may make a text longer before it cuts it: how much is known from its definition."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import lazarus
from factories import tiny_tokenizer
from layouts import compare, edit_json
from lazarus.bounds import MOST_CHARACTERS, VARIABLE
from lazarus.errors import ModelError, PromptTooLongError
from lazarus.growth import growth, growth_of, refusal

TENFOLD = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
MANYFOLD = {"type": "Sequence", "normalizers": [{**TENFOLD, "content": "a" * 1000}] * 3}
CHARSMAP = base64.b64encode((4).to_bytes(4, "little") + b"trie" + b"abc\0abcdef\0").decode()


@pytest.mark.parametrize(
    ("definition", "factor"),
    [
        (None, 1),
        ({"type": "NFKC"}, 1),
        (TENFOLD, 10),
        ({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, 1),
        ({"type": "Replace", "pattern": {"String": ""}, "content": "xx"}, 3),
        ({"type": "Replace", "pattern": {"Regex": "a*"}, "content": "xx"}, 3),
        ({"type": "Prepend", "prepend": "▁"}, 2),
        ({"type": "Precompiled", "precompiled_charsmap": CHARSMAP}, 6),
        ({"type": "ByteLevel"}, 4),
        (MANYFOLD, 1e9),
        ({"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 2000}, 1e30),
    ],
)
def test_what_a_definition_may_make_of_a_character(definition: Any, factor: float) -> None:
    found = growth(definition)
    assert found == factor or found >= factor == 1e30


@pytest.mark.parametrize("text", ["aaaa", "é" * 9, "漢字", "a b" * 3, ""])
@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Replace("a", "xyz"),
        normalizers.Prepend("▁▁"),
        normalizers.Sequence([normalizers.Replace("a", "bb"), normalizers.Replace("b", "ccc")]),
        normalizers.BertNormalizer(),
        normalizers.ByteLevel(),
    ],
)
def test_no_text_becomes_longer_than_that(normalizer: Any, text: str) -> None:
    factor = growth(json.loads(normalizer.__getstate__()))
    assert len(normalizer.normalize_str(text)) <= factor * len(text)


def test_a_tokenizer_in_memory_is_asked_for_its_parts() -> None:
    class Fast:
        backend_tokenizer = Tokenizer(models.BPE())

    Fast.backend_tokenizer.normalizer = normalizers.Replace("a", "a" * 7)
    Fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert growth_of(Fast()) == 28
    assert growth_of(tiny_tokenizer()) <= 4
    assert growth_of(object()) == 1


def test_words_of_endless_pieces_are_refused() -> None:
    assert refusal({"model": {"max_input_chars_per_word": 100, "vocab": {"a": 0}}}) is None
    assert "max_input_chars_per_word" in (refusal({"model": {"max_input_chars_per_word": 10**9}}) or "")


def test_tokens_around_a_text_have_a_limit() -> None:
    token = {"SpecialToken": {"id": "x", "type_id": 0}}

    def template(n_pieces: int, n_ids: int) -> dict[str, Any]:
        tokens = {"x": {"id": "x", "ids": [1] * n_ids, "tokens": ["x"] * n_ids}}
        pieces = [*[token] * n_pieces, {"Sequence": {"id": "A", "type_id": 0}}]
        return {"type": "TemplateProcessing", "single": pieces, "special_tokens": tokens}

    assert refusal({"post_processor": template(2, 1)}) is None
    for hostile in (template(1001, 1), template(1, 1001), template(101, 10)):
        for processor in (hostile, {"type": "Sequence", "processors": [hostile]}):
            assert "post_processor adds 10" in (refusal({"post_processor": processor}) or "")


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_tokenizer_that_grows_a_text_without_end_is_not_loaded(
    part: str, tmp_path: Path, base_folder: Path
) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(base_folder, folder)
    replaced = MANYFOLD if part == "normalizer" else {"type": "Sequence", "decoders": MANYFOLD["normalizers"]}
    edit_json(folder / "tokenizer.json", **{part: replaced})
    with pytest.raises(ModelError, match=rf"tokenizer\.json: its {part} makes up to 1e\+09 .*{VARIABLE}=1"):
        compare(base_folder, folder)


def test_a_prompt_that_no_context_has_is_refused_before_it_is_tokenised(
    base_folder: Path, finetuned_folder: Path
) -> None:
    for truncate in (False, True):
        with pytest.raises(PromptTooLongError, match=rf"has 50000000 characters.*{MOST_CHARACTERS}"):
            lazarus.activation_diff(
                str(base_folder), str(finetuned_folder), ["x" * 50_000_000], truncate=truncate
            )


def test_a_prompt_that_a_tokenizer_makes_long_is_refused(tmp_path: Path, base_folder: Path) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(base_folder, folder)
    edit_json(folder / "tokenizer.json", normalizer={**TENFOLD, "content": "a" * 10_000})
    with pytest.raises(PromptTooLongError, match=r"has 100000 characters, of each of which .* 4e\+04"):
        lazarus.activation_diff(str(folder), str(folder), ["a" * 100_000])
