"""The tokens of a response: from where it is in a text to which of the text's ids are compared."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from lazarus.errors import PositionError
from lazarus.messages import option
from lazarus.models import Span
from lazarus.tokens import TokenizedPrompt, TokenizerFaults, encode


@dataclass(frozen=True)
class Responses:
    """The texts that a tokenizer has read, and where the responses are in each of them."""

    texts: Sequence[str]
    spans: Sequence[Sequence[Span]]
    special: bool
    """whether the tokenizer puts special tokens around each text"""


def mark_responses(
    tokenized: Sequence[TokenizedPrompt], responses: Responses, tokenizer: Any
) -> list[TokenizedPrompt]:
    """Return the prompts with the tokens that are compared: all of each response, and the one before it.

    At the one before it, a model chooses the first token of the response. A token is of the response if one
    character of it is. Special tokens that the tokenizer puts after the text are not.

    Raises:
        PositionError: no token of a prompt is of a response; it names the first such prompt.
    """
    # Not each tokenizer says which character a token begins at, so beginnings of the text are read too.
    [nothing] = encode(tokenizer, [""], special=True) if responses.special else [array("i")]
    found = []
    for prompt, text, spans in zip(tokenized, responses.texts, responses.spans, strict=True):
        # Of the special tokens around an empty text, those that do not begin this one end it.
        n_after = len(nothing) - _n_common(nothing, prompt.ids)
        ids = prompt.ids[: len(prompt.ids) - n_after]
        own = []
        for span in spans:
            with TokenizerFaults.of(prompt.index, prompt.index):
                beginnings = encode(tokenizer, [text[:edge] for edge in span], special=responses.special)
            (start, _), (end, is_whole) = (
                _n_within(tokenizer, ids, beginning[: len(beginning) - n_after]) for beginning in beginnings
            )
            # A token that begins before the end and goes on after it is of the response.
            own.append(range(start, min(end + (not is_whole), len(ids))))
        if not any(own):
            raise PositionError(
                f"Prompt {prompt.index}: none of the {len(prompt.ids)} tokens that the models read is of a "
                "response: it was cut off, or the chat template marks none. Shorten the prompt, leave it "
                f"out, or choose another {option('position')}.",
                option="position",
            )
        found.append(replace(prompt, rendered=text, response=_with_the_one_before(own)))
    return found


def _n_common(ids: Sequence[int], others: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False)))


def _n_within(tokenizer: Any, ids: Sequence[int], beginning: Sequence[int]) -> tuple[int, bool]:
    """Return how many of a text's ids lie within a beginning of the text, and whether they are all of it.

    `beginning` are the ids of the beginning alone. The first ids, as far as they are the same, cover the same
    characters. Tokens that merge across the edge leave others there: those before them are found by what
    they say.
    """

    def said(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    n_common = n_within = _n_common(ids, beginning)
    rest, covered = said(beginning[n_common:]), ""
    while covered != rest and n_within < len(ids):
        longer = said(ids[n_common : n_within + 1])
        if not rest.startswith(longer):
            break
        n_within, covered = n_within + 1, longer
    return n_within, n_common == len(beginning) or covered == rest != ""


def _with_the_one_before(spans: Sequence[range]) -> tuple[range, ...]:
    """Return the same tokens, each span with the one before it; spans that touch are one."""
    joined: list[range] = []
    for span in filter(None, spans):
        start = max(0, span.start - 1)
        if joined and start < joined[-1].stop:
            start = joined.pop().start
        joined.append(range(start, span.stop))
    return tuple(joined)
