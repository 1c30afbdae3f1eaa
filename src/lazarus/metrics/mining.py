"""Diff Mining: how often each token is among those whose logits a fine-tune raises, or lowers, the most.

The paper is Kocher, West, Dumas & Minder 2026, arXiv 2608.26462: of its ways to sum up, the Top-K frequency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lazarus.metrics.outcomes import Outcomes
from lazarus.metrics.output import rows_at_once
from lazarus.metrics.states import AccumulatorState, to_float64
from lazarus.metrics.transfers import on_device, on_host

K = 100
"""The tokens that count at a position, as in the authors' own code; of a small vocabulary a tenth."""


class DiffMining:
    """Counts the tokens with the K largest, and those with the K smallest, z_f − z_b at each position.

    The prompt is the unit: a token's share of a prompt's positions first, then the mean over prompts. The
    memory is that of one number a token, and of the counted ids of one prompt.
    """

    def __init__(self, others: Mapping[int, Sequence[int]], outcomes: Outcomes | None = None) -> None:
        """Take the later prompts that repeat each prompt, and which tokens both models have."""
        self._others = others
        self._outcomes = outcomes
        self.sums = np.zeros((2, 0))
        """of each token, the sum of its shares over prompts: promoted, and suppressed"""
        self.n_prompts = 0
        self.n_positions = 0
        self._prompt = -1
        self._ids: list[NDArray[np.int64]] = []
        """of the last prompt, whose rows may go on: the counted ids, [2, rows, K], −1 for none"""

    @property
    def n_tokens(self) -> int:
        """Return for how many tokens both models have logits; 0 before any update."""
        return self.sums.shape[1]

    @property
    def k(self) -> int:
        """Return how many tokens count at a position, at most."""
        return min(K, max(1, self.n_tokens // 10))

    def update(
        self,
        prompts: Int[Tensor, " rows"],
        base: Float[Tensor, "rows base_tokens"],
        finetuned: Float[Tensor, "rows finetuned_tokens"],
        valid: Bool[Tensor, " rows"],
    ) -> None:
        """Take in the logits of both models at some positions, without the rows that are not valid.

        A prompt's rows come one after the other, in one update or in several that follow on each other.
        """
        if self._outcomes is not None:
            base = base[:, on_device(self._outcomes.base, base.device)]
            finetuned = finetuned[:, on_device(self._outcomes.finetuned, finetuned.device)]
        if not self.n_tokens:
            self.sums = np.zeros((2, base.shape[1]))
        if not valid.all():
            at = torch.nonzero(valid.cpu()).flatten()
            base, finetuned = (side[at.to(side.device)] for side in (base, finetuned))
            prompts = prompts[at.to(prompts.device)]
        if not len(base):
            return
        n_rows = rows_at_once(base)
        parts = zip(torch.split(base, n_rows), torch.split(finetuned, n_rows), strict=True)
        found = on_host([leading(b, f, self.k) for b, f in parts])
        ids: NDArray[np.int64] = torch.cat(found, dim=1).numpy()
        owners = prompts.cpu().numpy()
        edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
        for start, end in pairwise(edges):
            prompt = int(owners[start])
            if prompt != self._prompt:
                self._close()
                self.n_prompts += self._n_times(prompt)
            self._prompt = prompt
            self._ids.append(ids[:, start:end])
            self.n_positions += self._n_times(prompt) * (end - start)

    def frequencies(self) -> NDArray[np.float64]:
        """Return the share of positions at which each token is promoted, and suppressed, [2, tokens].

        0 to 1, as a mean over prompts of each prompt's own share; without tokens before any update.
        """
        self._close()
        # Sums in another order differ in their last bits, and tokens that tie must not change places.
        found: NDArray[np.float64] = np.round(self.sums / max(self.n_prompts, 1), 12)
        return found

    def state(self) -> AccumulatorState:
        """Return the sums and the counts; the sums only of tokens that counted."""
        self._close()
        ids = np.flatnonzero(self.sums.any(axis=0))
        counts = {name: np.asarray(getattr(self, name)) for name in ("n_tokens", "n_prompts", "n_positions")}
        return {"ids": ids, "sums": self.sums[:, ids], **counts}

    def add(self, state: AccumulatorState) -> None:
        """Take in what another one has seen, from its `state`; they saw different prompts."""
        self._close()
        if not self.n_tokens:
            self.sums = np.zeros((2, state["n_tokens"].item()))
        self.sums[:, state["ids"]] += state["sums"]
        self.n_prompts += state["n_prompts"].item()
        self.n_positions += state["n_positions"].item()

    def _close(self) -> None:
        """Add the shares of the last prompt: all its rows have come."""
        if not self._ids:
            return
        ids = np.concatenate(self._ids, axis=1)
        for sums, counted in zip(self.sums, ids, strict=True):
            tokens, counts = np.unique(counted[counted >= 0], return_counts=True)
            sums[tokens] += counts * (self._n_times(self._prompt) / ids.shape[1])
        self._prompt, self._ids = -1, []

    def _n_times(self, prompt: int) -> int:
        """Return how often the tokens of a prompt were given: by itself, and by prompts that repeat it."""
        return 1 + len(self._others.get(prompt, ()))


def leading(
    base: Float[Tensor, "rows tokens"], finetuned: Float[Tensor, "rows tokens"], k: int
) -> Int[Tensor, "2 rows k"]:
    """Return the ids with the k largest and the k smallest z_f − z_b of each row, [2, rows, k]; −1 for none.

    Of tokens that tie at the k-th place none is taken: which of them came first would be chance. So a row in
    which nothing differs, or all logits by the same amount, has none. A token that neither model can give
    (−∞ in both) is none either.
    """
    if base.shape[1] <= k:  # of one token alone, nothing is above another
        return torch.full((2, len(base), k), -1, device=base.device)
    difference = to_float64(finetuned) - to_float64(base)
    impossible = difference.isnan()  # −∞ − (−∞)
    found = []
    for scores in (difference, -difference):
        best = scores.masked_fill(impossible, -torch.inf).topk(k + 1)
        least = scores.masked_fill(impossible, torch.inf).amin(-1, keepdim=True)
        # Only what is above the (k+1)th counts: that leaves out ties at the last place. Where at most k
        # tokens can come, the (k+1)th is −∞, and the smallest difference stands in for it.
        counted = best.values[:, :k] > torch.maximum(best.values[:, k:], least)
        found.append(best.indices[:, :k].masked_fill(~counted, -1))
    return torch.stack(found)
