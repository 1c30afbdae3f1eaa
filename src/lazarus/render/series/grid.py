"""The maps of a series as numbers: the divergence of layers by members, and distances of any two members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lazarus.render.base.cells import Cell, shown
from lazarus.render.base.escape import escaped
from lazarus.render.series.summary import GLOSSARY
from lazarus.results import SeriesRecord

MOST_NAME_CHARACTERS = 24


@dataclass(frozen=True)
class MapCell:
    """A cell of a map: its number, what it says when pointed at, and how strong its colour is."""

    number: Cell
    title: str
    share: str


@dataclass(frozen=True)
class MapRow:
    """A row of a map."""

    name: str
    cells: Sequence[MapCell]


def divergences(record: SeriesRecord) -> NDArray[np.float64]:
    """Return the divergence of every layer of every member, [layers, members]; NaN where there is none."""
    n_layers = max(len(member.layers) for member in record.members)
    found = np.full((n_layers, len(record.members)), np.nan)
    for i, member in enumerate(record.members):
        values = [layer.divergence for layer in member.layers]
        found[: len(values), i] = np.array(values, dtype=np.float64)
    return found


def distances(record: SeriesRecord) -> NDArray[np.float64]:
    """Return the distances of any two members, [members, members]; NaN where one is not known."""
    return np.array(record.distances, dtype=np.float64)


def labels(record: SeriesRecord) -> list[str]:
    """Return what stands beside a member in a map: its step where it has one, else the end of its name."""
    if all(member.step is not None for member in record.members):
        return [str(member.step) for member in record.members]
    names = [escaped(member.model.id).rstrip("/").split("/")[-1] for member in record.members]
    return [
        name if len(name) <= MOST_NAME_CHARACTERS else f"…{name[1 - MOST_NAME_CHARACTERS :]}"
        for name in names
    ]


def layer_rows(record: SeriesRecord) -> list[MapRow]:
    """The map of layers by members, the last layer on top."""
    values, names = divergences(record), labels(record)
    rows = [
        MapRow(
            str(layer),
            _cells(values[layer], values, [f"layer {layer} of {name}" for name in names], "divergence"),
        )
        for layer in range(len(values))
    ]
    return rows[::-1]


def distance_rows(record: SeriesRecord) -> list[MapRow]:
    """The map of members by members, in their order."""
    values, names = distances(record), labels(record)
    return [
        MapRow(name, _cells(values[i], values, [f"{name} to {other}" for other in names], "distance"))
        for i, name in enumerate(names)
    ]


def _cells(
    row: NDArray[np.float64], everything: NDArray[np.float64], titles: Sequence[str], metric: str
) -> list[MapCell]:
    finite = everything[np.isfinite(everything)]
    top = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    cells = []
    for number, title in zip(row.tolist(), titles, strict=True):
        value = None if np.isnan(number) else number
        text = shown(value, GLOSSARY[metric].format)
        # By the square root, so that small numbers are seen beside large ones.
        share = 0.0 if value is None else 100 * (value / top) ** 0.5
        told = f"{title}: {'not known' if value is None else repr(value)}"
        cells.append(MapCell(Cell(text, "" if value is None else repr(value), metric), told, f"{share:.1f}%"))
    return cells
