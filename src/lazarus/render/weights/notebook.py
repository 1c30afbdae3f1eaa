"""A weight difference as a notebook shows it: HTML without scripts, in the notebook's own colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lazarus.render.base.escape import escaped
from lazarus.render.base.notebook import MARK, MOST_ROWS_OPEN, Row, number, picture, template
from lazarus.render.base.words import counted
from lazarus.render.weights.figure import Map, compose, figure_size
from lazarus.render.weights.summary import place, summary_lines, verdict
from lazarus.render.weights.table import most_changed_first, shown_names, value_of
from lazarus.results import TensorRecord, WeightDiffRecord
from lazarus.results.weight_glossary import WEIGHT_METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 200
"""More would make the notebook's file large."""


def to_html(record: WeightDiffRecord) -> str:
    """The verdict, the summary, the map, the most changed tensors and the notes, as one element of HTML.

    Without matplotlib the map is left out. Whatever stands in a name is text.
    """
    names, shown = shown_names(record), Map.of(record)
    order = most_changed_first(record.results)[:MOST_ROWS]
    count = counted(len(record.results), "tensor")

    def draw(figure: Figure) -> None:
        compose(record, shown, figure).set_title("", loc="left")  # the names stand above it already

    return template().render(
        base=escaped(record.base.id),
        finetuned=escaped(record.finetuned.id),
        verdict=verdict(record),
        verdict_class=record.summary.verdict,
        lines=[line for line in summary_lines(record) if not line.startswith("Verdict: ")],
        curve=picture(figure_size(shown), draw, "Relative change of each component at each layer"),
        headings=[WEIGHT_METRICS[name].heading for name in names],
        rows=[_row(record.results[i], names) for i in order],
        most_rows_open=MOST_ROWS_OPEN,
        what="Tensor",
        told=f"{count}, the most changed first"
        + (f", {MOST_ROWS} of them" if len(record.results) > MOST_ROWS else ""),
        marked="relative change",
        threshold=f"{record.settings.threshold:g}",
        notes=[escaped(note) for note in record.notes],
    )


def _row(row: TensorRecord, names: Sequence[str]) -> Row:
    cells = [number(value_of(row, name), WEIGHT_METRICS[name].format) for name in names]
    return Row(place(row), cells, MARK if row.flagged else "")
