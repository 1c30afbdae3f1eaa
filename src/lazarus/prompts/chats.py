"""A chat's messages, each of them whole, in types that a chat template can be given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lazarus.errors import PromptsError

CHAT = "Write a list of objects with `role` and `content`."
DEEPEST = 64
"""how deep brackets may lie within brackets: enough for the schema of any tool"""

_ORDINARY = {"role", "name", "content"}
_MEDIA = ("image", "audio", "video", "file")


def read_messages(value: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    """Return a chat's messages whole, with every key of theirs; `place` says where they stand.

    A key whose value is null means what an absent one does: transformers hands neither to a template.

    Raises:
        PromptsError: it is no chat, or a message holds what a model of text cannot read.
    """
    messages = as_json(value, place)
    if not isinstance(messages, list) or not messages:
        raise PromptsError(f"{place} is not a chat: it is {value!r:.40}. {CHAT}")
    for index, message in enumerate(messages):
        if wrong := _what_is_wrong(message):
            raise PromptsError(f"{place} is not a chat: message {index} {wrong}. {CHAT}")
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            _check_part(part, f"{place}: message {index}")
    return tuple({key: item for key, item in message.items() if item is not None} for message in messages)


def last_text(messages: tuple[Mapping[str, Any], ...]) -> str:
    """Return the last text of a chat, by which it is shown; of a chat of tool calls alone, them as JSON."""
    for message in reversed(messages):
        text = "\n".join(texts_of(message))
        if text.strip():
            return text
    others = {key: item for key, item in messages[-1].items() if key not in _ORDINARY}
    return json.dumps(others, ensure_ascii=False) if others else ""


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """Return the texts of a message's content: itself, or those of its parts."""
    content = message.get("content")
    if isinstance(content, list):
        return [part["text"] for part in content if isinstance(part.get("text"), str)]
    return [] if content is None else [content]


def as_json(value: Any, place: str, depth: int = 0) -> Any:
    """Return the same value out of JSON's types alone, which are those that a template is given.

    NumPy's arrays, as pandas reads them from Parquet, are lists here. transformers would put the name of a
    type in the place of anything else.

    Raises:
        PromptsError: it holds something else, or brackets too deep within brackets.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if depth == DEEPEST:
        raise PromptsError(f"{place} has more than {DEEPEST} brackets within brackets. Write it flatter.")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: as_json(item, place, depth + 1) for key, item in value.items()}
    # Before the lists: to pyarrow a map is a list of pairs, and pairs of texts would pass for lists.
    if isinstance(value, list) and value and all(_is_entry(item) for item in value):
        return as_json(dict(value), place, depth)
    if isinstance(value, list | tuple):
        return [as_json(item, place, depth + 1) for item in value]
    if hasattr(value, "tolist"):
        return as_json(value.tolist(), place, depth + 1)
    what = "an object whose keys are not all texts" if isinstance(value, Mapping) else type(value).__name__
    raise PromptsError(
        f"{place} holds a value that JSON does not have ({what}): {value!r:.40}. Write texts, numbers, lists "
        "and objects."
    )


def _is_entry(item: Any) -> bool:
    """Return whether it is a key with its value, in which form pyarrow gives the entries of a map."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def _what_is_wrong(message: Any) -> str | None:
    """Return what keeps this from being a message, if anything does."""
    if not isinstance(message, dict):
        return f"is {message!r:.40}"
    if not isinstance(message.get("role"), str) or not message["role"]:
        return "has no `role`"
    content = message.get("content")
    if content in (None, []) and not any(message[key] for key in message.keys() - _ORDINARY):
        return "has no `content`"
    if content is not None and not isinstance(content, str | list):
        return f"has the `content` {content!r:.40}, which is neither a text nor a list of parts"
    return None


def _check_part(part: Any, place: str) -> None:
    """Refuse a part that is none, and pictures and sounds, which a model of text would run without."""
    if not isinstance(part, dict):
        raise PromptsError(
            f"{place}: a part of its `content` is {part!r:.40}. Write parts as "
            '{"type": "text", "text": "…"}, or the content as one text.'
        )
    kind = str(part.get("type", ""))
    for name in (kind, *(key for key, item in part.items() if item)):
        if name.removeprefix("input_").partition("_")[0] in _MEDIA:
            raise PromptsError(
                f"{place}: its `content` has a part with `{name}`, which a model of text cannot read. Leave "
                "out the part, or the row."
            )
    if kind == "text" and not isinstance(part.get("text"), str):
        raise PromptsError(
            f"{place}: its `content` has a part whose `text` is {part.get('text')!r:.40}. Write a text there."
        )
