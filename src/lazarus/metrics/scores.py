"""Pairs of scores, or of embeddings, of the same prompt → how far apart they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lazarus.metrics.cka import CkaRows
from lazarus.metrics.states import (
    AccumulatorState,
    PromptMeans,
    RowValues,
    divergence,
    part_of,
    to_float64,
    within,
)

SCORE_METRICS = ("squared_difference", "squared_base", "absolute_difference", "agreement", "divergence")

ScoreKind = Literal["scores", "token_scores", "embedding"]
"""a score a label of each prompt, or of each of its tokens; an embedding of each prompt"""


@dataclass(frozen=True)
class ScorePlan:
    """The outputs that are compared: of which kind, and which columns of each model are one label.

    Of embeddings all columns are compared, and there are no labels.
    """

    kind: ScoreKind
    labels: tuple[str, ...] = ()
    """what base calls the labels that are compared, in its order"""
    base: tuple[int, ...] = ()
    finetuned: tuple[int, ...] = ()
    """the column of each of these labels"""

    def columns(self, scores: Float[Tensor, "rows width"], side: int) -> Float[Tensor, "rows labels"]:
        """Return the columns of one model that are compared, in base's order."""
        if self.kind == "embedding":
            return scores
        return scores[:, torch.tensor((self.base, self.finetuned)[side], device=scores.device)]


def compare_scores(
    base: Float[Tensor, "rows width"], finetuned: Float[Tensor, "rows width"], kind: ScoreKind
) -> RowValues:
    """Compare each pair of rows in float64: the labels' scores, or an embedding.

    ‖f − b‖² and ‖b‖², of which `relative_l2` is made over all prompts; the mean of |f − b| over labels;
    whether the largest score is the same label's, 0 or 1, NaN of a single label; and of embeddings the
    divergence, 0 to 2. A row that is not finite in both is not valid.
    """
    b, f = to_float64(base), to_float64(finetuned)
    nothing = torch.full((len(b),), torch.nan, dtype=b.dtype, device=b.device)
    is_choice = kind != "embedding" and b.shape[1] > 1
    columns = [
        (f - b).square().sum(-1),
        b.square().sum(-1),
        (f - b).abs().mean(-1),
        (b.argmax(-1) == f.argmax(-1)).double() if is_choice else nothing,
        divergence(b, f) if kind == "embedding" else nothing,
    ]
    return RowValues(torch.stack(columns, dim=-1), (b.isfinite() & f.isfinite()).all(-1))


class ScoreMeans(PromptMeans):
    """The means of `SCORE_METRICS` of each prompt, and the rows of those prompts that are kept for ranks.

    `slots` gives the prompts that are kept a place each.
    """

    def __init__(self, n_prompts: int, kind: ScoreKind, slots: Mapping[int, int]) -> None:
        super().__init__(SCORE_METRICS, n_prompts)
        self.kind = kind
        self.kept = CkaRows(slots, torch.float64)

    def compare(
        self, prompts: Int[Tensor, " rows"], base: Float[Tensor, "rows w"], finetuned: Float[Tensor, "rows w"]
    ) -> None:
        """Take in pairs of rows; `prompts` names the prompt that each belongs to."""
        self.update(prompts, compare_scores(base, finetuned, self.kind))
        self.kept.update(prompts, base, finetuned)

    def state(self) -> AccumulatorState:
        """Return what was seen, and the rows that are kept."""
        return {**super().state(), **within("kept", self.kept.state())}

    def add(self, state: AccumulatorState) -> None:
        """Take in what another accumulator has seen, from its `state`."""
        super().add(state)
        self.kept.add(part_of(state, "kept"))


def scores_relative_l2(means: PromptMeans) -> float:
    """√(Σ‖f − b‖² / Σ‖b‖²) over prompts, of each prompt's means; NaN where there is none.

    Not a mean of ratios: a single reward may be as near to 0 as it likes.
    """
    seen = means.n_rows > 0
    found = means.means()
    difference, length = (float(found[name][seen].sum()) for name in ("squared_difference", "squared_base"))
    if not seen.any():
        return float("nan")
    if difference == 0:
        return 0.0
    return float("inf") if length == 0 else (difference / length) ** 0.5


def match_labels(base: Sequence[str], finetuned: Sequence[str], kind: ScoreKind) -> ScorePlan | None:
    """Match the labels of two heads by their names where both name them, and else by their number.

    None where that cannot be: no name is common, or the numbers of labels differ and not both are named.
    """
    ours, theirs = _names(base), _names(finetuned)
    if ours is None or theirs is None:
        n_labels = len(base)
        same = tuple(range(n_labels))
        named = tuple(base) if theirs is None else tuple(finetuned)
        return ScorePlan(kind, named, same, same) if n_labels == len(finetuned) else None
    places = {name: i for i, name in enumerate(theirs)}
    pairs = [(i, places[name]) for i, name in enumerate(ours) if name in places]
    if not pairs:
        return None
    one, other = zip(*pairs, strict=True)
    return ScorePlan(kind, tuple(ours[i] for i in one), one, other)


def _names(names: Sequence[str]) -> tuple[str, ...] | None:
    """The names of labels; None where they do not tell them apart, or are transformers' own numbers."""
    is_numbered = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return None if is_numbered or len({*names}) < len(names) else tuple(names)
