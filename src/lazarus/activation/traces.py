"""Token by token: the divergence and the next token after every compared token of a few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import msgspec
import numpy as np

from lazarus.activation.findings import Findings
from lazarus.metrics import NextTokens
from lazarus.results import Parting, TokenChoice, TokenTrace, finite_or_none
from lazarus.statistics import FACTOR

MOST_SHOWN = 8


@runtime_checkable
class Reader(Protocol):
    """The text of tokens."""

    def compared(self, prompt: int) -> tuple[Sequence[int], Sequence[str]]:
        """Return the indices of the compared tokens in a prompt, and the text of each."""

    def token(self, token_id: int, side: int) -> str:
        """Return the text of a token of base (0) or of the fine-tuned model (1)."""


def trace_tokens(found: Findings, reader: Reader, *, choose: bool) -> list[TokenTrace] | None:
    """Return the traced prompts' tokens, in the order of the prompts; None where no prompt was traced.

    With `choose`, of the `MOST_SHOWN` prompts among them that diverge most at any layer.
    """
    by_layer = [found.seen.sites[layer].traces.of_prompt for layer in found.layers]
    outputs = found.seen.token_outputs.of_prompt
    # Every layer traces the same prompts.
    traced = sorted(by_layer[0])
    if choose:
        traced = _most_divergent(found, traced)
    noise = finite_or_none(FACTOR * found.seen.margin_noise)
    traces = []
    for prompt in traced:
        positions, tokens = reader.compared(prompt)
        divergence = np.concatenate([layer[prompt] for layer in by_layer], axis=1)
        trace = TokenTrace(
            prompt_index=prompt,
            positions=list(positions),
            tokens=list(tokens),
            divergence=[[finite_or_none(value) for value in token] for token in divergence],
        )
        # There is no output where the heads were not run.
        after = [NextTokens.of(row) for row in outputs.get(prompt, [])]
        traces.append(_with_output(trace, after, reader, noise) if after else trace)
    return traces or None


def _most_divergent(found: Findings, prompts: Sequence[int]) -> list[int]:
    # Below every divergence: a prompt without a value comes after all that have one.
    largest = np.nan_to_num(found.divergence, nan=-1.0).max(axis=1)
    ranked = sorted(prompts, key=lambda prompt: (-largest[prompt], prompt))
    return sorted(ranked[:MOST_SHOWN])


def _with_output(
    trace: TokenTrace, after: Sequence[NextTokens], reader: Reader, noise: float | None
) -> TokenTrace:
    """Return the trace with what both models would say after each token."""
    base, finetuned = (
        [
            [
                TokenChoice(token=reader.token(i, side), token_id=i, probability=p)
                for i, p in each.choices[side]
            ]
            for each in after
        ]
        for side in (0, 1)
    )
    parting = None
    parted = next((i for i, each in enumerate(after) if each.agrees is False), None)
    if parted is not None:
        margins = after[parted].margins
        # No less than the rounding of two logits, whatever the few trials have moved.
        noise = None if noise is None else max(noise, after[parted].rounding)
        parting = Parting(
            position=trace.positions[parted],
            token_base=base[parted][0].token,
            token_finetuned=finetuned[parted][0].token,
            margin_base=finite_or_none(margins[0]),
            margin_finetuned=finite_or_none(margins[1]),
            noise_margin=noise,
            cause=_cause(margins, noise),
        )
    return msgspec.structs.replace(
        trace,
        kl=[finite_or_none(each.kl) for each in after],
        agrees=[each.agrees for each in after],
        base_choices=base,
        finetuned_choices=finetuned,
        parting=parting,
    )


def _cause(margins: tuple[float, float], noise: float | None) -> Literal["noise", "change"] | None:
    """Return `noise` where noise alone may turn the first choice of each of the two models, else `change`."""
    if noise is None:
        return None
    return "noise" if max(margins) <= noise else "change"
