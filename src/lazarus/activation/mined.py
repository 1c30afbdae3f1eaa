"""The tokens of Diff Mining, told from what was counted; or why none are. No model here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lazarus.activation.accumulation import Accumulation
from lazarus.activation.findings import Findings
from lazarus.notes import Notes
from lazarus.results import Mined, MinedToken

N_TOKENS = 20


def mined_tokens(seen: Accumulation, text_of: Callable[[int], str], notes: Notes) -> Mined | None:
    """Return the tokens that are promoted and suppressed most often; None, with a note, where none are told.

    `text_of` returns the text of a token by its id in base.
    """
    mining, outcomes = seen.mining, seen.plan.outcomes
    why_not = _why_not(seen)
    if mining is None or why_not is not None:
        notes.add("nothing-mined", f"no tokens were mined: {why_not}")
        return None

    def tokens(frequencies: NDArray[np.float64]) -> list[MinedToken]:
        # Of equal ones the first ids: a stable sort keeps their order.
        first = np.argsort(-frequencies, kind="stable")[:N_TOKENS]
        found = [int(i) for i in first if frequencies[i] > 0]
        ids = found if outcomes is None else outcomes.base[found].tolist()
        return [
            MinedToken(token=text_of(i), token_id=i, frequency=float(frequencies[place]))
            for i, place in zip(ids, found, strict=True)
        ]

    promoted, suppressed = map(tokens, mining.frequencies())
    return Mined(
        k=mining.k,
        n_tokens=mining.n_tokens,
        n_positions=mining.n_positions,
        promoted=promoted,
        suppressed=suppressed,
    )


def _why_not(seen: Accumulation) -> str | None:
    n_positions = int(seen.output.n_rows.sum())
    if not n_positions:
        return "there are no logits of both models to compare"
    if seen.mining is None or seen.mining.n_positions != n_positions:
        return (
            "shards in the folder were measured without a readout. Run again with another folder for the work"
        )
    if not seen.mining.n_tokens:
        return "the two vocabularies have no token in common"
    if Findings(seen).is_output_noise:
        return "the logits differ by no more than the noise, and the tokens would be the noise's"
    return None
