"""The experts that two routers pick: how far they agree, and how much of a change is where they do not."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lazarus.metrics.states import RowValues

EXPERT_METRICS = ("expert_agreement", "flipped", "squared_change", "flipped_squared_change")


def compare_experts(
    base: Float[Tensor, "rows experts"],
    finetuned: Float[Tensor, "rows experts"],
    change: Float[Tensor, " rows"] | None,
) -> RowValues:
    """Return the metrics of each token, from 1 for each expert that is picked and 0 for the others.

    |A ∩ B| / k for the sets A and B of k experts, in whichever order they were picked (the larger set counts
    where one model picks more); 1 where the sets differ; and `change`, ‖f − b‖² of the block's output, of all
    tokens and of those alone. NaN for these two without `change`.
    """
    both = (base * finetuned).sum(-1).double()
    most = torch.maximum(base.sum(-1), finetuned.sum(-1)).double()
    flipped = (base != finetuned).any(-1).double()
    squared = torch.full_like(both, torch.nan) if change is None else change.to(both)
    columns = [both / most, flipped, squared, flipped * squared]
    return RowValues(torch.stack(columns, dim=-1), most > 0)
