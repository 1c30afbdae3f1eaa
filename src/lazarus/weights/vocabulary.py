"""Pairs the rows of two vocabularies' tables by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazarus.errors import ModelError
from lazarus.foreign import UnreadableError, decoded
from lazarus.messages import in_flags
from lazarus.models import Source
from lazarus.models.tokenizer import TOKENIZER_FILES, first_tokenizer
from lazarus.tokens import listed

_MORE_FILES = ("added_tokens.json", "special_tokens_map.json")
_CONFIG = "tokenizer_config.json"
_NOT_OF_TOKENS = ("chat_template", "model_max_length", "padding_side", "truncation_side", "name_or_path")
"""entries of tokenizer_config.json that no token depends on"""


@dataclass(frozen=True)
class Alignment:
    """Rows of two tables that belong together, and how many have no counterpart."""

    base: NDArray[np.int64]
    finetuned: NDArray[np.int64]
    base_alone: Sequence[int]
    finetuned_alone: Sequence[int]

    @property
    def n_moved(self) -> int:
        """Return how many rows are at another place."""
        return int(np.count_nonzero(self.base != self.finetuned))


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of the two, by their ids, as far as they are needed to match rows."""

    base: Mapping[str, int] | None = None
    finetuned: Mapping[str, int] | None = None
    unknown: str | None = None
    """why rows can be matched by their index only"""
    spelled_otherwise: bool = False
    """whether one of the two may spell the other's tokens in another way: llama.cpp does"""

    @property
    def differs(self) -> bool:
        """Return whether rows have to be matched by token."""
        return self.base != self.finetuned

    def align(self, n_base: int, n_finetuned: int) -> Alignment:
        """Match the rows of two tables of that many rows.

        A token's row belongs to its row in the other. Rows that are left belong together by their number
        where one of the two has no token there: such rows pad a table, and a new token may take one.
        """
        assert self.base is not None
        assert self.finetuned is not None
        places: dict[int, int] = {}
        for token, row in self.base.items():
            other = self.finetuned.get(token, n_finetuned)
            if row < n_base and other < n_finetuned:
                places.setdefault(row, other)
        left, taken = set(range(n_base)) - places.keys(), set(range(n_finetuned)) - set(places.values())
        named_in_both = set(self.base.values()) & set(self.finetuned.values())
        # Two names for one row are two tokens, unless one of the two may only spell it otherwise.
        padding = left & taken if self.spelled_otherwise else (left & taken) - named_in_both
        places |= {row: row for row in padding}
        ours = np.array(sorted(places), dtype=np.int64)
        theirs = np.array([places[row] for row in ours.tolist()], dtype=np.int64)
        return Alignment(ours, theirs, sorted(left - padding), sorted(taken - padding))

    def named(self, alignment: Alignment) -> str:
        """Name the tokens without a counterpart, those of fine-tuned first."""
        sides = ((self.finetuned, alignment.finetuned_alone), (self.base, alignment.base_alone))
        names = []
        for tokens, rows in sides:
            of_row = {row: token for token, row in (tokens or {}).items()}
            names += [repr(of_row[row]) for row in rows if row in of_row]
        return listed(names, 5)


def read_vocabulary(
    base: Sequence[Source], finetuned: Sequence[Source], *, trust_remote_code: bool
) -> Vocabulary:
    """Read the tokens of two models; each has the sources of its tokenizer, an adapter's first."""
    files = [_files(sources) for sources in (base, finetuned)]
    # The same files are the same tokens, and neither tokenizer need be loaded.
    if (base[-1].place == finetuned[-1].place and not any(files)) or files[0] == files[1] != {}:
        return Vocabulary()
    found: list[Mapping[str, int]] = []
    for role, sources in (("base", base), ("fine-tuned", finetuned)):
        try:
            tokenizer = first_tokenizer(sources, trust_remote_code)
        except ModelError as error:
            return Vocabulary(unknown=f"the tokenizer of {role} cannot be read ({in_flags(error.marked)})")
        if tokenizer is None:
            return Vocabulary(unknown=f"{role} brings no tokenizer that would tell which token is where")
        found.append(tokenizer.get_vocab())
    from_gguf = any(sources[-1].gguf_file for sources in (base, finetuned))
    return Vocabulary(found[0], found[1], spelled_otherwise=from_gguf)


def _files(sources: Sequence[Source]) -> dict[str, Any]:
    """Return what is in a tokenizer's files, as far as tokens depend on it.

    Empty where there is none in files.
    """
    for source in sources:
        paths = {name: source.file(name) for name in (*TOKENIZER_FILES, *_MORE_FILES) if not source.gguf_file}
        if any(paths[name] for name in TOKENIZER_FILES if name in paths):
            return {name: _content(name, path) for name, path in paths.items() if path is not None}
    return {}


def _content(name: str, path: str) -> Any:
    found = Path(path).read_bytes()
    if name != _CONFIG:
        return found
    try:
        settings = decoded(found)
    except UnreadableError:
        return found
    if not isinstance(settings, dict):
        return found
    return {key: value for key, value in settings.items() if key not in _NOT_OF_TOKENS}
