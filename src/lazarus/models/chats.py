"""Chats → the text that a chat template makes of them, and what a reader must know of it."""

from __future__ import annotations

import inspect
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lazarus.errors import ChatTemplateError
from lazarus.messages import option
from lazarus.models.chat_forms import Messages, arguments_of, forms, to_object
from lazarus.models.rendering import Call, Renderer, TemplateLimitError
from lazarus.prompts import ASSISTANT, Prompt, texts_of

# Remarks on what a template did with a chat; those on what it was given are in `chat_forms`.
QUOTED = "the chat template writes the arguments of tool calls as quoted text, and fails on objects"
AS_PYTHON = "the chat template writes the arguments of tool calls as Python prints them, which is not JSON"

# What transformers passes on under these names is the messages.
_OF_TRANSFORMERS = ("messages", "conversations")
# transformers gives a template each message's reasoning under the last three names alike.
_LEAVABLE = (("tool_calls",), ("function_call",), ("reasoning_content", "reasoning", "thinking"))


@dataclass(frozen=True)
class ChatTemplate:
    """The text of a chat template, or a tokenizer's own; its special tokens are the tokenizer's."""

    tokenizer: Any
    owner: str
    text: str | None = None

    def for_chat(self, for_template: Mapping[str, Any]) -> str:
        """Return the template's text; some tokenizers have another one for chats with tools.

        Raises:
            ChatTemplateError: the tokenizer has none, or several without a default.
        """
        if self.text is not None:
            return self.text
        several = self.tokenizer.chat_template
        fault, has = None, "a chat template that is no text"
        try:
            found = self.tokenizer.get_chat_template(tools=for_template.get("tools"))
            if isinstance(found, str):
                return found
        except ValueError as error:
            # transformers raises a ValueError for none and for several alike.
            fault, has = error, "no chat template"
            if isinstance(several, dict) and several:
                names = ", ".join(map(str, several))
                has = f"several chat templates ({names}), and none of them is the default"
        raise ChatTemplateError(
            f"{option('chat_template')}: {self.owner} has {has}. Use the other model's, or a file.",
            option="chat_template",
        ) from fault


def render_chats(prompts: Sequence[Prompt], template: ChatTemplate) -> tuple[list[str], dict[str, list[int]]]:
    """Return each prompt in the chat template, up to where the assistant begins, and remarks on prompts.

    The template is given each message whole. Where it fails on it, or does not write its content, the other
    forms in which chats have content and the arguments of tool calls are tried. A remark says which form was
    read, and what the template leaves out.

    Raises:
        ChatTemplateError: the template fails, writes nothing, or prints what it was to read.
    """
    with Renderer(template.tokenizer) as renderer:
        written = list(write_chats(prompts, template, renderer))
    return [each.text for each in written], by_remark([each.remarks for each in written])


@dataclass(frozen=True)
class Written:
    """A prompt as a chat template has written it: the messages as they were given to it, and the text."""

    chat: Chat
    messages: Messages
    text: str
    remarks: Sequence[str]


def write_chats(prompts: Sequence[Prompt], template: ChatTemplate, renderer: Renderer) -> Iterator[Written]:
    """Yield each prompt, and the response after it if it has one of its own, as `render_chats` writes it.

    Raises:
        ChatTemplateError: as `render_chats`.
    """
    for index, prompt in enumerate(prompts):
        place = f"Prompt {index} ({prompt.text[:40]!r})"
        template_text = template.for_chat(prompt.for_template)
        chat = Chat(place, template.tokenizer, renderer, template_text, prompt.for_template)
        turns = prompt.messages or ({"role": "user", "content": prompt.text},)
        messages, text, found = _write(chat, [*turns, *_response(prompt)])
        yield Written(chat, messages, text, list(dict.fromkeys([*found, *_unused(chat, messages, text)])))


