"""What the user types after -p, and what the library is given."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.errors import PromptsError
from lazarus.prompts import Prompt, make_prompts, parse_prompts


def texts(*values: str, **options: Any) -> list[str]:
    return [prompt.text for prompt in parse_prompts(values, **options).prompts]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("prompt1,prompt2,prompt3", ["prompt1", "prompt2", "prompt3"]),
        (" a , b\t,c ", ["a", "b", "c"]),
        ('"Hello, world",Hi', ["Hello, world", "Hi"]),
        ('a, "b, c" ', ["a", "b, c"]),
        ('"say ""hi"""', ['say "hi"']),
        ("a,,b,", ["a", "b"]),
        ("@@user hello", ["@user hello"]),
        ("a,@@b", ["a", "@b"]),
        ("@@@x", ["@@x"]),
        ("Ünïcode,日本語", ["Ünïcode", "日本語"]),
        ('it\'s a "quote" inside', ['it\'s a "quote" inside']),
    ],
)
def test_the_comma_separated_form(value: str, expected: list[str]) -> None:
    assert texts(value) == expected


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"])), min_size=1))
def test_whatever_csv_writes_is_read_back(items: list[str]) -> None:
    class Joined(list[str]):
        write = list.append

    out = Joined()
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="").writerow(items)
    expected = [
        item.strip().removeprefix("@") if item.strip()[:2] == "@@" else item.strip() for item in items
    ]
    if not any(expected) or any(item.strip()[:1] == "@" and item.strip()[:2] != "@@" for item in items):
        with pytest.raises(PromptsError):
            parse_prompts(out)
    else:
        assert texts(*out) == [item for item in expected if item]


def test_no_split_keeps_a_prompt_whole() -> None:
    assert texts("Hello, world", ' "a" ', no_split=True) == ["Hello, world", ' "a" ']
    assert texts("@@a, b", no_split=True) == ["@a, b"]
    assert texts("line one\nline two", no_split=True) == ["line one\nline two"]


def test_several_values_are_one_list_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("from the file\n", encoding="utf-8")
    assert texts("a,b", f"@{path}", "c") == ["a", "b", "from the file", "c"]


def test_a_quotation_mark_that_csv_would_lose_is_noted() -> None:
    found = parse_prompts(['"Hello" she said'])
    assert [prompt.text for prompt in found.prompts] == ["Hello she said"]
    assert "--no-split keeps a prompt as it is" in found.notes[0]


def test_structured_files_keep_texts_whole_and_carry_groups_and_chats(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "  two\nlines ", "group": "on"},
        {"text": "a, b", "group": 3, "other": None},
        {"messages": chat},
        {"prompt": None, "text": "fallback"},
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert parse_prompts([f"@{path}"]).prompts == [
        Prompt("  two\nlines ", "on"),
        Prompt("a, b", "3"),
        Prompt("Hi", None, tuple(chat)),
        Prompt("fallback"),
    ]


def test_a_chat_in_a_csv_cell_and_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    chat = [{"role": "user", "content": "Hi, you"}]
    with (tmp_path / "p.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["messages", "group"], [json.dumps(chat), "a"]])
    parquet.write_table(pyarrow.table({"messages": [chat], "group": ["a"]}), tmp_path / "p.parquet")
    for name in ("p.csv", "p.parquet"):
        assert parse_prompts([f"@{tmp_path / name}"]).prompts == [Prompt("Hi, you", "a", tuple(chat))]


def test_the_library_takes_texts_rows_and_prompts() -> None:
    given_prompts: list[Any] = ["a, b", {"text": "c", "group": "g"}, Prompt("d")]
    assert make_prompts(given_prompts).prompts == [Prompt("a, b"), Prompt("c", "g"), Prompt("d")]
    assert make_prompts("a,b").prompts == [Prompt("a"), Prompt("b")]
    assert make_prompts("a,b", no_split=True).prompts == [Prompt("a,b")]
    with pytest.raises(PromptsError, match="prompt 1: no prompt; its fields are"):
        make_prompts(["a", {"question": "b"}])


def test_a_line_ends_only_where_an_editor_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("one\u2028still one\r\ntwo\x0cstill two\rthree\n".encode())
    assert texts(f"@{path}") == ["one\u2028still one", "two\x0cstill two", "three"]


def test_a_json_file_is_lines_of_text_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('["a"]\n', encoding="utf-8")
    found = parse_prompts([f"@{path}"])
    assert [prompt.text for prompt in found.prompts] == ['["a"]']
    assert "is a .jsonl" in found.notes[0]
