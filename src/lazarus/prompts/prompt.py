"""The prompt itself, and what is refused of any prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lazarus.errors import PositionError, PromptsError
from lazarus.messages import option
from lazarus.notes import Notes

ASSISTANT = "assistant"
"""the role whose turns are responses"""
EXAMPLE = "Give one, as in -p 'Hello' or -p @prompts.txt."


@dataclass(frozen=True)
class Prompt:
    """One prompt: a text, or a chat of which `text` is the last text; and its group, if any."""

    text: str
    group: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    """each message whole, as the chat template is given it"""
    for_template: Mapping[str, Any] = field(default_factory=dict)
    """what the chat template is given beside the messages: `tools`, `documents`, variables of its own"""
    response: str | tuple[Mapping[str, Any], ...] | None = None
    """what is said to it, as a text or as messages: read after the prompt with `position` response"""

    @property
    def has_response(self) -> bool:
        """Return whether there is a response, of its own or as an assistant's turn of the chat."""
        own = (self.response,) if isinstance(self.response, str) else self.response
        turns = self.messages if own is None else own
        return any(isinstance(turn, str) or turn["role"] == ASSISTANT for turn in turns or ())


@dataclass
class PromptList:
    """The prompts in their order, and what the reader of the result must know about them."""

    prompts: list[Prompt] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Refuse an empty list, an empty prompt, and text that is not Unicode."""
    if not prompts:
        raise PromptsError(f"No prompt: the list is empty. {EXAMPLE}")
    for index, prompt in enumerate(prompts):
        if not prompt.text.strip():
            raise PromptsError(f"Prompt {index} is empty. Give it a text, or leave it out.")
        for text in _texts([prompt.text, prompt.messages, prompt.for_template, prompt.response]):
            check_unicode(text, f"Prompt {index}")


def check_chats(prompts: Sequence[Prompt], chat_template: str) -> None:
    """Refuse a chat where there is no template to write it with.

    Raises:
        PromptsError: a prompt is a chat and `chat_template` is `none`.
    """
    for index, prompt in enumerate(prompts):
        is_chat = prompt.messages or isinstance(prompt.response, tuple)
        if is_chat and chat_template == "none":
            raise PromptsError(
                f"Prompt {index} is a chat (`messages`), which needs a template to become text. Give "
                f"{option('chat_template')}: one of the models' own, or a file.",
                option="chat_template",
            )


def check_responses(prompts: Sequence[Prompt], position: str | int) -> None:
    """Refuse a prompt without a response where responses are compared.

    Raises:
        PositionError: `position` is `response`, and a prompt has none; it names the first one.
    """
    if position != "response":
        return
    for index, prompt in enumerate(prompts):
        if not prompt.has_response:
            raise PositionError(
                f"Prompt {index} ({prompt.text[:40]!r}) has no response, and {option('position', position)} "
                "compares nothing else. Give a row with `prompt` and `response`, or a chat in which the "
                "assistant has a turn.",
                option="position",
            )


def check_unicode(text: str, place: str) -> None:
    """Refuse half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptsError(
            f"{place} is not valid Unicode: it has {text[error.start]!a}, which is no character, at "
            f"index {error.start}. Write it in UTF-8."
        ) from error


def _texts(value: Any) -> Iterator[str]:
    """Every text within lists and mappings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.items():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
