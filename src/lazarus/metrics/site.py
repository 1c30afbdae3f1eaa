"""All that is accumulated at one site."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lazarus.metrics.cka import CkaRows, KeptRows
from lazarus.metrics.directions import Directions
from lazarus.metrics.states import (
    LOCAL_METRICS,
    ROW_METRICS,
    AccumulatorState,
    Owners,
    PromptMeans,
    Rows,
    compare_local,
    compare_rows,
    count_by_prompt,
    parts_of,
    within,
)
from lazarus.metrics.traces import TokenTraces
from lazarus.metrics.transfers import Update, do_together

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


@dataclass(frozen=True)
class BatchRows:
    """The prompts that the rows of a batch belong to, in the ways in which a site asks for them."""

    prompts: Int[Tensor, " rows"]
    owners: Owners
    kept: KeptRows

    @classmethod
    def of(cls, prompts: Int[Tensor, " rows"], plan: SitePlan) -> BatchRows:
        """Return them, for all sites of a plan."""
        # A copy, because what is remembered for a tensor may not hold it.
        prompts = prompts.to("cpu", copy=True)
        return cls(prompts, Owners.of(prompts), KeptRows.of(prompts, plan.kept))


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
        do_together([self.updating(BatchRows.of(prompts, self.plan), base, finetuned, local)])

    def updating(
        self,
        batch: BatchRows,
        base: Float[Tensor, "rows base_width"],
        finetuned: Float[Tensor, "rows finetuned_width"],
        local: Float[Tensor, "rows base_width"] | None = None,
    ) -> Update[None]:
        """Update in steps."""
        yield from self.kept.updating(batch.kept, base, finetuned)
        # Of two widths only CKA is defined, and it has its rows by now.
        if base.shape[1] != finetuned.shape[1]:
            not_finite = yield [~states.isfinite().all(-1) for states in (base, finetuned)]
            count_by_prompt(self.n_not_finite, batch.prompts, not_finite)
            return
        rows, owners = Rows.of(base, finetuned), batch.owners
        values = yield from self.means.updating(batch.prompts, compare_rows(rows, self.plan.centered))
        self.traces.update(batch.prompts, values)
        # Nearly always all are valid.
        if not values.valid.all():
            yield from self._count_invalid(batch.prompts, rows)
            valid = torch.nonzero(values.valid).flatten()
            rows, owners = rows.at(valid), Owners.of(batch.prompts[valid])
        yield from self.directions.updating(owners, rows)
        if local is not None:
            known = Rows.of(finetuned if self.plan.replays else base, local)
            yield from self.local.updating(batch.prompts, compare_local(known))

    def _count_invalid(self, prompts: Int[Tensor, " rows"], rows: Rows) -> Update[None]:
        unlike, unmeasured, *not_finite = yield (rows.unlike(), rows.unmeasured(), *rows.not_finite())
        self.n_unlike += int(unlike.sum())
        np.add.at(self.n_unmeasured, prompts.numpy()[unmeasured.numpy()], 1)
        count_by_prompt(self.n_not_finite, prompts, not_finite)

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
