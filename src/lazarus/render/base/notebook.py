"""The view of a result in a notebook: HTML without scripts, in the notebook's own colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazarus.render.base.figure import STYLE

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

MOST_ROWS_OPEN = 16
MARK = "***"
NOT_MEASURED = "–"
INK = "#010203"
"""stands for the notebook's own text colour while the curve is drawn: matplotlib takes no `currentColor`"""


@dataclass(frozen=True)
class Cell:
    """A number as it is shown, and every digit of it."""

    text: str
    exact: str


@dataclass(frozen=True)
class Row:
    """One layer or tensor of the table."""

    name: str
    cells: list[Cell]
    mark: str


@cache
def template() -> Template:
    """Return what every result is put into, whichever command it is of."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("notebook.html.j2")


def number(value: float | None, format_of_metric: str) -> Cell:
    """A number as a cell."""
    return Cell(NOT_MEASURED, "") if value is None else Cell(format(value, format_of_metric), repr(value))


def picture(size: tuple[float, float], draw: Callable[[Figure], None], label: str) -> Any:
    """Return what `draw` puts into a figure as an element of SVG, empty where matplotlib is not installed."""
    from markupsafe import Markup

    try:
        svg = _drawn(size, draw)
    except ImportError:
        return ""
    # A style sheet or an id in it would hold for the whole page; no id of a group is referred to.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace(INK, "currentColor")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def _drawn(size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    from matplotlib import style
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    colours = {**dict.fromkeys(inked, INK), "figure.facecolor": "none", "axes.facecolor": "none"}
    stream = io.BytesIO()
    with style.context(["default", {**STYLE, **colours}]):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue().decode()
