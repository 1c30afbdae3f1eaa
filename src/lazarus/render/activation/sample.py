"""The prompts, texts and tokens that a page has room for: it must open at once and fit into a mail."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from lazarus.render.base.script import in_script
from lazarus.results import ActivationDiffRecord, TokenTrace

MOST_CELLS = 80_000
"""Prompts × layers: as many are 853 kB in the page."""
MOST_TEXT_BYTES = 240_000
"""All prompts together, as the page's JSON has them."""
MOST_CHARACTERS = 4_000
"""Of one prompt's text."""
LEAST_CHARACTERS = 80
"""Rather than cut texts any shorter, the page leaves prompts out."""
MOST_MATRIX_BYTES = 860_000
"""The prompts' cells and the tokens' together."""

BYTES_A_PROMPT = 24
"""What a prompt takes besides its text: its index, group and number of tokens."""
BYTES_A_CHOICE = 14
"""What a likely token takes besides its text: its probability, and brackets."""
BYTES_A_KL = 32
"""What KL after a token takes, and the brackets about its likely tokens."""
BYTES_A_CELL = 32 / 3
"""A float64 in base64."""


@dataclass(frozen=True)
class Sample:
    """The prompts of a page, in their order in the result."""

    indexes: Sequence[int]
    texts: Sequence[str]
    """as the page has them, perhaps cut"""
    n_prompts: int
    """in the whole result"""
    characters: int
    """after which a text is cut"""
    n_cut: int
    seed: int

    @property
    def is_whole(self) -> bool:
        """Return whether every prompt of the result is there."""
        return len(self.indexes) == self.n_prompts

    @property
    def n_worst(self) -> int:
        """Return how many of them were chosen for their divergence, and not drawn."""
        return len(self.indexes) // 2


@dataclass(frozen=True)
class TokenSample:
    """The token traces of a page; the last one may be cut."""

    traces: Sequence[TokenTrace]
    n_traces: int
    """in the whole result"""
    n_tokens_cut: int
    """tokens at the end of the last trace that the page lacks"""


def is_sampled(record: ActivationDiffRecord) -> bool:
    """Return whether the report has room for a part of the prompts only."""
    return room(record) < len(record.prompts)


def room(record: ActivationDiffRecord) -> int:
    """Return how many prompts a report of this result can hold."""
    n_prompts = len(record.prompts)
    size = sum(_size(prompt.text[:LEAST_CHARACTERS]) for prompt in record.prompts)
    fit = n_prompts if size <= MOST_TEXT_BYTES else n_prompts * MOST_TEXT_BYTES // size
    return min(n_prompts, max(1, MOST_CELLS // len(record.layers)), fit)


def choose(record: ActivationDiffRecord) -> Sample:
    """The prompts of the page: all of them or, where there is no room, the worst half and a drawn one."""
    texts = [prompt.text for prompt in record.prompts]
    chosen = _chosen(record, room(record))
    # The worst may be longer than the usual ones.
    while sum(_size(texts[i][:LEAST_CHARACTERS]) for i in chosen) > MOST_TEXT_BYTES and len(chosen) > 1:
        chosen = _chosen(record, len(chosen) * 9 // 10)
    kept = [texts[i] for i in chosen]
    characters = _longest(kept)
    return Sample(
        indexes=chosen,
        texts=[text[:characters] for text in kept],
        n_prompts=len(texts),
        characters=characters,
        n_cut=sum(len(text) > characters for text in kept),
        seed=record.settings.seed,
    )


def choose_tokens(record: ActivationDiffRecord, n_prompts: int) -> TokenSample | None:
    """The token traces that fit beside the cells of `n_prompts` prompts, in order; None without any."""
    if not record.tokens:
        return None
    a_row = BYTES_A_CELL * len(record.layers)
    # What the cells of the prompts leave is for the tokens.
    spare = MOST_MATRIX_BYTES - a_row * n_prompts
    traces: list[TokenTrace] = []
    for trace in record.tokens:
        sizes = np.cumsum([a_row + _token_size(trace, i) for i in range(len(trace.tokens))])
        fit = int(np.searchsorted(sizes, spare, side="right"))
        if fit == len(trace.tokens) or not traces:
            traces.append(_first_tokens(trace, max(fit, 1)))
        if fit < len(trace.tokens):
            break
        spare -= float(sizes[-1])
    cut = len(record.tokens[len(traces) - 1].tokens) - len(traces[-1].tokens)
    return TokenSample(traces, len(record.tokens), cut)


def worst_first(divergence: NDArray[np.float64]) -> list[int]:
    """The prompts by their largest divergence at any layer, [prompts, layers]; those without any last."""
    largest = np.where(np.isnan(divergence), -np.inf, divergence).max(axis=1)
    # Stable, so that equal prompts keep their order, and the page its bytes.
    return [int(i) for i in np.argsort(-largest, kind="stable")]


def _chosen(record: ActivationDiffRecord, count: int) -> list[int]:
    n_prompts = len(record.prompts)
    if count >= n_prompts:
        return list(range(n_prompts))
    ranked = worst_first(record.results.column("divergence"))
    worst = ranked[: count // 2]
    # By the run's own seed and in a fixed order, so that one result always gives the same page.
    drawn = random.Random(record.settings.seed).sample(sorted(ranked[count // 2 :]), count - count // 2)
    return sorted([*worst, *drawn])


def _longest(texts: Sequence[str]) -> int:
    """Return after how many characters every text is cut so that all of them fit."""
    low, high = LEAST_CHARACTERS, MOST_CHARACTERS
    if sum(_size(text[:high]) for text in texts) <= MOST_TEXT_BYTES:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if sum(_size(text[:middle]) for text in texts) <= MOST_TEXT_BYTES:
            low = middle
        else:
            high = middle
    return low


def _size(text: str) -> int:
    return _text_size(text) + BYTES_A_PROMPT


def _text_size(text: str) -> int:
    return len(in_script(text).encode())


def _first_tokens(trace: TokenTrace, count: int) -> TokenTrace:
    columns = ("positions", "tokens", "divergence", "kl", "agrees", "base_choices", "finetuned_choices")
    found = {name: getattr(trace, name) for name in columns}
    return msgspec.structs.replace(
        trace, **{name: None if values is None else values[:count] for name, values in found.items()}
    )


def _token_size(trace: TokenTrace, index: int) -> int:
    """Return the bytes of a token in the page: its text, and the likely tokens after it."""
    sides = (trace.base_choices, trace.finetuned_choices)
    likely = [choice.token for side in sides if side is not None for choice in side[index]]
    own = BYTES_A_PROMPT + _size(trace.tokens[index])
    return own + (BYTES_A_KL if likely else 0) + sum(BYTES_A_CHOICE + _text_size(text) for text in likely)
