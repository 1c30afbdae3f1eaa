"""A result as a notebook shows it: HTML without scripts that takes on the notebook's own colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lazarus.render.activation.figure import compose, figure_size
from lazarus.render.activation.summary import summary_lines, verdict
from lazarus.render.activation.table import layer_value, shown_names
from lazarus.render.base.escape import escaped
from lazarus.render.base.notebook import MARK, MOST_ROWS_OPEN, Row, number, picture, template
from lazarus.results import METRICS, ActivationDiffRecord, LayerRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def to_html(record: ActivationDiffRecord) -> str:
    """The verdict, the summary, the curve, the layers and the notes, as one element of HTML.

    Without matplotlib the curve is left out. Whatever stands in a prompt or a name is text.
    """
    names, count = shown_names(record), len(record.layers)
    lines = [line for line in summary_lines(record) if not line.startswith("Verdict: ")]
    return template().render(
        base=escaped(record.base.id),
        finetuned=escaped(record.finetuned.id),
        verdict=verdict(record),
        verdict_class=record.summary.verdict or "none",
        lines=lines,
        curve=_curve(record),
        headings=[METRICS[name].heading for name in names],
        rows=[_row(layer, names) for layer in record.layers],
        most_rows_open=MOST_ROWS_OPEN,
        what="Layer",
        told=f"{count} layer{'' if count == 1 else 's'}",
        marked="divergence",
        threshold=f"{record.settings.threshold:g}",
        notes=[escaped(note) for note in record.notes],
    )


def _row(layer: LayerRecord, names: Sequence[str]) -> Row:
    cells = [number(layer_value(layer, name), METRICS[name].format) for name in names]
    return Row(str(layer.layer), cells, MARK if layer.flagged else "")


def _curve(record: ActivationDiffRecord) -> Any:
    def draw(figure: Figure) -> None:
        compose(record, figure).set_title("", loc="left")  # the names stand above it already

    return picture(figure_size(record), draw, "Divergence per layer")
