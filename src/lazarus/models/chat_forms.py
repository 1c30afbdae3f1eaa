"""The forms of content and of the arguments of tool calls, in which templates take them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lazarus.prompts import texts_of

Messages = Sequence[Mapping[str, Any]]

# Remarks on what was given to a template in another form than the row has.
AS_OBJECTS = "the chat template takes the arguments of tool calls as objects, so JSON text was read into them"
AS_JSON = "the chat template takes the arguments of tool calls as text, so objects were given to it as JSON"
AS_TEXT = "the chat template takes content as text, so content in one part was given to it as that text"
AS_PARTS = "the chat template takes content in parts, so text was given to it as one part"
AS_EMPTY = "the chat template takes no message without content, so null was given to it as an empty text"


def forms(messages: Messages) -> Iterator[tuple[Messages, list[str]]]:
    """Yield the messages as they are given, then in the other forms in which chats are written.

    Those with the fewest changes are first.
    """
    yield messages, []
    ways = itertools.product(*((None, *kind) for kind in _CHANGES))
    # The first of all ways is no change, which was given already.
    for way in sorted(ways, key=lambda way: sum(change is not None for change in way))[1:]:
        form, remarks = list(messages), []
        for change in filter(None, way):
            changed = [change.of(message) for message in form]
            # A change without an effect would give a form a second time.
            if changed == form:
                break
            form = changed
            remarks.append(change.remark)
        else:
            yield form, remarks


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    """Return a message, a tool call of it, or the function called, with its arguments changed."""
    if not isinstance(call, Mapping):
        return call
    changed = dict(call)
    if isinstance(call.get("tool_calls"), list):
        changed["tool_calls"] = [_with_arguments(each, change) for each in call["tool_calls"]]
    if "function" in call:
        changed["function"] = _with_arguments(call["function"], change)
    if "arguments" in call:
        changed["arguments"] = change(call["arguments"])
    return changed


def to_object(arguments: Any) -> Any:
    """Return the object that a text is JSON of; anything else as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _to_json(arguments: Any) -> Any:
    """Return an object as JSON; anything else as it is."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _with_content(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message with an empty text where it has no content."""
    return {**message, "content": message.get("content", "")}


def _with_part(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message with its text as the one part of its content."""
    content = message.get("content")
    part = {"type": "text", "text": content}
    return {**message, "content": [part]} if isinstance(content, str) else dict(message)


def _with_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message with its text as content where that is its one part.

    How several parts would be joined is for nobody to say but the template.
    """
    content = message.get("content")
    texts = texts_of(message)
    is_one_text = isinstance(content, list) and len(content) == len(texts) == 1
    return {**message, "content": texts[0]} if is_one_text else dict(message)


@dataclass(frozen=True)
class _Change:
    """Another form of a message, and the remark that it is to be given with."""

    of: Callable[[Mapping[str, Any]], dict[str, Any]]
    remark: str


_CHANGES = (
    (_Change(_with_content, AS_EMPTY),),
    (
        _Change(partial(_with_arguments, change=to_object), AS_OBJECTS),
        _Change(partial(_with_arguments, change=_to_json), AS_JSON),
    ),
    (_Change(_with_text, AS_TEXT), _Change(_with_part, AS_PARTS)),
)
"""the forms of null, of arguments and of content; no two of one kind go together"""


def arguments_of(messages: Messages) -> Iterator[Any]:
    """Yield the arguments of every tool call."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if isinstance(function, Mapping) and "arguments" in function:
                yield function["arguments"]
