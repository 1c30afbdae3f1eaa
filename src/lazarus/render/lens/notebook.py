"""A result of compare as a notebook shows it: HTML without scripts, in the notebook's own colours."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lazarus.render.base.escape import escaped
from lazarus.render.lens import grids
from lazarus.render.lens.summary import names, summary_lines
from lazarus.render.lens.tokens import quoted, shortened
from lazarus.results import CompareRecord

if TYPE_CHECKING:
    from jinja2 import Template

MOST_ROWS_OPEN = 16


def to_html(record: CompareRecord) -> str:
    """The prompt, the summary, both lenses, the tracked tokens and the notes, as one element of HTML.

    Whatever stands in a prompt, a token or a name is text.
    """
    models = (record.model1, record.model2)
    return _template().render(
        names=names(record),
        prompt=quoted(shortened(record.prompt)),
        lines=summary_lines(record),
        lenses=[(name, grids.rows(model)) for name, model in zip(names(record), models, strict=True)],
        is_open=max(len(model.layers) for model in models) <= MOST_ROWS_OPEN,
        emergences=grids.emergences(record),
        notes=[escaped(note) for note in record.notes],
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("notebook.html.j2")
