"""A row of a structured file, or of a library call → a prompt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lazarus.errors import PromptsError
from lazarus.messages import option
from lazarus.notes import Notes
from lazarus.prompts.chats import as_json, last_text, read_messages
from lazarus.prompts.prompt import Prompt, check_unicode

FIELDS = ("prompt", "text", "messages")
RESPONSES = ("response", "completion")
"""fields of what is said to the prompt; the second is what TRL's datasets call it"""
HOW_TO_FIX = "Give each row a field `prompt`, `text` or `messages`."

_FOR_THE_TEMPLATE = {
    "tools": "list of objects",
    "documents": "list of objects",
    "chat_template_kwargs": "object",
}
"""what a chat template is given beside the messages, by the names that TRL's datasets use for it"""

_NOT_READ = (
    *("system", "system_prompt", "image", "images", "audio", "video", "videos"),
    *("functions", "function_call", "add_generation_prompt", "continue_final_message"),
)
"""fields that would change what a model reads: they belong into the messages, or are not text"""


def from_row(
    row: Any, place: str, remarks: Counter[str], *, fills: bool = False, responses: bool = False
) -> Prompt:
    """Return the first of `prompt`, `text` and `messages` that a row has, whole; a text is its own row.

    `remarks` counts the rows of which a reader must know something; `fills` says that the row may have null
    where others have a key and it has none, and `responses` that its response is read too.

    Raises:
        PromptsError: there is none, or it cannot be given to a model as it is; it names `place`.
    """
    if isinstance(row, str):
        return Prompt(read_text(row, "prompt", place))
    if not isinstance(row, Mapping):
        raise PromptsError(f"{place}: this is a {type(row).__name__}, not an object. {HOW_TO_FIX}")
    name = _first(row, FIELDS, remarks)
    if name is None:
        raise PromptsError(f"{place}: no prompt; its fields are {sorted(map(str, row))}. {HOW_TO_FIX}")
    _remark_on_others(row, remarks, responses)
    group = row.get("group")
    group = None if group in (None, "") else str(group)
    for_template = _for_template(row, place)
    text, messages = _read(row, name, place)
    answer = _first(row, RESPONSES, remarks) if responses else None
    response, turns = _read(row, answer, place) if answer else (None, None)
    if turns is not None and messages is None:  # of a chat, a text is the user's turn
        messages = ({"role": "user", "content": text},)
    if fills and _holds_null([messages or (), turns or (), for_template]):
        remarks["rows with null within a message or a tool, which is what Parquet has for an absent key"] += 1
        messages, turns, for_template = map(_without_nulls, (messages, turns, for_template))
    elif _holds_null([messages or (), turns or ()]):
        remarks["rows with null within a message, such as in a tool call, which the template is given"] += 1
    return Prompt(text, group, messages, for_template, turns or response)


def _first(row: Mapping[str, Any], names: Sequence[str], remarks: Counter[str]) -> str | None:
    """Return the first of these fields that a row has; it is remarked where there are others."""
    there = [name for name in names if row.get(name) is not None]
    # An empty cell of a CSV row is a field that is not there, as long as there is another.
    there = [name for name in there if not (isinstance(row[name], str) and row[name] == "")] or there
    if len(there) > 1:
        listed = " and ".join(f"`{name}`" for name in there)
        remarks[f"rows that have {listed}, of which `{there[0]}` was read"] += 1
    return there[0] if there else None


def _remark_on_others(row: Mapping[str, Any], remarks: Counter[str], responses: bool) -> None:
    """Count the row where it has fields that are not read and that a reader may take for read."""
    why = dict.fromkeys(_NOT_READ, "which is not read")
    if not responses:
        why |= dict.fromkeys(RESPONSES, f"which {option('position', 'response')} of activation-diff reads")
    for name, told in why.items():
        if row.get(name) is not None and (not hasattr(row[name], "__len__") or len(row[name])):
            remarks[f"rows that have `{name}`, {told}"] += 1


