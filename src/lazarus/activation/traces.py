"""Token by token: the divergence of every compared token of a few prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lazarus.activation.findings import Findings
from lazarus.results import TokenTrace, finite_or_none

MOST_SHOWN = 8


Read = Callable[[int], tuple[Sequence[int], Sequence[str]]]
"""returns which tokens of a prompt are compared, by their indices, and the text of each"""


def trace_tokens(found: Findings, read: Read, *, choose: bool) -> list[TokenTrace] | None:
    """Return the traced prompts' tokens, in the order of the prompts; None where no prompt was traced.

    With `choose`, of the `MOST_SHOWN` prompts among them that diverge most at any layer.
    """
    by_layer = [found.seen.sites[layer].traces.of_prompt for layer in found.layers]
    # Every layer traces the same prompts.
    traced = sorted(by_layer[0])
    if choose:
        traced = _most_divergent(found, traced)
    traces = [
        _trace(prompt, read, np.stack([layer[prompt] for layer in by_layer], axis=1)) for prompt in traced
    ]
    return traces or None


def _most_divergent(found: Findings, prompts: Sequence[int]) -> list[int]:
    # Below every divergence: a prompt without a value comes after all that have one.
    largest = np.nan_to_num(found.divergence, nan=-1.0).max(axis=1)
    ranked = sorted(prompts, key=lambda prompt: (-largest[prompt], prompt))
    return sorted(ranked[:MOST_SHOWN])


def _trace(prompt: int, read: Read, divergence: NDArray[np.float64]) -> TokenTrace:
    """`divergence` is [tokens, layers]."""
    positions, tokens = read(prompt)
    return TokenTrace(
        prompt_index=prompt,
        positions=list(positions),
        tokens=list(tokens),
        divergence=[[finite_or_none(value) for value in token] for token in divergence],
    )
