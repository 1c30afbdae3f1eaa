"""Every option of compare, with its default and what it may be."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from lazarus.errors import UsageError
from lazarus.options.activation import Options
from lazarus.options.checks import DTYPES, check_choice, check_device, check_known

_ROLES = {"model1": "base", "model2": "finetuned"}


@dataclass(frozen=True)
class CompareOptions:
    """The options of `compare`, named as on the command line, checked when they are made.

    Raises:
        UsageError: a value that the option does not take.
    """

    top_k: int = 5
    track: str | Sequence[str] | None = None
    dtype: str = "auto"
    device: str = "auto"
    chat_template: str = "none"
    truncate: bool = False
    layers_path: str | None = None
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.top_k, bool) or self.top_k < 1:
            raise UsageError(f"--top-k {self.top_k}: give a number of at least 1.")
        parse_track(self.track)
        check_choice("dtype", self.dtype, DTYPES)
        check_device(self.device)
        if self.layers_path == "":
            raise UsageError("--layers-path is empty. Give a path such as model.layers.")

    def of_pair(self) -> Options:
        """The same for whatever loads two models and reads a prompt: model 1 is base, model 2 fine-tuned."""
        return Options(
            dtype=self.dtype,
            device=self.device,
            chat_template=_ROLES.get(self.chat_template, self.chat_template),
            memory="resident",
            align="text",
            truncate=self.truncate,
            layers_path=self.layers_path,
            seed=self.seed,
            trust_remote_code=self.trust_remote_code,
        )


class CompareArguments(TypedDict, total=False):
    """The same as keyword arguments, for editors and type checkers (a test keeps the two equal)."""

    top_k: int
    track: str | Sequence[str] | None
    dtype: str
    device: str
    chat_template: str
    truncate: bool
    layers_path: str | None
    seed: int
    trust_remote_code: bool


def make_compare_options(**given: Any) -> CompareOptions:
    """Options from keyword arguments.

    Raises:
        UsageError: an unknown option, or a value that it does not take.
    """
    check_known(CompareOptions, given)
    return CompareOptions(**given)


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
            raise UsageError(f"--track: {word!r} is no token's text. Leave it out, or write a text.")
        _check_unicode(word)
    if not words:
        raise UsageError(
            f"--track {given!r} holds no token. Give some, as in --track 42,Paris, or leave --track out: "
            "then the first choices of both models are tracked."
        )
    return list(dict.fromkeys(words))


def _items(row: str) -> list[str]:
    csv.field_size_limit(sys.maxsize)
    try:
        rows = list(csv.reader([row], skipinitialspace=True))
    except csv.Error as error:
        raise UsageError(
            f"--track {row[:40]!r}: a line break outside of quotation marks. Quote a token that has one."
        ) from error
    return [item if item.isspace() else item.rstrip() for items in rows for item in items if item]


def _check_unicode(word: str) -> None:
    try:
        word.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"--track: {word!a} is not valid Unicode at index {error.start}. Write it in UTF-8."
        ) from error
