"""All that is accumulated at one site."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from lazarus.metrics.cka import CkaRows
from lazarus.metrics.directions import Directions
from lazarus.metrics.states import (
    LOCAL_METRICS,
    ROW_METRICS,
    AccumulatorState,
    PromptMeans,
    Rows,
    compare_local,
    compare_rows,
    count_by_prompt,
    parts_of,
    within,
)
from lazarus.metrics.traces import TokenTraces

_PARTS = ("means", "local", "directions", "kept", "traces")


@dataclass(frozen=True)
class SitePlan:
    """The plan of the measures at every site of a run."""

    n_prompts: int
    centered: bool = False
    """the feature-mean-centred cosine too, for models with LayerNorm"""
    kept: Mapping[int, int] = field(default_factory=dict)
    """prompt → place, of the prompts whose rows CKA is computed on"""
    traced: Collection[int] = ()
    """the prompts of which every token is kept"""
    replays: bool = False
    """whether the local change is of base's block on the fine-tuned model's states, and not the other way"""


class SiteMeasures:
    """The accumulators of one site. An update brings whole prompts, in any order."""

    def __init__(self, plan: SitePlan) -> None:
        self.plan = plan
        self.means = PromptMeans(ROW_METRICS, plan.n_prompts)
        self.local = PromptMeans(LOCAL_METRICS, plan.n_prompts)
        self.directions = Directions()
        self.kept = CkaRows(plan.kept)
        self.traces = TokenTraces(plan.traced)
        self.n_unlike = 0
        """pairs that are left out of every mean, zero or not finite, and not the same in both models"""
        self.n_unmeasured = np.zeros(plan.n_prompts, dtype=np.int64)
        """of each prompt, the pairs of which one is not finite, or one alone is zero"""
        self.n_not_finite = np.zeros((2, plan.n_prompts), dtype=np.int64)
        """the states of each prompt that are not finite, in base and in the fine-tuned model"""

    def update(
        self,
        prompts: Int[Tensor, " rows"],
        base: Float[Tensor, "rows base_width"],
        finetuned: Float[Tensor, "rows finetuned_width"],
        local: Float[Tensor, "rows base_width"] | None = None,
    ) -> None:
        """Take in the two models' states, and what the one's block makes of the other's."""
        self.kept.update(prompts, base, finetuned)
        # Of two widths only CKA is defined, and it has its rows by now.
        if base.shape[1] != finetuned.shape[1]:
            not_finite = [~states.isfinite().all(-1) for states in (base, finetuned)]
            count_by_prompt(self.n_not_finite, prompts, not_finite)
            return
        rows = Rows.of(base, finetuned)
        # The counts below are of rows that are not valid, and nearly always there are none.
        if not rows.valid.all():
            self.n_unlike += rows.count_unlike()
            np.add.at(self.n_unmeasured, prompts.cpu().numpy()[rows.unmeasured().cpu().numpy()], 1)
            count_by_prompt(self.n_not_finite, prompts, rows.not_finite())
        values = compare_rows(rows, self.plan.centered)
        self.means.update(prompts, values)
        self.traces.update(prompts, values)
        self.directions.update(prompts, rows)
        if local is not None:
            self.local.update(
                prompts, compare_local(Rows.of(finetuned if self.plan.replays else base, local))
            )

    def state(self) -> AccumulatorState:
        """Return what all of them have seen."""
        found = {"n_unlike": np.asarray(self.n_unlike)}
        if self.n_unmeasured.any():
            found["n_unmeasured"] = self.n_unmeasured
        if self.n_not_finite.any():
            found["n_not_finite"] = self.n_not_finite
        for name in _PARTS:
            found |= within(name, getattr(self, name).state())
        return found

    def add(self, state: AccumulatorState) -> None:
        """Take in what others have seen, from their `state`."""
        self.n_unlike += state["n_unlike"].item()
        # `state` leaves these two out where they are 0.
        self.n_unmeasured += state.get("n_unmeasured", 0)
        self.n_not_finite += state.get("n_not_finite", 0)
        parts = parts_of(state)
        for name in _PARTS:
            getattr(self, name).add(parts.get(name, {}))
