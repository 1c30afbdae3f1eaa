"""Every compared token of a few prompts, one value each: a heatmap of tokens and layers is drawn from it."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from lazarus.metrics.states import ROW_METRICS, AccumulatorState, RowValues

_DIVERGENCE = ROW_METRICS.index("divergence")


class TokenTraces:
    """Keeps the divergence of each compared token of the `traced` prompts, in the order of the tokens.

    An update brings whole prompts, in any order; NaN where a state is zero or not finite.
    """

    def __init__(self, traced: Collection[int]) -> None:
        self.traced = frozenset(traced)
        self.of_prompt: dict[int, NDArray[np.float64]] = {}

    def update(self, prompts: Int[Tensor, " rows"], rows: RowValues) -> None:
        """Take in the metrics of every row of some prompts."""
        if not self.traced.intersection(prompts.tolist()):
            return
        owners, valid = prompts.cpu().numpy(), rows.valid.cpu().numpy()
        values = np.where(valid, rows.values[:, _DIVERGENCE].cpu().numpy(), np.nan)
        for prompt in self.traced.intersection(owners.tolist()):
            self.of_prompt[prompt] = values[owners == prompt]

    def state(self) -> AccumulatorState:
        """The prompts that were seen, in order, how many tokens each has, and all their values in a row."""
        prompts = sorted(self.of_prompt)
        found = [self.of_prompt[prompt] for prompt in prompts]
        return {
            "prompts": np.array(prompts, dtype=np.int64),
            "n_tokens": np.array([len(values) for values in found], dtype=np.int64),
            # `concatenate` refuses an empty list: no prompt may have been seen.
            "divergence": np.concatenate([np.empty(0), *found]),
        }

    def add(self, state: AccumulatorState) -> None:
        """Take in what another one holds, from its `state`; they saw different prompts."""
        parts = np.split(state["divergence"], np.cumsum(state["n_tokens"])[:-1])
        # Not strict: of no prompts `np.split` still makes one part, an empty one.
        self.of_prompt |= dict(zip(state["prompts"].tolist(), parts, strict=False))
