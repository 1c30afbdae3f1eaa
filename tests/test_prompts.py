"""What the user types after -p, and what the library is given."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.errors import PromptsError
from lazarus.prompts import Prompt, files, make_prompts, parse_prompts


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
    assert "--no-split keeps a prompt as it is" in found.notes.texts[0]


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


CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Hi, you"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"prompt": "a, b", "group": "g"}\n\n{"text": "c\\nd"}\n'),
        ("p.ndjson", '{"prompt": "a, b", "group": "g"}\r\n{"text": "c\\nd"}\r\n'),
        ("p.jsonlines", '{"prompt": "a, b", "group": "g"}\n"c\\nd"'),
        ("P.NDJSON", '\ufeff{"prompt": "a, b", "group": "g"}\n{"text": "c\\nd"}'),
        ("p.csv", 'prompt,group\n"a, b",g\n"c\nd",\n'),
        ("p.tsv", 'prompt\tgroup\na, b\tg\n"c\nd"\t\n'),
        ("P.TSV", 'group\ttext\ng\ta, b\n\t"c\nd"\n'),
        ("p.json", '[{"prompt": "a, b", "group": "g"},\n "c\\nd"]'),
        ("p.json", '{"prompt": "a, b", "group": "g"}\n{"text": "c\\nd"}\n'),
    ],
)
def test_a_structured_file_of_any_spelling_is_its_rows(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    found = parse_prompts([f"@{path}"])
    assert found.prompts == [Prompt("a, b", "g"), Prompt("c\nd")]
    assert found.notes.texts == []


@pytest.mark.parametrize("key", ["prompts", "data", "rows"])
def test_the_one_list_of_a_json_object_is_its_rows_and_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"version": 1, key: ["a", {"prompt": "b"}, {"messages": CHAT}]}, indent=1))
    found = parse_prompts([f"@{path}"])
    assert found.prompts == [Prompt("a"), Prompt("b"), Prompt("Hi, you", None, tuple(CHAT))]
    assert found.notes.texts == [f"{path}: the prompts are those in its field `{key}`; others were not read"]


def test_a_json_object_with_a_prompt_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for row in ({"prompt": "a", "tags": ["x"]}, {"messages": CHAT}):
        path.write_text(json.dumps(row, indent=1))
        assert len(parse_prompts([f"@{path}"]).prompts) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"train": ["a"], "test": ["b"]}', r"an object with the fields \['test', 'train'\], not a list"),
        ('{"question": "a"}', r"an object with the fields \['question'\], not a list"),
        ("42", "its JSON is 42, not a list"),
        ('"a"', "its JSON is 'a', not a list"),
        ("[\n{\n]", "not JSON: .*line 3.* Write a list of texts or of objects, or an object on each line"),
        ('["a", 42]', "item 1: this is a int, not an object"),
        ('["a", " "]', "item 1: `prompt` is empty"),
        ('{"prompt": "a"}\n{"prompt": "b"', "line 2: not JSON"),
        ('{"prompt": ["a", "b"]}', r"item 0: `prompt` is \['a', 'b'\], not a text"),
        ("", "holds none"),
        ("[]", "holds none"),
    ],
)
def test_other_json_is_refused_with_what_is_expected(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PromptsError, match=says):
        parse_prompts([f"@{path}"])


@pytest.mark.parametrize(
    "name",
    ["p.jsonl.gz", "p.txt.zst", "p.XLSX", "p.arrow", "p.yaml", "p.yml", "p.pkl", "p.npy", "p.docx", "p.pdf"],
)
def test_a_file_whose_lines_are_no_prompts_is_refused_by_its_kind(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"prompts:\n- Hello\n")
    with pytest.raises(PromptsError, match=r"a \.\w+ file is .*: its lines are no prompts\. \w+"):
        parse_prompts([f"@{path}"])


def test_text_that_is_utf_16_is_not_read_with_a_nul_beside_each_letter(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("one\ntwo\n".encode("utf-16-le"))
    with pytest.raises(PromptsError, match=r"line 1: a NUL character: .*UTF-16. Convert"):
        parse_prompts([f"@{path}"])


@pytest.mark.parametrize("name", ["p.txt", "p.prompts", "-"])
@pytest.mark.parametrize("content", ['{"prompt": "a"}\n{"prompt": "b"}\n', '[\n{"text": "a"}\n]'])
def test_json_that_is_read_as_lines_of_text_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode()), encoding="utf-8"))
    given = "-" if name == "-" else str(tmp_path / name)
    (tmp_path / "p.txt").write_text(content)
    (tmp_path / "p.prompts").write_text(content)
    found = parse_prompts([f"@{given}"])
    assert [prompt.text for prompt in found.prompts] == content.split("\n")[: len(found.prompts)]
    [note] = found.notes
    assert note.code == "prompt-file"
    assert note.text.startswith(f"{given} holds JSON and was read as lines of text")


@pytest.mark.parametrize("content", ["[INST] Hi [/INST]\n{x}\n", '{"prompt": "a"}\nb\n', "{\n"])
def test_lines_that_begin_with_a_bracket_are_not_noted(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.txt"
    path.write_text(content)
    assert parse_prompts([f"@{path}"]).notes.texts == []


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.csv", "prompt\nHello, world\n", "line 2: 2 cells, and the header has 1. Put quotation marks"),
        ("p.tsv", "prompt\tgroup\na\tb\tc\n", "line 2: 3 cells, and the header has 2"),
        ("p.csv", 'prompt\n"Hello" she said\n', "line 2: its quotation marks are not those of a CSV row"),
        ("p.csv", 'prompt\na\n"b\nc\n', "its quotation marks are not those of a CSV row"),
        ("p.tsv", 'prompt\n"Hello" she said\n', "line 2: its quotation marks"),
    ],
)
def test_a_csv_row_that_would_lose_a_part_of_its_text_is_refused(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PromptsError, match=says):
        parse_prompts([f"@{path}"])


def test_cells_that_are_empty_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    chat = json.dumps(CHAT).replace('"', '""')
    path.write_text(f'prompt,messages,tools\na,,\n,"{chat}",,\n', encoding="utf-8")
    found = parse_prompts([f"@{path}"])
    assert found.prompts == [Prompt("a"), Prompt("Hi, you", None, tuple(CHAT))]
    assert found.notes.texts == []


def test_rows_of_which_something_is_not_read_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows: list[Any] = [
        {"prompt": "a", "messages": CHAT, "id": 7},
        {"prompt": "b", "messages": CHAT, "system": "Be brief.", "source": "x"},
        {"text": "c", "prompt": "d", "images": [], "system": ""},
        {"text": "e", "images": ["a.png"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = parse_prompts([f"@{path}"])
    assert [prompt.text for prompt in found.prompts] == ["a", "b", "d", "e"]
    notes = [
        "rows that have `prompt` and `messages`, of which `prompt` was read: 2",
        "rows that have `system`, which is not read: 1",
        "rows that have `prompt` and `text`, of which `prompt` was read: 1",
        "rows that have `images`, which is not read: 1",
    ]
    assert found.notes.texts == [f"{path}: {note}" for note in notes]
    assert make_prompts(rows).notes.texts == [f"prompts: {note}" for note in notes]


# --- Chats with tools, from every kind of row

TOOLS: list[dict[str, Any]] = [
    {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}},
    {"name": "find", "parameters": {"properties": {"query": {"type": "string", "enum": ["x", "y"]}}}},
]
AGENT: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Add"}]},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "c1", "function": {"name": "add", "arguments": {"a": 2}}},
            {"id": "c2", "function": {"name": "find", "arguments": {"query": "x"}}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}]},
]
WHOLE = Prompt("2", None, tuple(AGENT), {"tools": TOOLS, "enable_thinking": False})


def agent_row(**changes: Any) -> dict[str, Any]:
    return {
        "messages": AGENT,
        "tools": TOOLS,
        "chat_template_kwargs": {"enable_thinking": False},
        **changes,
    }


def test_an_agents_chat_is_whole_from_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    cells = {name: json.dumps(value) for name, value in agent_row().items()}
    (tmp_path / "p.jsonl").write_text(json.dumps(agent_row()))
    (tmp_path / "p.json").write_text(json.dumps([agent_row(tools=json.dumps(TOOLS))]))
    (tmp_path / "each.json").write_text(json.dumps([agent_row(tools=list(map(json.dumps, TOOLS)))]))
    for name, separator in (("p.csv", ","), ("p.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, delimiter=separator).writerows([cells.keys(), cells.values()])
    parquet.write_table(pyarrow.Table.from_pylist([agent_row()]), tmp_path / "p.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([cells]), tmp_path / "cells.parquet")
    for path in tmp_path.iterdir():
        assert parse_prompts([f"@{path}"]).prompts == [WHOLE], path


def test_what_parquet_fills_in_is_absent_and_noted(tmp_path: Path) -> None:
    """One schema for all rows: the arguments of one function are null keys in the calls of the other."""
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hi, you"}]}]
    rows = [agent_row(), {"messages": chat, "tools": None}, {"messages": chat}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    filled = parquet.read_table(path).to_pylist()
    assert filled[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 2, "query": None}
    found = parse_prompts([f"@{path}"])
    assert found.prompts == [WHOLE, *[Prompt("Hi, you", None, tuple(chat))] * 2]
    note = "rows with null within a message or a tool, which is what Parquet has for an absent key: 1"
    assert found.notes.texts == [f"{path}: {note}"]


def test_null_that_a_row_of_json_has_is_kept_and_noted() -> None:
    calls = [{"function": {"name": "find", "arguments": {"query": None}}}]
    rows = [{"messages": [{"role": "assistant", "content": None, "name": None, "tool_calls": calls}]}]
    found = make_prompts(rows)
    assert found.prompts[0].messages == ({"role": "assistant", "tool_calls": calls},)
    note = "rows with null within a message, such as in a tool call, which the template is given"
    assert found.notes.texts == [f"prompts: {note}: 1"]


def test_a_map_of_parquet_is_an_object(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    call = pyarrow.struct(
        [("name", pyarrow.string()), ("arguments", pyarrow.map_(pyarrow.string(), pyarrow.int64()))]
    )
    message = pyarrow.struct([("role", pyarrow.string()), ("tool_calls", pyarrow.list_(call))])
    chat = [{"role": "assistant", "tool_calls": [{"name": "add", "arguments": [("a", 2)]}]}]
    column = pyarrow.array([chat], pyarrow.list_(message))
    parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "p.parquet")
    [prompt] = parse_prompts([f"@{tmp_path / 'p.parquet'}"]).prompts
    assert prompt.messages == ({"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]},)


def test_rows_of_a_pandas_table_are_rows(tmp_path: Path) -> None:
    import pandas

    table = pandas.DataFrame([agent_row()])
    table.to_parquet(tmp_path / "p.parquet")
    read = pandas.read_parquet(tmp_path / "p.parquet")
    assert type(read["messages"][0]).__name__ == "ndarray"
    assert make_prompts(table.to_dict("records")).prompts == [WHOLE]
    [prompt] = make_prompts(read.to_dict("records")).prompts
    assert prompt.messages is not None
    assert prompt.messages[0] == {"role": "user", "content": [{"type": "text", "text": "Add"}]}
    with pytest.raises(PromptsError, match=r"a DataFrame is no list of prompts.*to_dict"):
        make_prompts(table)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [1]}], "a"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "a"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "a\nb",
        ),
        ([{"role": "assistant", "tool_calls": [{"name": "é"}]}], '{"tool_calls": [{"name": "é"}]}'),
    ],
)
def test_a_chat_is_shown_by_the_last_text_in_it(messages: list[Any], text: str) -> None:
    assert make_prompts([{"messages": messages}]).prompts[0].text == text


def test_a_prompt_that_is_a_list_of_messages_is_a_chat() -> None:
    row = {"prompt": CHAT, "completion": [{"role": "assistant", "content": "Hello"}]}
    assert make_prompts([row]).prompts == [Prompt("Hi, you", None, tuple(CHAT))]


def test_the_library_is_not_given_the_keys_of_a_row_as_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a, b"}')
    rows: list[Any] = [{"prompt": "a, b"}, Prompt("a, b"), path, [Prompt("a, b")], ("a, b",)]
    for row in rows:
        assert make_prompts(row).prompts == [Prompt("a, b")]
    for wrong in (None, 42):
        with pytest.raises(PromptsError, match="is no list of prompts"):
            make_prompts(wrong)  # type: ignore[arg-type]  # what a caller without a type checker does
    with pytest.raises(PromptsError, match="`messages` is not a chat: message 0 has no `role`"):
        make_prompts([Prompt("a", None, ({"content": "a"},))])
    with pytest.raises(PromptsError, match="Prompt 0 is not valid Unicode"):
        make_prompts([Prompt("a", for_template={"tools": [{"name": "\ud83d"}]})])


def test_a_small_parquet_file_unpacks_to_no_endless_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 5000), ["Hello " * 1000])
    parquet.write_table(pyarrow.table({"prompt": column}), path)
    assert len(parse_prompts([f"@{path}"]).prompts) == 5000
    monkeypatch.setattr(files, "MOST_UNPACKED", 2**20)
    with pytest.raises(PromptsError, match="MiB, the limit for a file of its size"):
        parse_prompts([f"@{path}"])
