"""Components by layers: what every map of a weight difference shows, on the page and in a figure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lazarus.results import TensorRecord, WeightDiffRecord

NO_TENSOR = -1
_EXPERT = re.compile(r"expert_\d+\.")
EXPERTS = "experts."


@dataclass(frozen=True)
class Grid:
    """The place of each tensor."""

    components: Sequence[str]
    """in the order in which the model has them"""
    layers: Sequence[int]
    places: NDArray[np.int64]
    """index into the results, [components, layers]; NO_TENSOR where a layer has no such component"""

    @classmethod
    def of(cls, record: WeightDiffRecord) -> Grid:
        """The grid of a result; without a layer it is empty."""
        rows = [(i, row) for i, row in enumerate(record.results) if row.layer is not None]
        components = list(dict.fromkeys(row.component for _, row in rows))
        layers = sorted({layer.layer for layer in record.layers} | {row.layer or 0 for _, row in rows})
        row_of = {name: i for i, name in enumerate(components)}
        column_of = {layer: i for i, layer in enumerate(layers)}
        places = np.full((len(components), len(layers)), NO_TENSOR, dtype=np.int64)
        for i, row in rows:
            places[row_of[row.component], column_of[row.layer or 0]] = i
        return cls(components, layers, places)

    def changes(self, record: WeightDiffRecord) -> NDArray[np.float64]:
        """The relative changes, [components, layers]; NaN where there is no tensor, or no relative change."""
        values = np.array([*(_value(row) for row in record.results), math.nan], dtype=np.float64)
        return values[self.places]  # NO_TENSOR is the last one


def outside(record: WeightDiffRecord) -> list[int]:
    """The tensors outside the layers, in the model's order."""
    return [i for i, row in enumerate(record.results) if row.layer is None]


def kind_of(component: str) -> str:
    """A component with all experts as one.

    >>> kind_of("expert_12.mlp_down"), kind_of("attn_q")
    ('experts.mlp_down', 'attn_q')
    """
    return _EXPERT.sub(EXPERTS, component, count=1) if _EXPERT.match(component) else component


def pooled_change(rows: Iterable[TensorRecord]) -> float | None:
    """The relative change of those that changed, together: √Σ‖f − b‖² / √Σ‖b‖²; None where it is not finite.

    The norm of a tensor that did not change need not be known.
    """
    norms = [(row.change_norm, row.base_norm) for row in rows if row.n_changed]
    change, base = (np.array([pair[side] for pair in norms], dtype=np.float64) for side in (0, 1))
    whole = float(np.linalg.norm(base))
    if not norms or not math.isfinite(whole) or not whole:
        return None
    pooled = float(np.linalg.norm(change)) / whole
    return pooled if math.isfinite(pooled) else None


def _value(row: TensorRecord) -> float:
    return math.nan if row.relative_change is None else row.relative_change
