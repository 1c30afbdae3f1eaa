"""A series as a notebook shows it: HTML without scripts, in the notebook's own colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazarus.render.base.escape import escaped
from lazarus.render.base.figure import WIDTH_INCHES
from lazarus.render.base.notebook import MOST_ROWS_OPEN, Row, number, picture, template
from lazarus.render.base.words import counted
from lazarus.render.series.figure import HEIGHT_INCHES, compose
from lazarus.render.series.summary import GLOSSARY, headline, kl, summary_lines, verdict
from lazarus.results import SeriesMember, SeriesRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METRICS = ("divergence", "kl_base_finetuned", "distance", "turn")


def to_html(record: SeriesRecord) -> str:
    """The findings, the figure, a row a member and the notes, as one element of HTML.

    Without matplotlib the figure is left out. Whatever stands in a name is text.
    """

    def draw(figure: Figure) -> None:
        compose(record, figure)
        figure.suptitle("")  # the names stand above it already

    models = counted(len(record.members), "model")
    return template().render(
        base=escaped(record.base.id),
        finetuned=models,
        verdict=headline(record),
        verdict_class="none" if record.findings else "changed",
        lines=summary_lines(record),
        curve=picture((WIDTH_INCHES, HEIGHT_INCHES), draw, "Divergence, distances and KL over the models"),
        headings=[*(GLOSSARY[metric].heading for metric in _METRICS), "Verdict"],
        rows=[_row(record, member) for member in record.members],
        most_rows_open=MOST_ROWS_OPEN,
        what="Model",
        told=models,
        marked="divergence",
        threshold=f"{record.settings.threshold:g}",
        notes=[escaped(note) for note in record.notes],
    )


def _row(record: SeriesRecord, member: SeriesMember) -> Row:
    values = (member.summary.max_divergence, kl(member), member.distance, member.turn)
    cells = [number(value, GLOSSARY[metric].format) for value, metric in zip(values, _METRICS, strict=True)]
    cells.append(type(cells[0])(verdict(record, member), ""))
    mark = "***" if member.summary.n_flagged_layers else ""
    return Row(escaped(member.model.id), cells, mark)