def _read(row: Mapping[str, Any], name: str, place: str) -> tuple[str, tuple[Mapping[str, Any], ...] | None]:
    """Return the text of a field, and the messages of one that is a chat."""
    if name != "messages" and not _has_items(row[name], Mapping):  # in TRL's datasets `prompt` may be a chat
        return read_text(row[name], name, place), None
    messages = read_messages(_from_cell(row[name], name, place), f"{place}: `{name}`")
    return last_text(messages), messages


def note_counted(remarks: Counter[str], source: str, notes: Notes) -> None:
    """Note the remarks on the rows of a source, each with its number of rows."""
    for remark, count in remarks.items():
        notes.add("prompt-rows", f"{source}: {remark}: {count}")


def read_text(value: Any, name: str, place: str) -> str:
    """Return a text as it is.

    Raises:
        PromptsError: it is no text, empty, or not Unicode.
    """
    if not isinstance(value, str):
        raise PromptsError(f"{place}: `{name}` is {value!r:.40}, not a text. Write a text there.")
    if not value.strip():
        raise PromptsError(f"{place}: `{name}` is empty. Give it a text, or drop the row.")
    check_unicode(value, f"{place}: `{name}`")
    return value


def parse_json(text: str, place: str, advice: str) -> Any:
    """Return what a JSON text says.

    Raises:
        PromptsError: it is not JSON, or more than Python's reader takes; it names `place`.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except _TwiceError as error:
        raise PromptsError(f"{place} an object has two keys {error}. Take one of them out.") from error
    except json.JSONDecodeError as error:
        raise PromptsError(f"{place} not JSON: {error}. {advice}") from error
    except (ValueError, RecursionError) as error:  # what Python's reader refuses of valid JSON
        raise PromptsError(
            f"{place} too many brackets within brackets, or a number of thousands of digits. {advice}"
        ) from error


class _TwiceError(Exception):
    """A key that an object has twice, of which Python's reader would drop the first without a word."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(repr(next(name for name in names if names.count(name) > 1)))
    return found


def _for_template(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return what the row gives a chat template beside the messages, each by the template's name for it."""
    given: dict[str, Any] = {}
    for name, kind in _FOR_THE_TEMPLATE.items():
        if row.get(name) is None or (isinstance(row[name], str) and not row[name].strip()):
            continue
        value = _from_cell(row[name], name, place)
        if kind == "list of objects" and _has_items(value, str):  # some datasets keep each tool as JSON
            value = [_from_cell(item, name, place) for item in value]
        value = as_json(value, f"{place}: `{name}`")
        is_list = isinstance(value, list) and all(isinstance(item, dict) for item in value)
        if not (isinstance(value, dict) if kind == "object" else is_list):
            raise PromptsError(f"{place}: `{name}` is {value!r:.40}. Write a JSON {kind}, or leave it out.")
        if kind == "object":
            if twice := value.keys() & _FOR_THE_TEMPLATE:
                raise PromptsError(f"{place}: `{name}` holds `{min(twice)}`. Make it a field of the row.")
            given |= value
        else:
            given[name] = value
    return given


def _from_cell(value: Any, name: str, place: str) -> Any:
    """Return what a text holds as JSON, as in a cell of CSV; any other value as it is."""
    if not isinstance(value, str):
        return value
    kind = _FOR_THE_TEMPLATE.get(name, "list of objects")
    return parse_json(value, f"{place}, `{name}`:", f"Write a JSON {kind}.")


def _has_items(value: Any, kind: type) -> bool:
    """Return whether it is a list, or an array of NumPy, that begins with such an item."""
    is_list = hasattr(value, "__len__") and not isinstance(value, str | Mapping)
    return is_list and len(value) > 0 and isinstance(value[0], kind)


def _holds_null(value: Any) -> bool:
    items = value.values() if isinstance(value, Mapping) else value
    return any(
        item is None or (isinstance(item, Mapping | list | tuple) and _holds_null(item)) for item in items
    )


def _without_nulls(value: Any) -> Any:
    """Return the same without the keys that have no value; an item of a list keeps its place."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return type(value)(_without_nulls(item) for item in value)
    return value
