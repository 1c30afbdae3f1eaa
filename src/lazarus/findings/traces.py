"""Token by token: the divergence of every compared token of a few prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lazarus.engine import Position, compared_tokens
from lazarus.findings.numbers import Findings
from lazarus.reading import Reading
from lazarus.results import TokenTrace, finite_or_none
from lazarus.tokens import token_text

MOST_SHOWN = 8


def trace_tokens(
    found: Findings, reading: Reading, position: Position, *, choose: bool
) -> list[TokenTrace] | None:
    """The traced prompts' tokens, in the order of the prompts; None where no prompt was traced.

    With `choose`, of the `MOST_SHOWN` prompts among them that diverge most at any layer.
    """
    by_layer = [found.measured.sites[layer].traces.of_prompt for layer in found.layers]
    traced = sorted(by_layer[0])
    if choose:
        traced = _most_divergent(found, traced)
    traces = [
        _trace(reading, prompt, position, np.stack([layer[prompt] for layer in by_layer], axis=1))
        for prompt in traced
    ]
    return traces or None


def _most_divergent(found: Findings, prompts: Sequence[int]) -> list[int]:
    largest = np.nan_to_num(found.divergence, nan=-1.0).max(axis=1)
    ranked = sorted(prompts, key=lambda prompt: (-largest[prompt], prompt))
    return sorted(ranked[:MOST_SHOWN])


def _trace(reading: Reading, prompt: int, position: Position, divergence: NDArray[np.float64]) -> TokenTrace:
    """`divergence` is [tokens, layers]."""
    ids, tokenizer = reading.base[prompt].ids, reading.tokenizers[0]
    positions = list(compared_tokens(position, len(ids)))
    return TokenTrace(
        prompt_index=prompt,
        positions=positions,
        tokens=[token_text(tokenizer, ids[i]) for i in positions],
        divergence=[[finite_or_none(value) for value in token] for token in divergence],
    )
