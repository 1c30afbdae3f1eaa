"""The change of scores and embeddings, computed from what was accumulated of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lazarus.metrics import ScoreMeans, ScorePlan, mean_over_prompts, scores_relative_l2
from lazarus.results import Scores, finite_or_none
from lazarus.statistics import (
    intervals,
    rank_correlation,
    share_interval,
    similarity_correlation,
    size_interval,
)

Floats = NDArray[np.float64]
Interval = tuple[float, float]


def find_scores(seen: ScoreMeans, plan: ScorePlan, seed: int) -> Scores:
    """Return the numbers of a run's scores or embeddings; there is at least one pair of them."""
    means = seen.means()
    size, agreement, divergence = (means[name] for name in ("absolute_difference", "agreement", "divergence"))
    base, finetuned = _kept(seen)
    correlation, interval = _correlation(seen, base, finetuned, seed)
    listed = plan.kind == "scores"
    return Scores(
        labels=list(plan.labels),
        relative_l2=finite_or_none(scores_relative_l2(seen)),
        mean_absolute_difference=finite_or_none(mean_over_prompts(size)),
        mean_absolute_difference_interval=size_interval(size, seed),
        agreement=finite_or_none(mean_over_prompts(agreement)),
        agreement_interval=share_interval(agreement),
        divergence=finite_or_none(mean_over_prompts(divergence)),
        divergence_interval=_divergence_interval(divergence, seed),
        rank_correlation=finite_or_none(correlation),
        rank_correlation_interval=interval,
        base=_listed(base) if listed else [],
        finetuned=_listed(finetuned) if listed else [],
    )


def _correlation(
    seen: ScoreMeans, base: Floats, finetuned: Floats, seed: int
) -> tuple[float, Interval | None]:
    if seen.kind == "token_scores":
        return float("nan"), None  # a prompt's tokens have an order of their own
    finite = np.isfinite(base).all(1) & np.isfinite(finetuned).all(1)
    correlate = rank_correlation if seen.kind == "scores" else similarity_correlation
    return correlate(base[finite], finetuned[finite], seed)


def _kept(seen: ScoreMeans) -> tuple[Floats, Floats]:
    """Both models' rows of the prompts that are kept, in their order; NaN of one that was not seen."""
    kept = seen.kept
    if kept.base is None or kept.finetuned is None:
        return np.zeros((0, 0)), np.zeros((0, 0))
    base, finetuned = kept.base.numpy(), kept.finetuned.numpy()
    unseen = ~kept.seen[:, None]
    return np.where(unseen, np.nan, base), np.where(unseen, np.nan, finetuned)


def _divergence_interval(divergence: Floats, seed: int) -> Interval | None:
    found = intervals(divergence[:, None], seed)
    if found is None or np.isnan(found.low[0]):
        return None
    return float(found.low[0]), float(found.high[0])


def _listed(scores: Floats) -> list[list[float | None]]:
    return [[finite_or_none(value) for value in row] for row in scores.tolist()]
