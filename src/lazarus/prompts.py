"""What the user typed after `-p` → a list of prompts. No torch here, so that it can fail in no time."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazarus.errors import MissingPackageError, PromptsError

TEXT_FIELDS = ("prompt", "text")
EXAMPLE = "Give one, as in -p 'Hello' or -p @prompts.txt."
HOW_TO_FIX = "Give each row a field `prompt`, `text` or `messages`."


@dataclass(frozen=True)
class Prompt:
    """One prompt: a text, or a chat of which `text` is the last message; and its group, if any."""

    text: str
    group: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None


@dataclass
class PromptList:
    """The prompts in their order, and what the reader of the result must know about them."""

    prompts: list[Prompt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_prompts(values: Sequence[str], *, no_split: bool = False) -> PromptList:
    """Read every `-p` value: comma-separated prompts, `@FILE`, `@-`, or `@@…` for a literal @.

    Raises:
        PromptsError: nothing there, an unreadable file, or a row without its field; it names the
            place.
    """
    found = PromptList()
    if sum(value == "@-" for value in values) > 1:
        raise PromptsError("-p @- is given twice, and standard input can be read once. Give it once.")
    for value in values:
        if value.startswith("@") and not value.startswith("@@"):
            found.prompts += _from_file(value[1:], found.notes)
        elif no_split:
            found.prompts.append(Prompt(value.removeprefix("@") if value[:2] == "@@" else value))
        else:
            found.prompts += _from_list(value, found.notes)
    if not found.prompts:
        given = ", ".join(repr(value) for value in values)
        raise PromptsError(f"No prompt: -p {given} holds none. {EXAMPLE}")
    check_prompts(found.prompts)
    return found


def make_prompts(
    given: str | Iterable[str | Mapping[str, Any] | Prompt] | PromptList, *, no_split: bool = False
) -> PromptList:
    """The prompts of a library call: texts, or mappings with the fields of a `.jsonl` row.

    A plain string is read as the command line reads it; in a list, each text is one prompt, whole.

    Raises:
        PromptsError: there is no prompt, or one is neither a text nor such a mapping.
    """
    if isinstance(given, PromptList):
        return given
    if isinstance(given, str):
        return parse_prompts([given], no_split=no_split)
    found = PromptList()
    for index, item in enumerate(given):
        if isinstance(item, Prompt):
            found.prompts.append(item)
        elif isinstance(item, str):
            found.prompts.append(Prompt(item))
        else:
            found.prompts.append(_from_row(item, f"prompt {index}"))
    check_prompts(found.prompts)
    return found


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Refuse an empty list, an empty prompt, and text that is not Unicode."""
    if not prompts:
        raise PromptsError(f"No prompt: the list is empty. {EXAMPLE}")
    for index, prompt in enumerate(prompts):
        if not prompt.text.strip():
            raise PromptsError(f"Prompt {index} is empty. Give it a text, or leave it out.")
        for text in [prompt.text, *(m["content"] for m in prompt.messages or ())]:
            _check_unicode(text, f"Prompt {index}")


def check_chats(prompts: Sequence[Prompt], chat_template: str) -> None:
    """Refuse a chat where there is no template to write it with.

    Raises:
        PromptsError: a prompt is a chat and `chat_template` is `none`.
    """
    for index, prompt in enumerate(prompts):
        if prompt.messages and chat_template == "none":
            raise PromptsError(
                f"Prompt {index} is a chat (`messages`), which needs a template to become text. Give "
                "--chat-template: one of the models' own, or a file."
            )


