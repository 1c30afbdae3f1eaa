"""The places of the responses in the text that a chat template makes of a chat."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from lazarus.errors import ChatTemplateError, PositionError
from lazarus.messages import option
from lazarus.models.chats import ChatTemplate, Written, by_remark, write_chats
from lazarus.models.rendering import Renderer, TemplateLimitError
from lazarus.prompts import ASSISTANT, Prompt

Span = tuple[int, int]
"""where a piece of a text begins, and where it ends, in characters"""

# A remark on chats.
NO_HEADER = (
    "the chat template begins an answer with nothing of its own, so all that it writes of an assistant's "
    "turn is the response"
)

_BEGIN, _END = "\ufdd0", "\ufdd1"
"""characters that Unicode reserves for use within a program: no text has them"""
# The line break goes with the tag before it, so that the template still begins at the beginning of a line.
_MACRO = f"{{% macro lazarus_marked() %}}{_BEGIN}{{{{ caller() }}}}{_END}{{% endmacro %}}\n"
_TAGS = (
    (re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}"), r"{%\1 call lazarus_marked() \2%}"),
    (re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}"), r"{%\1 endcall \2%}"),
)


def render_responses(
    prompts: Sequence[Prompt], template: ChatTemplate
) -> tuple[list[str], list[list[Span]], dict[str, list[int]]]:
    """Return each prompt with its response in the chat template, where the responses are, and remarks.

    A response is what the template marks with `{% generation %}`. Where it has no marks, it is what an
    assistant's turn adds to the text of the turns before it and of the beginning of an answer. Where the
    prompt has a response of its own, no earlier turn is one.

    Raises:
        ChatTemplateError: as `render_chats`.
        PositionError: the template writes a turn otherwise once there are later ones.
    """
    spans, remarks = [], []
    with Renderer(template.tokenizer) as renderer:
        written = list(write_chats(prompts, template, renderer))
        for prompt, each in zip(prompts, written, strict=True):
            first = 0 if prompt.response is None else len(prompt.messages or (prompt.text,))
            marked = _marked(each)
            found, told = _added(each, first) if marked is None else (_later(each, first, marked), [])
            spans.append(found)
            remarks.append([*each.remarks, *told])
    return [each.text for each in written], spans, by_remark(remarks)


def _marked(each: Written) -> list[Span] | None:
    """Return what the template marks as generated; None where it has no marks.

    transformers counts the characters before a mark wrongly within a macro of the template. Here each
    `generation` block is a `call` block, which has the same body and writes characters around it.
    """
    template = each.chat.template
    for tag, call in _TAGS:
        template, n_tags = tag.subn(call, template)
        if not n_tags:
            return None
    try:
        text = replace(each.chat, template=_MACRO + template).text(each.messages)
    except TemplateLimitError:
        raise
    except ChatTemplateError:
        return None
    # Marks that do not come in pairs, or that change the text, say nothing of where they are.
    pieces = re.split(f"{_BEGIN}([^{_END}]*){_END}", text)
    if "".join(pieces) != each.text:
        return None
    ends = list(accumulate(map(len, pieces)))
    return [(ends[i - 1], ends[i]) for i in range(1, len(pieces), 2)]


def _later(each: Written, first: int, spans: list[Span]) -> list[Span]:
    """Return the spans that are not of the turns before `first`."""
    if all(turn["role"] != ASSISTANT for turn in each.messages[:first]):
        return spans
    before = _text(each, first, first, begins=False)
    if not each.text.startswith(before):
        raise _not_seen(each, first)
    return [span for span in spans if span[1] > len(before)]


def _added(each: Written, first: int) -> tuple[list[Span], list[str]]:
    """Return what each of the assistant's turns from `first` on adds to those before it, and remarks."""
    spans, remarks = list[Span](), list[str]()
    for index, turn in enumerate(each.messages[first:], first):
        if turn["role"] != ASSISTANT:
            continue
        before, after = _text(each, index, index, begins=True), _text(each, index, index + 1, begins=False)
        if not after.startswith(before) or not each.text.startswith(after):
            raise _not_seen(each, index)
        spans.append((len(before), len(after)))
        if before == _text(each, index, index, begins=False):
            remarks = [NO_HEADER]
    return spans, remarks


def _text(each: Written, index: int, n_turns: int, *, begins: bool) -> str:
    """Return what the template makes of the first turns alone, to find the response in turn `index`."""
    try:
        return each.chat.text(each.messages[:n_turns], begins=begins)
    except TemplateLimitError:
        raise
    except ChatTemplateError as error:
        raise _not_seen(each, index) from error


def _not_seen(each: Written, index: int) -> PositionError:
    return PositionError(
        f"{each.chat.place}: where the response in message {index} begins and ends cannot be seen: the chat "
        "template writes the turns up to there otherwise when others follow, or refuses them alone. Mark "
        f"responses in it with {{% generation %}} ({option('chat_template', 'FILE')}), give `prompt` and "
        f"`response` as texts without a template, or use {option('position', 'all')}.",
        option="position",
    )
