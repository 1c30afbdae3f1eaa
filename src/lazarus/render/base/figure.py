"""The look of every figure: its size, its style, its colours, and how it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, Literal

from lazarus.errors import MissingPackageError
from lazarus.render.base.escape import escaped
from lazarus.results import ActivationDiffRecord, WeightDiffRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_INCHES = 6.8
DPI = 300
LARGER = 1.25
"""a notebook's text is 10 points and not 8, and so is its figure larger"""

NAME_CHARACTERS = 36

MOST_LAYER_TICKS = 12
LAYER_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000)

# Okabe and Ito's colours, in which the common kinds of colour blindness tell lines apart.
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#808080"
GREEN, ORANGE, PURPLE, SKY = "#009E73", "#E69F00", "#CC79A7", "#56B4E9"

STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans", "sans-serif"],  # the first ships with matplotlib: the same everywhere
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    # TrueType: many publishers refuse the Type 3 fonts that are the default.
    "pdf.fonttype": 42,
    # text stays text, which can be searched and edited
    "svg.fonttype": "none",
    # ids are random without it, and two files of one result would differ
    "svg.hashsalt": "lazarus",
}
# No date in it: the same record gives the same bytes.
METADATA: dict[str, dict[str, str | None]] = {
    "png": {"Software": "lazarus"},
    "svg": {"Date": None, "Creator": "lazarus"},
    "pdf": {"CreationDate": None, "ModDate": None, "Creator": "lazarus", "Producer": None},
}


def write_picture(
    size: tuple[float, float],
    draw: Callable[[Figure], object],
    stream: IO[bytes],
    format: Literal["png", "svg", "pdf"],
) -> None:
    """Return what `draw` puts into an empty figure of that size in inches; equal bytes for equal figures."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # "default" first: whatever the reader has set has no part in the file.
    with style.context(["default", STYLE]):
        # Not pyplot's figure, which would choose a backend and be kept until it is closed.
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(stream, format=format, dpi=DPI, metadata=METADATA[format])


def title(record: ActivationDiffRecord | WeightDiffRecord) -> str:
    """Return what stands above every figure: the two models."""
    base, finetuned = (drawable(model.id, NAME_CHARACTERS) for model in (record.base, record.finetuned))
    return f"{base} → {finetuned}"


def new_figure(method: str, size: tuple[float, float]) -> Figure:
    """A figure of pyplot's, of that size in inches, for the method of a result.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingPackageError(
            f"{method} needs the package matplotlib. Install it with "
            "`pip install 'lazarus-introspect[plot]'`."
        ) from error
    figure: Figure = pyplot.figure(figsize=size, layout="constrained")
    return figure


def drawable(text: str, most: int) -> str:
    r"""The text on one line, at most so many characters, those without a glyph written out.

    >>> drawable("a/rather/long/name", 12)
    'a/rath…/name'
    >>> drawable("a\n\U0010ffff", 20)
    'a\\n\\U0010ffff'
    """
    from matplotlib import font_manager

    # A character without a glyph would be drawn as an empty box, with a warning for each.
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return _shortened(
        "".join(
            character if font.get_char_index(ord(character)) else _written_out(character)
            for character in escaped(_shortened(text, most))
        ),
        most,
    )


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    n_behind = (most - 1) // 2
    return f"{text[: most - 1 - n_behind]}…{text[-n_behind:]}"