def _check_unicode(text: str, place: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptsError(
            f"{place} is not valid Unicode: it has {text[error.start]!a}, which is no character, at "
            f"index {error.start}. Write it in UTF-8."
        ) from error


def _from_list(value: str, notes: list[str]) -> list[Prompt]:
    """The comma-separated form: one CSV row, white space dropped, empty items dropped."""
    try:
        items = _items(value, strict=False)
    except csv.Error as error:
        raise PromptsError(
            f"-p {value[:40]!r}: a line break outside of quotation marks. Quote a prompt that has one, "
            "or give it with --no-split."
        ) from error
    if not _is_strict_csv(value):
        notes.append(
            f"-p {value[:40]!r}: its quotation marks are not those of a CSV row and were read as "
            "Python's csv reads them; --no-split keeps a prompt as it is"
        )
    for item in items:
        if item.startswith("@") and not item.startswith("@@"):
            raise PromptsError(
                f"-p {value[:40]!r}: the item {item[:40]!r} begins with @. A file is given by a -p "
                f"of its own; a prompt that begins with @ is written @{item[:40]}."
            )
    return [Prompt(item.removeprefix("@") if item[:2] == "@@" else item) for item in items if item]


def _items(value: str, *, strict: bool) -> list[str]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader([value], skipinitialspace=True, strict=strict)
    return [item.strip() for row in rows for item in row]


def _is_strict_csv(value: str) -> bool:
    try:
        _items(value, strict=True)
    except csv.Error:
        return False
    return True


def _from_file(name: str, notes: list[str]) -> list[Prompt]:
    if not name:
        raise PromptsError("-p @: no file is named after the @. Write -p @prompts.txt, or -p @-.")
    suffix = Path(name).suffix.lower()
    if suffix == ".parquet":
        rows: Iterator[tuple[str, Any]] = _parquet_rows(name)
    elif suffix == ".jsonl":
        rows = _jsonl_rows(_read(name), name)
    elif suffix == ".csv":
        rows = _csv_rows(_read(name), name)
    else:
        if suffix == ".json":
            notes.append(f"{name} was read as lines of text; a file with an object on each line is a .jsonl")
        lines = (line.strip() for line in io.StringIO(_read(name), newline=None))
        return [Prompt(line) for line in lines if line]
    prompts = [_from_row(row, place) for place, row in rows]
    if not prompts:
        notes.append(f"{name} holds no prompt")
    return prompts


def _read(name: str) -> str:
    """The file's text, or standard input's for `-`; a byte order mark is dropped."""
    try:
        raw = _standard_input() if name == "-" else Path(name).expanduser().read_bytes()
    except IsADirectoryError as error:
        raise PromptsError(f"-p @{name}: this is a folder. Name a file in it.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptsError(f"-p @{name}: cannot be read: {reason}. Check the path.") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PromptsError(
            f"-p @{name}, line {line}: not UTF-8: byte 0x{raw[error.start]:02x} at position "
            f"{error.start}. Convert the file to UTF-8."
        ) from error


def _standard_input() -> bytes:
    if sys.stdin is None:  # closed by whoever started this process
        raise PromptsError("-p @-: there is no standard input. Pipe the prompts in, or name a file.")
    return sys.stdin.buffer.read()


def _jsonl_rows(text: str, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"-p @{name}, line {number}"
        yield place, _from_json(line, f"{place}:", "Put one object on each line.")


def _from_json(text: str, place: str, advice: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptsError(f"{place} not JSON: {error}. {advice}") from error
    except (ValueError, RecursionError) as error:  # what Python's reader refuses of valid JSON
        raise PromptsError(
            f"{place} too many brackets within brackets, or a number of thousands of digits. {advice}"
        ) from error


def _csv_rows(text: str, name: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or []
    if text.strip() and not {*TEXT_FIELDS, "messages"} & set(columns):
        raise PromptsError(
            f"-p @{name}: no column `prompt` or `text`; the columns are {list(columns)}. Add a header line."
        )
    for row in reader:
        yield f"-p @{name}, line {reader.line_num}", row


def _parquet_rows(name: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError(
            f"-p @{name}: reading Parquet needs the package pyarrow. Install it with "
            "`pip install 'lazarus-introspect[parquet]'`."
        ) from error
    try:
        rows = pyarrow.parquet.read_table(Path(name).expanduser()).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise PromptsError(
            f"-p @{name}: cannot be read as Parquet: {reason}. Write the file again."
        ) from error
    for number, row in enumerate(rows):
        yield f"-p @{name}, row {number}", row


def _from_row(row: Any, place: str) -> Prompt:
    """A structured row: the first of `prompt`, `text` and `messages` that it has, kept whole."""
    if not isinstance(row, Mapping):
        raise PromptsError(f"{place}: this is a {type(row).__name__}, not an object. {HOW_TO_FIX}")
    group = row.get("group")
    group = None if group in (None, "") else str(group)
    for name in TEXT_FIELDS:
        if row.get(name) is not None:
            return Prompt(_text(row[name], name, place), group)
    if row.get("messages") is not None:
        messages = _messages(row["messages"], place)
        return Prompt(messages[-1]["content"], group, messages)
    raise PromptsError(f"{place}: no prompt; its fields are {sorted(map(str, row))}. {HOW_TO_FIX}")


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise PromptsError(f"{place}: `{name}` is {value!r:.40}, not a text. Write a text there.")
    if not value.strip():
        raise PromptsError(f"{place}: `{name}` is empty. Give it a text, or drop the row.")
    _check_unicode(value, f"{place}: `{name}`")
    return value


def _messages(value: Any, place: str) -> tuple[Mapping[str, str], ...]:
    if isinstance(value, str):  # a CSV cell holds the chat as JSON
        value = _from_json(value, f"{place}, `messages`:", "Write the chat as a JSON list.")
    is_chat = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if not is_chat or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    ):
        raise PromptsError(
            f"{place}: `messages` is not a chat. Write a list of objects with the texts `role` and `content`."
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in value)
