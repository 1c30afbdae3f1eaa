"""The tensors that a page has room for, as plain JSON; columns as base64 of their bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lazarus.render.base.script import matrix
from lazarus.render.weights.grid import Grid
from lazarus.render.weights.summary import shape_text
from lazarus.render.weights.table import most_changed_first
from lazarus.results import TensorRecord, WeightDiffRecord
from lazarus.results.weight_glossary import WEIGHT_METRICS

MOST_CELLS = 50_000
"""Components × layers of the map: 533 kB in the page."""
MOST_TENSORS = 20_000
"""Of the table, 73 bytes each and their names."""
MOST_SPECTRA = 1_200
"""Of 400 bytes and more."""
COLUMNS = (
    "relative_change",
    "cosine_similarity",
    "max_abs_change",
    "share_changed",
    "base_norm",
    "change_norm",
)


@dataclass(frozen=True)
class PageSelection:
    """Indices of the rows and tensors that the page holds, in their order in the result."""

    components: Sequence[int]
    """rows of the map"""
    tensors: Sequence[int]
    spectra: Sequence[int]
    n_components: int
    """in the whole result"""
    n_spectra: int

    @classmethod
    def of(cls, record: WeightDiffRecord, grid: Grid) -> PageSelection:
        """The most changed of each, where there is no room for all."""
        ranked = most_changed_first(record.results)
        place = np.empty(len(ranked) + 1, dtype=np.int64)
        # The last place is for NO_TENSOR, which is −1: after every tensor.
        place[ranked], place[-1] = np.arange(len(ranked)), len(ranked)
        best = place[grid.places].min(axis=1) if grid.components and grid.layers else np.zeros(0)
        room = MOST_CELLS // max(1, len(grid.layers))
        with_spectrum = [i for i in ranked if record.results[i].spectrum is not None]
        return cls(
            components=sorted(int(i) for i in np.argsort(best, kind="stable")[:room]),
            tensors=sorted(ranked[:MOST_TENSORS]),
            spectra=sorted(with_spectrum[:MOST_SPECTRA]),
            n_components=len(grid.components),
            n_spectra=len(with_spectrum),
        )


def payload(record: WeightDiffRecord, grid: Grid, kept: PageSelection) -> dict[str, Any]:
    """All that the scripts need; equal for equal results.

    A matrix is {rows, columns, base64}: float64, little-endian, row by row, NaN where there is no number,
    so that the page has the exact values of the result.
    """
    return {
        "formats": {name: metric.format for name, metric in WEIGHT_METRICS.items()},
        "headings": {name: metric.heading for name, metric in WEIGHT_METRICS.items()},
        "threshold": record.settings.threshold,
        "layers": list(grid.layers),
        "components": [grid.components[i] for i in kept.components],
        "map": matrix(grid.changes(record)[list(kept.components)]) if kept.components else None,
        "tensors": _tensors(record, kept),
        "spectra": _spectra(record, kept),
    }


def _tensors(record: WeightDiffRecord, kept: PageSelection) -> dict[str, Any]:
    """The kept tensors as columns; what many of them share is there once."""
    rows = [record.results[i] for i in kept.tensors]
    components, component = _distinct(rows, lambda row: row.component)
    kinds, kind = _distinct(rows, lambda row: (shape_text(row.shape), row.base_dtype, row.finetuned_dtype))
    names, name = _distinct(rows, _pattern)
    return {
        "layer": [row.layer for row in rows],
        "components": components,
        "component": component,
        "kinds": kinds,
        "kind": kind,
        "names": names,
        "name": name,
        "columns": {field: matrix(_column(rows, field)) for field in COLUMNS},
    }


def _spectra(record: WeightDiffRecord, kept: PageSelection) -> dict[str, Any]:
    """The spectra by the place of their tensor in the page."""
    place = {index: i for i, index in enumerate(kept.tensors)}
    found = {i: record.results[i].spectrum for i in kept.spectra if i in place}
    return {str(place[i]): msgspec.structs.asdict(spectrum) for i, spectrum in found.items() if spectrum}


def _pattern(row: TensorRecord) -> tuple[str, ...]:
    """A name before and after the layer's number, so that all layers share it; or the whole name."""
    before, number, after = row.name.partition(f".{row.layer}.")
    return (before, after) if number else (row.name,)


def _distinct(
    rows: Sequence[TensorRecord], key: Callable[[TensorRecord], Hashable]
) -> tuple[list[Any], list[int]]:
    """The distinct values in the order in which they come, and the place of each row's among them."""
    values = [key(row) for row in rows]
    places = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return list(places), [places[value] for value in values]


def _column(rows: Sequence[TensorRecord], field: str) -> NDArray[np.float64]:
    return np.array([[getattr(row, field) for row in rows]], dtype=np.float64)
