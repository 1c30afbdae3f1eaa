"""Prompts that are not there, cannot be read, or do not fit the models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import patch

import pyarrow
import pyarrow.parquet

from bad_input.kind import BadInput, Prepare, compare, holding, typed
from factories import save_model, tiny_llama, tiny_tokenizer

CHAT = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})


def _jsonl(*lines: str) -> Prepare:
    return holding("prompts.jsonl", "\n".join(lines) + "\n", p="@prompts.jsonl")


def _parquet(**columns: list[object]) -> Prepare:
    def prepare(folder: Path) -> list[str]:
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "prompts.parquet")
        return compare(p="@prompts.parquet")

    return prepare


def _a_folder(folder: Path) -> list[str]:
    (folder / "prompts").mkdir()
    return compare(p="@prompts")


def _no_template(folder: Path) -> list[str]:
    save_model(folder / "plain", tiny_llama(), tiny_tokenizer(template=None))
    return compare("--chat-template", "finetuned", f="plain")


def _two_parts(folder: Path) -> list[str]:
    parts = [{"type": "text", "text": text} for text in ("Hello", "there")]
    _jsonl(json.dumps({"messages": [{"role": "user", "content": parts}]}))(folder)
    return compare("--chat-template", "base", p="@prompts.jsonl")


def _tokenizing(folder: Path) -> list[str]:
    _jsonl('{"prompt": "Hello", "chat_template_kwargs": {"tokenize": true}}')(folder)
    return compare("--chat-template", "base", p="@prompts.jsonl")


def _rewritten(folder: Path) -> list[str]:
    (folder / "chat.jinja").write_text("{{ messages | length }}{{ messages[-1].content }}", encoding="utf-8")
    _jsonl('{"prompt": "Hello", "response": "Hi"}')(folder)
    return compare("--chat-template", "chat.jinja", "--position", "response", p="@prompts.jsonl")


def _cut_off(folder: Path) -> list[str]:
    _jsonl(json.dumps({"prompt": "Hello" + " AI" * 80, "response": " Hi"}))(folder)
    return compare("--truncate", "--position", "response", p="@prompts.jsonl")


READING = (
    BadInput("no prompt", "`-p ''`", typed(p=""), ("No prompt: -p ''", "@prompts.txt"), exit_code=2),
    BadInput(
        "only commas",
        "`-p ' , ,'`",
        typed(p=" , ,"),
        ("No prompt: -p ' , ,'", "@prompts.txt"),
        exit_code=2,
    ),
    BadInput(
        "an empty prompt kept whole",
        "`--no-split -p ''`",
        typed("--no-split", p=""),
        ("Prompt 0 is empty", "Give it a text"),
        exit_code=2,
    ),
    BadInput(
        "standard input empty",
        "`-p @-` with nothing on standard input",
        typed(p="@-"),
        ("No prompt: -p '@-'", "@prompts.txt"),
        exit_code=2,
    ),
    BadInput(
        "standard input twice",
        "`-p @- -p @-`",
        typed("-p", "@-", p="@-"),
        ("@-", "twice", "Give it once"),
        exit_code=2,
        stdin=b"Hello\n",
    ),
    BadInput(
        "standard input closed",
        "`-p @- <&-`: standard input is closed",
        typed(p="@-"),
        ("-p @-", "no standard input", "name a file"),
        exit_code=2,
        around=lambda: patch("sys.stdin", None),
    ),
    BadInput(
        "no file after the at sign",
        "`-p @`",
        typed(p="@"),
        ("-p @", "no file is named", "@prompts.txt"),
        exit_code=2,
    ),
    BadInput(
        "an item with an at sign",
        "`-p 'Hello,@prompts.txt'`",
        typed(p="Hello,@prompts.txt"),
        ("'@prompts.txt'", "a -p of its own", "@@prompts.txt"),
        exit_code=2,
    ),
    BadInput(
        "an unquoted line break",
        "a line break in `-p`, without quotation marks",
        typed(p="Hello\nWorld"),
        ("-p 'Hello\\nWorld'", "line break outside", "Quote", "--no-split"),
        exit_code=2,
    ),
    BadInput(
        "bytes that are no text",
        "`-p $'Hello \\xff'`: bytes that are not UTF-8",
        typed(p="Hello \udcff"),
        ("Prompt 0", "'\\udcff'", "index 6", "UTF-8"),
        exit_code=2,
    ),
    BadInput(
        "prompt file missing",
        "`-p @promts.txt`, which is not there",
        typed(p="@promts.txt"),
        ("-p @promts.txt", "No such file", "Check the path"),
        exit_code=2,
    ),
    BadInput(
        "prompt file a folder",
        "`-p @prompts`, which is a folder",
        _a_folder,
        ("-p @prompts", "folder", "Name a file"),
        exit_code=2,
    ),
    BadInput(
        "prompt file empty",
        "`-p @prompts.txt`, which is empty",
        holding("prompts.txt", "\n \n", p="@prompts.txt"),
        ("No prompt: -p '@prompts.txt'", "Give one"),
        exit_code=2,
    ),
    BadInput(
        "prompt file not UTF-8",
        "a prompt file in Latin-1",
        holding("prompts.txt", b"Hello\nCaf\xe9\n", p="@prompts.txt"),
        ("-p @prompts.txt, line 2", "not UTF-8", "0xe9", "Convert"),
        exit_code=2,
    ),
    BadInput(
        "jsonl line broken",
        "a `.jsonl` file with a line cut short",
        _jsonl('{"prompt": "Hello"}', '{"prompt": "Wor'),
        ("-p @prompts.jsonl, line 2", "not JSON", "one object on each line"),
        exit_code=2,
    ),
    BadInput(
        "jsonl line too deep",
        "a `.jsonl` line of 100,000 brackets",
        _jsonl("[" * 100_000),
        ("-p @prompts.jsonl, line 1", "brackets", "one object on each line"),
        exit_code=2,
    ),
    BadInput(
        "jsonl number too long",
        "a `.jsonl` line that is a number of 5,000 digits",
        _jsonl("1" * 5_000),
        ("-p @prompts.jsonl, line 1", "digits", "one object on each line"),
        exit_code=2,
    ),
    BadInput(
        "jsonl row without a prompt",
        "a `.jsonl` row with the field `question`",
        _jsonl('{"prompt": "Hello"}', '{"question": "Why?"}'),
        ("-p @prompts.jsonl, line 2", "question", "`prompt`, `text` or `messages`"),
        exit_code=2,
    ),
    BadInput(
        "jsonl row not an object",
        "a `.jsonl` row that is a list",
        _jsonl('["Hello"]'),
        ("-p @prompts.jsonl, line 1", "list", "not an object", "`prompt`, `text` or `messages`"),
        exit_code=2,
    ),
    BadInput(
        "jsonl text not a text",
        "a `.jsonl` row whose `prompt` is a number",
        _jsonl('{"prompt": 42}'),
        ("-p @prompts.jsonl, line 1", "`prompt` is 42", "not a text"),
        exit_code=2,
    ),
    BadInput(
        "jsonl text empty",
        "a `.jsonl` row whose `text` is empty",
        _jsonl('{"text": "Hello"}', '{"text": " "}'),
        ("-p @prompts.jsonl, line 2", "`text` is empty", "drop the row"),
        exit_code=2,
    ),
    BadInput(
        "jsonl lone surrogate",
        "a `.jsonl` row with half of a surrogate pair",
        _jsonl('{"prompt": "Hello \\ud83d"}'),
        ("-p @prompts.jsonl, line 1: `prompt`", "'\\ud83d'", "index 6"),
        exit_code=2,
    ),
    BadInput(
        "messages not JSON",
        "a `.csv` cell of `messages` that is not JSON",
        holding("prompts.csv", "messages\nHello\n", p="@prompts.csv"),
        ("-p @prompts.csv, line 2", "`messages`", "not JSON", "JSON list"),
        exit_code=2,
    ),
    BadInput(
        "messages without a role",
        "a message without `role`",
        _jsonl('{"messages": [{"content": "Hello"}]}'),
        ("-p @prompts.jsonl, line 1", "`messages` is not a chat", "`role` and `content`"),
        exit_code=2,
    ),
    BadInput(
        "messages empty",
        "`messages` that is an empty list",
        _jsonl('{"messages": []}'),
        ("-p @prompts.jsonl, line 1", "`messages` is not a chat", "`role` and `content`"),
        exit_code=2,
    ),
    BadInput(
        "messages with a picture",
        "a chat with a picture in it",
        _jsonl('{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}]}'),
        ("-p @prompts.jsonl, line 1", "message 0", "`image_url`", "model of text", "Leave out"),
        exit_code=2,
    ),
    BadInput(
        "messages without content",
        "a message whose `content` is null, without tool calls",
        _jsonl('{"messages": [{"role": "user", "content": null}]}'),
        ("-p @prompts.jsonl, line 1", "`messages` is not a chat", "message 0 has no `content`"),
        exit_code=2,
    ),
    BadInput(
        "tools no list",
        "`tools` that is not a list of objects",
        _jsonl('{"prompt": "Hello", "tools": ["add"]}'),
        ("-p @prompts.jsonl, line 1", "`tools`", "not JSON", "JSON list of objects"),
        exit_code=2,
    ),
    BadInput(
        "json without a list",
        "a `.json` file with an object that holds two lists",
        holding("prompts.json", '{"train": ["Hello"], "test": ["Why?"]}', p="@prompts.json"),
        ("-p @prompts.json", "['test', 'train']", "not a list of prompts", "object on each line"),
        exit_code=2,
    ),
    BadInput(
        "prompt file compressed",
        "`-p @prompts.jsonl.gz`",
        holding("prompts.jsonl.gz", b"\x1f\x8b\x08", p="@prompts.jsonl.gz"),
        ("-p @prompts.jsonl.gz", ".gz file is compressed", "no prompts", "Unpack it"),
        exit_code=2,
    ),
    BadInput(
        "prompt file a spreadsheet",
        "`-p @prompts.xlsx`",
        holding("prompts.xlsx", b"PK\x03\x04", p="@prompts.xlsx"),
        ("-p @prompts.xlsx", ".xlsx file is a spreadsheet", "Save the sheet as .csv"),
        exit_code=2,
    ),
    BadInput(
        "prompt file UTF-16",
        "a prompt file in UTF-16 without a byte order mark",
        holding("prompts.txt", "Hello".encode("utf-16-le"), p="@prompts.txt"),
        ("-p @prompts.txt, line 1", "NUL", "UTF-16", "Convert"),
        exit_code=2,
    ),
    BadInput(
        "csv comma not quoted",
        "a `.csv` row with a comma in its text, without quotation marks",
        holding("prompts.csv", "prompt\nHello, world\n", p="@prompts.csv"),
        ("-p @prompts.csv, line 2", "2 cells", "header has 1", "quotation marks around"),
        exit_code=2,
    ),
    BadInput(
        "csv quotation marks",
        "a `.csv` row that goes on after its quotation marks",
        holding("prompts.csv", 'prompt\n"Hello" she said\n', p="@prompts.csv"),
        ("-p @prompts.csv, line 2", "quotation marks", "around the whole text", "double"),
        exit_code=2,
    ),
    BadInput(
        "csv without a column",
        "a `.csv` file without a header line",
        holding("prompts.csv", "Hello,greeting\nWhy?,question\n", p="@prompts.csv"),
        ("-p @prompts.csv", "no column `prompt` or `text`", "['Hello', 'greeting']", "header"),
        exit_code=2,
    ),
    BadInput(
        "csv row short",
        "a `.csv` row that ends before the column `prompt`",
        holding("prompts.csv", "group,prompt\na,Hello\nb\n", p="@prompts.csv"),
        ("-p @prompts.csv, line 3", "no prompt"),
        exit_code=2,
    ),
    BadInput(
        "parquet damaged",
        "a `.parquet` file that is none",
        holding("prompts.parquet", "prompt\nHello\n", p="@prompts.parquet"),
        ("-p @prompts.parquet", "cannot be read as Parquet", "again"),
        exit_code=2,
    ),
    BadInput(
        "parquet without a column",
        "a `.parquet` file with the column `question`",
        _parquet(question=["Why?"]),
        ("-p @prompts.parquet, row 0", "question", "`prompt`, `text` or `messages`"),
        exit_code=2,
    ),
    BadInput(
        "parquet without pyarrow",
        "a `.parquet` file without the package pyarrow",
        _parquet(prompt=["Hello"]),
        ("-p @prompts.parquet", "pyarrow", "pip install 'lazarus-introspect[parquet]'"),
        exit_code=2,
        around=lambda: patch.dict(sys.modules, {"pyarrow": None}),
    ),
)

FITTING = (
    BadInput(
        "a chat without a template",
        "a chat in `messages`, without `--chat-template`",
        _jsonl(CHAT),
        ("Prompt 0", "`messages`", "--chat-template"),
        exit_code=2,
    ),
    BadInput(
        "template file missing",
        "`--chat-template chat.jinja`, which is not there",
        typed("--chat-template", "chat.jinja"),
        ("--chat-template chat.jinja", "No such file", "none, base or finetuned"),
        exit_code=2,
    ),
    BadInput(
        "template file not UTF-8",
        "a template file in Latin-1",
        holding("chat.jinja", b"caf\xe9", "--chat-template", "chat.jinja"),
        ("--chat-template chat.jinja", "not UTF-8", "0xe9"),
        exit_code=2,
    ),
    BadInput(
        "template with a mistake",
        "a template file with a mistake in it",
        holding("chat.jinja", "{% for m in messages %}", "--chat-template", "chat.jinja"),
        ("Prompt 0 ('Hello')", "template fails", "endfor", "--chat-template FILE"),
    ),
    BadInput(
        "template that refuses",
        "a template that refuses the messages",
        holding("chat.jinja", "{{ raise_exception('No system turn.') }}", "--chat-template", "chat.jinja"),
        ("Prompt 0 ('Hello')", "template fails", "No system turn.", "the messages"),
    ),
    BadInput(
        "template that divides by zero",
        "a template that divides by zero",
        holding("chat.jinja", "{{ 1 // 0 }}", "--chat-template", "chat.jinja"),
        ("Prompt 0 ('Hello')", "template fails", "ZeroDivisionError", "--chat-template FILE"),
    ),
    BadInput(
        "template that writes nothing",
        "a template that writes nothing",
        holding("chat.jinja", "{# #}", "--chat-template", "chat.jinja"),
        ("Prompt 0 ('Hello')", "template makes an empty text", "Mend it"),
    ),
    BadInput(
        "template without parts",
        "content in two parts, and a template that takes a text",
        _two_parts,
        ("Prompt 0 ('Hello\\nthere')", "prints content in parts", "one text", "takes parts"),
    ),
    BadInput(
        "template and its arguments",
        "`chat_template_kwargs` that sets `tokenize`",
        _tokenizing,
        ("Prompt 0 ('Hello')", "`chat_template_kwargs` sets `tokenize`", "no variable", "Leave it out"),
    ),
    BadInput(
        "model without a template",
        "`--chat-template finetuned`, and that model has none",
        _no_template,
        ("--chat-template", "plain has no chat template", "a file"),
    ),
    BadInput(
        "prompt without the position",
        "`--position 40` with a prompt that is shorter",
        typed("--position", "40", p="Hello"),
        ("Prompt 0", "tokens", "position 40", "Choose another --position"),
    ),
    BadInput(
        "prompt without a response",
        "`--position response` with a prompt alone",
        typed("--position", "response", p="Hello"),
        ("Prompt 0 ('Hello')", "no response", "--position response", "`prompt` and `response`"),
    ),
    BadInput(
        "template that hides a response",
        "`--position response`, and a template that writes an earlier turn otherwise",
        _rewritten,
        ("Prompt 0 ('Hello')", "message 1", "cannot be seen", "--chat-template FILE", "--position all"),
    ),
    BadInput(
        "response cut off",
        "`--position response --truncate`, and the prompt alone fills the context",
        _cut_off,
        ("Prompt 0", "none of the 64 tokens", "cut off", "another --position"),
    ),
    BadInput(
        "prompt too long",
        "a prompt longer than the models' context",
        typed(p="Hello,What" + " is AI" * 40),
        ("Prompt 1 ('What is AI", "tokens", "context is 64", "--truncate"),
    ),
)

KINDS = (*READING, *FITTING)
