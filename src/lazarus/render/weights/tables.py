"""The tables that need no script: layers, what is outside them, what has no counterpart, the updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lazarus.render.base.cells import Cell, Heading, Row, Table, cell, plain
from lazarus.render.weights.grid import kind_of, outside
from lazarus.render.weights.summary import cut, place, shape_text
from lazarus.render.weights.table import most_changed_first, shown_names, value_of
from lazarus.results import Quantisation, Spectrum, TensorRecord, WeightDiffRecord, WeightLayerRecord
from lazarus.results.weight_glossary import WEIGHT_METRICS

MOST_OUTSIDE = 60
MOST_UNMATCHED = 100


@dataclass(frozen=True)
class Bars:
    """A table whose rows have a bar each, with its length as a share of the longest one."""

    table: Table
    shares: Sequence[float]


def layers(record: WeightDiffRecord) -> Bars | None:
    """Every layer as a whole, and what changed most in it; None without a layer."""
    if not record.layers:
        return None
    most = _most_changed_of_layers(record)
    headings = (
        Heading("Tensors changed", "tensors with at least one other bit"),
        Heading("of"),
        Heading("Most changed"),
        _heading("relative_change", "Its change"),
    )
    table = Table(
        caption="Every layer: all its tensors together",
        headings=[Heading("Layer"), _heading("relative_change"), *headings],
        rows=[_layer(layer, most.get(layer.layer)) for layer in record.layers],
    )
    return Bars(table, _shares([layer.relative_change for layer in record.layers]))


def others(record: WeightDiffRecord) -> Bars | None:
    """The tensors outside the layers, in the model's order; None without any."""
    found = [record.results[i] for i in outside(record)]
    if not found:
        return None
    kept = [found[i] for i in sorted(most_changed_first(found)[:MOST_OUTSIDE])]
    names = shown_names(record)
    left = f"; the {MOST_OUTSIDE} most changed of {len(found):,}" if len(found) > MOST_OUTSIDE else ""
    table = Table(
        caption=f"Outside the layers{left}",
        headings=[Heading("Tensor"), *map(_heading, names), Heading("Shape")],
        rows=[
            Row(
                place(row),
                [*(_number(row, name) for name in names), plain(shape_text(row.shape))],
                row.flagged,
            )
            for row in kept
        ],
    )
    return Bars(table, _shares([row.relative_change for row in kept]))


def unmatched(record: WeightDiffRecord) -> Table | None:
    """Return what only one of the two has, or what has another shape; None without any."""
    found = record.unmatched
    if not found:
        return None
    left = f"; the first {MOST_UNMATCHED} of {len(found):,}" if len(found) > MOST_UNMATCHED else ""
    return Table(
        caption=f"Tensors without a counterpart of the same shape{left}",
        headings=[Heading("Tensor"), Heading("Name"), Heading("Base"), Heading("Fine-tuned")],
        rows=[
            Row(place(row), [plain(row.name), _shape(row.base_shape), _shape(row.finetuned_shape)])
            for row in found[:MOST_UNMATCHED]
        ],
    )


def updates(record: WeightDiffRecord) -> Table | None:
    """The spectra of the changed matrices, a row a component over all layers; None without any."""
    groups: dict[str, list[Spectrum]] = {}
    for row in record.results:
        if row.spectrum is not None:
            groups.setdefault(kind_of(row.component), []).append(row.spectrum)
    if not groups:
        return None
    headings = (
        Heading("Matrices", "changed ones, over all layers"),
        Heading("Like an adapter", "how many look like a low-rank adapter's"),
        Heading("Its rank"),
        *map(_heading, _MEDIANS),
    )
    return Table(
        caption="The changed matrices of each component; ranks and norm are medians over them",
        headings=[Heading("Component"), *headings],
        rows=[Row(cut(name), _update(found)) for name, found in groups.items()],
    )


def quantisations(record: WeightDiffRecord) -> Table | None:
    """Return what the quantisation did, a row a component over all layers, worst first; None without any."""
    groups: dict[str, list[Quantisation]] = {}
    for row in record.results:
        if row.quantisation is not None:
            groups.setdefault(kind_of(row.component), []).append(row.quantisation)
    if not groups:
        return None
    ranked = sorted(groups.items(), key=lambda group: -_worst(group[1]))
    return Table(
        caption="The quantised tensors of each component, the largest error first; errors are medians",
        headings=[
            Heading("Component"),
            Heading("Tensors", "quantised ones, over all layers"),
            Heading("Scheme"),
            Heading("Blocks", "rows x columns with one scale"),
            *map(_heading, _ERRORS),
        ],
        rows=[Row(cut(name), _quantised(found)) for name, found in ranked],
    )


_ERRORS = ("relative_error", "nearest_relative_error", "error_ratio", "outlier_share")


def _worst(found: Sequence[Quantisation]) -> float:
    return max((each.relative_error or 0.0 for each in found), default=0.0)


def _quantised(found: Sequence[Quantisation]) -> list[Cell]:
    return [
        cell(len(found), ",", "n_tensors"),
        plain(", ".join(dict.fromkeys(each.scheme for each in found))),
        plain(", ".join(dict.fromkeys(shape_text(each.block) for each in found))),
        *(_median([getattr(each, name) for each in found], name) for name in _ERRORS),
    ]


_MEDIANS = ("effective_rank", "stable_rank", "rank_90", "spectral_norm")


def _update(found: Sequence[Spectrum]) -> list[Cell]:
    ranks = sorted({s.adapter_rank for s in found if s.adapter_rank is not None})
    told = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else ""
    n_low = sum(s.adapter_rank is not None for s in found)
    return [
        cell(len(found), ",", "n_matrices"),
        cell(n_low, ",", "n_low_rank"),
        Cell(told or "–", told),
        *(_median([getattr(s, name) for s in found], name) for name in _MEDIANS),
    ]


def _median(values: Sequence[float | None], name: str) -> Cell:
    known = [value for value in values if value is not None]
    return cell(float(median(known)) if known else None, WEIGHT_METRICS[name].format or ".1f", name)


def _layer(layer: WeightLayerRecord, most: TensorRecord | None) -> Row:
    form = WEIGHT_METRICS["relative_change"].format
    return Row(
        str(layer.layer),
        [
            cell(layer.relative_change, form, "relative_change"),
            cell(layer.n_changed_tensors, ",", "n_changed_tensors"),
            cell(layer.n_tensors, ",", "n_tensors"),
            plain(cut(most.component)) if most else Cell("–", ""),
            cell(most.relative_change if most else None, form),
        ],
        bool(most and most.flagged),
    )


def _most_changed_of_layers(record: WeightDiffRecord) -> dict[int, TensorRecord]:
    most: dict[int, TensorRecord] = {}
    for row in record.results:
        if row.layer is not None and row.relative_change:
            there = most.get(row.layer)
            if there is None or row.relative_change > (there.relative_change or 0.0):
                most[row.layer] = row
    return most


def _number(row: TensorRecord, name: str) -> Cell:
    return cell(value_of(row, name), WEIGHT_METRICS[name].format, name)


def _shape(shape: Sequence[int] | None) -> Cell:
    return Cell("–", "") if shape is None else plain(shape_text(shape))


def _heading(name: str, text: str = "") -> Heading:
    metric = WEIGHT_METRICS[name]
    return Heading(text or metric.heading, f"{metric.formula}; {metric.range}")


def _shares(values: Sequence[float | None]) -> list[float]:
    most = max((value for value in values if value is not None), default=0.0)
    return [(value or 0.0) / most if most else 0.0 for value in values]
