"""The map of an attribution to tensors: components by layers, for the report and the figure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lazarus.render.base.escape import escaped
from lazarus.results import METRICS, Attribution

_FORMAT = METRICS["nats"].format
_LABEL_EVERY = 26
"""how far apart the numbers of layers stand in the report at least, in units of its drawing"""


@dataclass(frozen=True)
class Square:
    """A tensor in the report: its column and row, how strong its colour is (0 to 1), and what it tells."""

    column: int
    row: int
    strength: float
    is_negative: bool
    told: str


@dataclass(frozen=True)
class TensorMap:
    """The parts of the tensors inside the blocks."""

    components: list[str]
    """in the order in which they come"""
    values: NDArray[np.float64]
    """nats, [components, layers]; NaN where no such tensor changed"""

    @classmethod
    def of(cls, found: Attribution | None) -> TensorMap | None:
        """Return the map of an attribution; None where it is not to tensors, or none is inside a block."""
        groups = [] if found is None else found.groups
        inside = [
            (group.component, group.layer, group.nats)
            for group in groups
            if group.component is not None and group.layer is not None
        ]
        if not inside:
            return None
        rows = {name: i for i, name in enumerate(dict.fromkeys(name for name, _, _ in inside))}
        values = np.full((len(rows), 1 + max(layer for _, layer, _ in inside)), np.nan)
        for component, layer, nats in inside:
            # Two tensors of one name, such as those of two experts, are told as one.
            known = values[rows[component], layer]
            values[rows[component], layer] = nats if np.isnan(known) else known + nats
        return cls(list(rows), values)

    @property
    def most(self) -> float:
        """Return the largest part without its sign; 1 where all are 0."""
        return float(np.nanmax(np.abs(self.values))) or 1.0

    @property
    def rows(self) -> list[str]:
        """Return the components for the report."""
        return [escaped(name) for name in self.components]

    @property
    def squares(self) -> list[Square]:
        """Return each tensor for the report."""
        return [
            Square(
                column,
                row,
                abs(nats) / self.most,
                bool(nats < 0),
                f"layer {column}, {escaped(self.components[row])}: {nats:{_FORMAT}} nats",
            )
            for (row, column), nats in np.ndenumerate(self.values)
            if not np.isnan(nats)
        ]

    @property
    def ends(self) -> tuple[str, str]:
        """Return the values of the two ends of the colours."""
        return f"−{self.most:{_FORMAT}}", f"{self.most:{_FORMAT}}"

    def labelled(self, width: float) -> list[int]:
        """Return the layers whose numbers there is room for, where a column is so wide."""
        return list(range(0, self.values.shape[1], max(1, int(np.ceil(_LABEL_EVERY / width)))))
