"""Prompts from what the user typed after `-p`, or from what the library is given."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lazarus.errors import PromptsError
from lazarus.messages import option
from lazarus.notes import Notes
from lazarus.prompts.chats import as_json, read_messages
from lazarus.prompts.files import read_file
from lazarus.prompts.prompt import EXAMPLE, Prompt, PromptList, check_prompts
from lazarus.prompts.rows import from_row, note_counted, read_text

Item = str | Mapping[str, Any] | Prompt


def parse_prompts(values: Sequence[str], *, no_split: bool = False, responses: bool = False) -> PromptList:
    """Read every `-p` value: comma-separated prompts, `@FILE`, `@-`, or `@@…` for a literal @.

    With `responses` the response of a row is read after its prompt.

    Raises:
        PromptsError: nothing there, an unreadable file, or a row without its field; it names the
            place.
    """
    found = PromptList()
    if sum(value == "@-" for value in values) > 1:
        raise PromptsError("-p @- is given twice, and standard input can be read once. Give it once.")
    for value in values:
        if _is_file(value):
            found.prompts += read_file(value[1:], found.notes, responses=responses)
        elif no_split:
            found.prompts.append(Prompt(value.removeprefix("@") if value[:2] == "@@" else value))
        else:
            found.prompts += _from_list(value, found.notes)
    if not found.prompts:
        given = ", ".join(repr(value) for value in values)
        raise PromptsError(f"No prompt: -p {given} holds none. {EXAMPLE}")
    check_prompts(found.prompts)
    return found


def prompt_files(values: Sequence[str]) -> list[str]:
    """Return the files that `-p` values name; `-` is standard input.

    >>> prompt_files(["Hello", "@prompts.txt", "@@literal", "@-"])
    ['prompts.txt', '-']
    """
    return [value[1:] for value in values if _is_file(value)]


def _is_file(value: str) -> bool:
    return value.startswith("@") and not value.startswith("@@")


def make_prompts(
    given: str | Path | Item | Iterable[Item] | PromptList, *, no_split: bool = False, responses: bool = False
) -> PromptList:
    """Return the prompts of a library call: texts, or mappings with the fields of a `.jsonl` row.

    A plain string is read as the command line reads it, and a `Path` is a file of prompts. In a list, each
    text is one prompt, whole. With `responses` the response of a row is read after its prompt.

    Raises:
        PromptsError: there is no prompt, or one is neither a text nor such a mapping.
    """
    if isinstance(given, PromptList):
        return given
    if isinstance(given, str):
        return parse_prompts([given], no_split=no_split, responses=responses)
    if isinstance(given, Path):
        return parse_prompts([f"@{given}"], responses=responses)
    if isinstance(given, Mapping | Prompt):
        given = [given]
    # A pandas table iterates over the names of its columns: each would be a prompt.
    if not isinstance(given, Iterable) or hasattr(given, "columns"):
        raise PromptsError(
            f"prompts: a {type(given).__name__} is no list of prompts. Give a list of texts or of rows; of a "
            "pandas DataFrame, its to_dict('records')."
        )
    remarks = Counter[str]()
    prompts = [
        _from_item(item, f"prompt {index}", remarks, responses=responses) for index, item in enumerate(given)
    ]
    check_prompts(prompts)
    found = PromptList(prompts)
    note_counted(remarks, "prompts", found.notes)
    return found


def _from_item(item: Item, place: str, remarks: Counter[str], *, responses: bool) -> Prompt:
    """Return one prompt of a list; the same is refused of a `Prompt` as of a row."""
    if isinstance(item, str):
        return Prompt(item)
    if not isinstance(item, Prompt):
        return from_row(item, place, remarks, responses=responses)
    messages = None if item.messages is None else read_messages(item.messages, f"{place}: `messages`")
    for_template = as_json(item.for_template, f"{place}: `for_template`")
    response = item.response
    if isinstance(response, str):
        read_text(response, "response", place)
    elif response is not None:
        response = read_messages(response, f"{place}: `response`")
    return Prompt(read_text(item.text, "text", place), item.group, messages, for_template, response)


def _from_list(value: str, notes: Notes) -> list[Prompt]:
    """The comma-separated form: one CSV row, white space dropped, empty items dropped."""
    try:
        # Not strict, because a prompt on a command line may have a quotation mark of its own.
        items = _items(value, strict=False)
    except csv.Error as error:
        raise PromptsError(
            f"-p {value[:40]!r}: a line break outside of quotation marks. Quote a prompt that has one, "
            f"or give it with {option('no_split', True)}.",
            option="no_split",
        ) from error
    if not _is_strict_csv(value):
        notes.add(
            "prompt-list",
            f"-p {value[:40]!r}: its quotation marks are not those of a CSV row and were read as "
            f"Python's csv reads them; {option('no_split')} keeps a prompt as it is",
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