def by_remark(remarks: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Return the prompts that each remark is about, from the remarks on each prompt."""
    found: dict[str, list[int]] = defaultdict(list)
    for index, own in enumerate(remarks):
        for remark in own:
            found[remark].append(index)
    return dict(found)


def _response(prompt: Prompt) -> Messages:
    """Return the turns that a response of its own is."""
    if isinstance(prompt.response, str):
        return ({"role": ASSISTANT, "content": prompt.response},)
    return prompt.response or ()


@dataclass(frozen=True)
class Chat:
    """Template and variables that make the text of a prompt."""

    place: str
    tokenizer: Any
    renderer: Renderer
    template: str
    for_template: Mapping[str, Any]

    def text(
        self, messages: Messages, for_template: Mapping[str, Any] | None = None, *, begins: bool | None = None
    ) -> str:
        """Return what the template makes of these messages, and of the beginning of an assistant's turn.

        That is there if `begins`; by default where the last turn is not the assistant's.

        Raises:
            ChatTemplateError: it fails, or the row sets what is not the template's to set.
        """
        given = self.for_template if for_template is None else for_template
        own = inspect.signature(self.tokenizer.apply_chat_template).parameters if given else ()
        # As keywords they would change what `apply_chat_template` does, and never reach the template.
        if taken := given.keys() & {*own, *_OF_TRANSFORMERS} - {"tools", "documents"}:
            raise ChatTemplateError(
                f"{self.place}: `chat_template_kwargs` sets `{min(taken)}`, which is no variable of a chat "
                "template. Leave it out."
            )
        if begins is None:
            begins = messages[-1]["role"] != ASSISTANT
        text = self.renderer.render(Call(messages, self.template, begins, given), self.place)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ChatTemplateError(
                f"{self.place}: the chat template writes half a character (a lone surrogate). Mend the "
                f"template ({option('chat_template', 'FILE')}).",
                option="chat_template",
            ) from error
        return text

    def ignores(self, text: str, messages: Messages, for_template: Mapping[str, Any] | None = None) -> bool:
        """Return whether the template makes the same text of these messages."""
        try:
            return self.text(messages, for_template) == text
        except TemplateLimitError:
            raise
        except ChatTemplateError:
            return False


def _write(chat: Chat, messages: Messages) -> tuple[Messages, str, list[str]]:
    """Return the messages in the first form that the template writes whole, their text, and remarks on both.

    Where it writes none of them whole, that is the first one that it takes at all.
    """
    failure: ChatTemplateError | None = None
    second_best: tuple[Messages, str, list[str]] | None = None
    for form, remarks in forms(messages):
        try:
            text = chat.text(form)
        except TemplateLimitError:
            raise
        except ChatTemplateError as error:
            failure = failure or error
            continue
        if misread := _misread(chat, form, text):
            failure = failure or ChatTemplateError(f"{chat.place}: the chat template {misread}")
            continue
        losses = [*([QUOTED] if _are_quoted(form, text) else []), *_unwritten(chat, form, text)]
        if not losses:
            return form, text, remarks
        second_best = second_best or (form, text, [*remarks, *losses])
    if second_best is None:
        assert failure is not None
        raise failure
    return second_best


def _are_quoted(form: Messages, text: str) -> bool:
    """Return whether arguments that are JSON already are in the text as a JSON string: quoted once more."""
    quoted = [each for each in arguments_of(form) if to_object(each) is not each]
    return any(spelling in text for each in quoted for spelling in (json.dumps(each), _as_json(each)))


def _misread(chat: Chat, form: Messages, text: str) -> str | None:
    """Return what the template does to content instead of writing it, and what to do about it."""
    if not text:
        return "makes an empty text of it. Mend it."
    advice = "Write `content` as one text, or give a template that takes parts."
    for index, message in enumerate(form):
        content = message.get("content")
        if not isinstance(content, list):
            continue
        printed = [spell(item) for item in (content, *content) for spell in (repr, _as_json)]
        if any(spelling in text for spelling in printed):
            return f"prints content in parts with its brackets. {advice}"
        for number, part in enumerate(content):
            if not isinstance(part.get("text"), str) or _is_in(part["text"], text):
                continue
            # What is not in the text may be reworded there. Another text in its place settles it.
            others = [*content[:number], {**part, "text": _unlike(part["text"])}, *content[number + 1 :]]
            if chat.ignores(text, _replaced(form, index, others)):
                return f"leaves out a part of the content. {advice}"
    return None


def _unwritten(chat: Chat, messages: Messages, text: str) -> Iterator[str]:
    """Yield whose content the template leaves out: with another text there, it writes the same."""
    for index, message in enumerate(messages):
        texts = [each for each in texts_of(message) if each.strip()]
        if not texts or any(_is_in(each, text) for each in texts):
            continue
        content = message["content"]
        other: Any = _unlike(texts[0])
        if not isinstance(content, str):
            other = [{"type": "text", "text": other}]
        if chat.ignores(text, _replaced(messages, index, other)):
            yield f"the chat template leaves out the content of a {message['role']!r} message"


def _unused(chat: Chat, messages: Messages, text: str) -> Iterator[str]:
    """Yield what the template leaves out beside content: without it, it writes the same."""
    for name in ("tools", "documents"):
        others = {key: value for key, value in chat.for_template.items() if key != name}
        if chat.for_template.get(name) and chat.ignores(text, messages, others):
            yield f"the chat template leaves out `{name}`"
    for names in _LEAVABLE:
        there = [name for name in names if any(message.get(name) for message in messages)]
        without = [{k: v for k, v in message.items() if k not in there} for message in messages]
        if there and chat.ignores(text, without):
            yield f"the chat template leaves out `{there[0]}`"
    if any(repr(each) in text for each in arguments_of(messages) if each and isinstance(each, dict)):
        yield AS_PYTHON


def _replaced(messages: Messages, index: int, content: Any) -> Messages:
    """Return the messages with another content in one of them."""
    return [*messages[:index], {**messages[index], "content": content}, *messages[index + 1 :]]


def _unlike(text: str) -> str:
    """Return another text of the same length: a template may count what it does not write."""
    other = re.sub(r"\w", lambda found: "y" if found[0] == "x" else "x", text)
    return other if other != text else f"x{text}x"


def _is_in(part: str, text: str) -> bool:
    """Return whether any line of it, tags aside, is in the text, as it is or as within JSON."""
    pieces = [piece.strip() for piece in re.split(r"<[^<>]*>|\n", part)]
    pieces = [piece for piece in pieces if piece] or [part.strip()]
    return any(piece in text or json.dumps(piece, ensure_ascii=False)[1:-1] in text for piece in pieces)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
