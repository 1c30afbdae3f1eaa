"""Every option of compare, with its default and what it may be."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, TypedDict

from lazarus.errors import UsageError
from lazarus.messages import option
from lazarus.options.activation import Options
from lazarus.options.checks import check_choice, check_count
from lazarus.options.common import (
    Anonymous,
    Dequantize,
    Device,
    Dtype,
    LayersPath,
    NoDigests,
    Seed,
    TrustRemoteCode,
)
from lazarus.options.option import COMPARE, READ, Checked, Option

READ_AT = ("last", "parting")
_ROLES = {"model1": "base", "model2": "finetuned"}


def _check_track(_: str, value: str | Sequence[str]) -> None:
    parse_track(value)


TopK = Annotated[int, Option("How many tokens are kept of each layer.", COMPARE, "N", check=check_count)]
Track = Annotated[
    str | Sequence[str] | None,
    Option(
        'Tokens that are followed through the layers: "42, Paris". A word is its first token, with or '
        "without a space before it.",
        COMPARE,
        "TOKENS",
        shown_default="the first choices of both",
        check=_check_track,
    ),
]
At = Annotated[
    str,
    Option(
        "Read the prompt's last token, or the first one after which the two models' first choices differ.",
        COMPARE,
        "last|parting",
        check=partial(check_choice, choices=READ_AT),
    ),
]
ChatTemplate = Annotated[
    str,
    Option("Wrap the prompt as a user turn, the same text for both models.", READ, "none|model1|model2|FILE"),
]
Truncate = Annotated[bool, Option("Cut the prompt at the models' context instead of refusing it.", READ)]


@dataclass(frozen=True)
class CompareOptions(Checked):
    """The options of `compare`, named as on the command line, checked when they are made.

    Raises:
        UsageError: a value that the option does not take.
    """

    top_k: TopK = 5
    track: Track = None
    at: At = "last"
    chat_template: ChatTemplate = "none"
    truncate: Truncate = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    dequantize: Dequantize = "auto"
    layers_path: LayersPath = None
    seed: Seed = 0
    trust_remote_code: TrustRemoteCode = False
    no_digests: NoDigests = False
    anonymous: Anonymous = False

    def of_pair(self) -> Options:
        """The same for whatever loads two models and reads a prompt: model 1 is base, model 2 fine-tuned."""
        return Options(
            dtype=self.dtype,
            device=self.device,
            chat_template=_ROLES.get(self.chat_template, self.chat_template),
            memory="resident",
            dequantize=self.dequantize,
            align="text",
            truncate=self.truncate,
            layers_path=self.layers_path,
            seed=self.seed,
            trust_remote_code=self.trust_remote_code,
            no_digests=self.no_digests,
        )


class CompareArguments(TypedDict, total=False):
    """The same as keyword arguments, for editors and type checkers (a test keeps the two equal)."""

    top_k: TopK
    track: Track
    at: At
    chat_template: ChatTemplate
    truncate: Truncate
    dtype: Dtype
    device: Device
    dequantize: Dequantize
    layers_path: LayersPath
    seed: Seed
    trust_remote_code: TrustRemoteCode
    no_digests: NoDigests
    anonymous: Anonymous


def parse_track(given: str | Sequence[str] | None) -> list[str] | None:
    """The words that are tracked, each once; None where the first choices are to be.

    A plain string is a CSV row, as the command line has it: white space around an item is dropped, but for
    what stands before it within quotation marks. In a list each text is one word, whole.

    Raises:
        UsageError: there is no word, or one is no text.

    >>> parse_track('42, Paris," Rome","1,000"')
    ['42', 'Paris', ' Rome', '1,000']
    """
    if given is None:
        return None
    words = _items(given) if isinstance(given, str) else list(given)
    for word in words:
        if not isinstance(word, str) or not word:
            raise UsageError(
                f"{option('track')}: {word!r} is no token's text. Leave it out, or write a text.",
                option="track",
            )
        _check_unicode(word)
    if not words:
        raise UsageError(
            f"{option('track')} {given!r} holds no token. Give some, as in {option('track', '42,Paris')}, or "
            f"leave {option('track')} out: then the first choices of both models are tracked.",
            option="track",
        )
    return list(dict.fromkeys(words))


def _items(row: str) -> list[str]:
    csv.field_size_limit(sys.maxsize)
    try:
        rows = list(csv.reader([row], skipinitialspace=True))
    except csv.Error as error:
        raise UsageError(
            f"{option('track')} {row[:40]!r}: a line break outside of quotation marks. Quote a token that "
            "has one.",
            option="track",
        ) from error
    return [item if item.isspace() else item.rstrip() for items in rows for item in items if item]


def _check_unicode(word: str) -> None:
    try:
        word.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{option('track')}: {word!a} is not valid Unicode at index {error.start}. Write it in UTF-8.",
            option="track",
        ) from error
