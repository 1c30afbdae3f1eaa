"""The classic picture of the logit lens as a file: layers by ranks, each cell its token, for both models."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Literal

import numpy as np

from lazarus.render.base.figure import (
    LAYER_STEPS,
    NAME_CHARACTERS,
    VERMILLION,
    WIDTH_INCHES,
    drawable,
    write_picture,
)
from lazarus.render.lens.summary import last_choice, names
from lazarus.render.lens.tokens import quoted, shown
from lazarus.results import CompareRecord, LensModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MOST_RANKS = 6
MOST_HEIGHT_INCHES = 11.0
ROW_INCHES = 0.17
AROUND_INCHES = 1.0
"""title, axis and colour bar, above and below the cells"""
PANEL_INCHES = 3.05
MOST_LAYERS_LABELLED = 48
PROMPT_CHARACTERS = 80

LARGEST_POINTS, SMALLEST_POINTS = 6.5, 2.5
POINTS_AN_INCH = 72
CHARACTER_EMS = 0.62
"""what a character of DejaVu Sans is wide, on average and a little more"""

DARK = 0.55
"""from this share on a cell is so dark that its token is white"""


def write_figure(record: CompareRecord, stream: IO[bytes], format: Literal["png", "svg", "pdf"]) -> None:
    """Both lenses side by side, 6.8 inches wide, two columns of most papers; 300 dots an inch in PNG.

    A reader's own settings of matplotlib have no part in it, and none of them is changed.
    """
    write_picture(figure_size(record), lambda figure: compose(record, figure), stream, format)


def figure_size(record: CompareRecord) -> tuple[float, float]:
    """Width and height in inches: as high as the deeper model needs, up to a page."""
    most = max(len(model.layers) for model in (record.model1, record.model2))
    return WIDTH_INCHES, min(MOST_HEIGHT_INCHES, AROUND_INCHES + ROW_INCHES * max(8, most))


def compose(record: CompareRecord, figure: Figure) -> None:
    """Draw both lenses into an empty figure, with the prompt above and the colours' key below."""
    panels = figure.subplots(1, 2)
    for axes, model, name in zip(panels, (record.model1, record.model2), names(record), strict=True):
        image = _draw(model, axes, _row_inches(record, model))
        axes.set_title(drawable(name, NAME_CHARACTERS), loc="left", parse_math=False)
    bar = figure.colorbar(image, ax=panels, location="bottom", aspect=60, fraction=0.03)
    bar.set_label("Probability; outlined: the token that the model ends with")
    bar.outline.set_linewidth(0.4)
    prompt = drawable(quoted(record.prompt), PROMPT_CHARACTERS)
    title = figure.suptitle(f"Logit lens after {prompt}", x=0.01, ha="left", fontsize="medium")
    title.set_parse_math(False)


def _row_inches(record: CompareRecord, model: LensModel) -> float:
    return (figure_size(record)[1] - AROUND_INCHES) / len(model.layers)


def _draw(model: LensModel, axes: Axes, row_inches: float) -> AxesImage:
    import matplotlib

    n_kept = max(len(layer.top) for layer in model.layers)
    n_ranks = max(1, min(MOST_RANKS, n_kept))
    values = np.full((len(model.layers), n_ranks), np.nan)
    for i, layer in enumerate(model.layers):
        for rank, token in enumerate(layer.top[:n_ranks]):
            values[i, rank] = np.nan if token.probability is None else token.probability
    image: AxesImage = axes.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        origin="lower",  # the embedding's side is at the bottom, as in the literature
        cmap=matplotlib.colormaps["Blues"].with_extremes(bad="#C0C0C0"),
        vmin=0.0,
        vmax=1.0,
    )
    image.set_gid("probability")
    _write_tokens(model, axes, n_ranks, row_inches)
    _number(axes, len(model.layers), n_ranks, n_kept)
    return image


def _write_tokens(model: LensModel, axes: Axes, n_ranks: int, row_inches: float) -> None:
    from matplotlib.patches import Rectangle

    # As large as a row allows, and then as many characters as the cell is wide.
    size = min(LARGEST_POINTS, max(SMALLEST_POINTS, 0.7 * row_inches * POINTS_AN_INCH))
    most = max(2, int(PANEL_INCHES / n_ranks * POINTS_AN_INCH / (size * CHARACTER_EMS)) - 1)
    final = last_choice(model)
    for i, layer in enumerate(model.layers):
        for rank, token in enumerate(layer.top[:n_ranks]):
            colour = "white" if (token.probability or 0.0) >= DARK else "black"
            text = axes.text(rank, i, drawable(_spaced(token.token), most), color=colour, fontsize=size)
            # A token with two $ in it is no mathematics.
            text.set(ha="center", va="center", parse_math=False, clip_on=True, gid=f"token-{i}-{rank + 1}")
            if final is not None and token.token_id == final.token_id:
                box = Rectangle((rank - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=VERMILLION, linewidth=0.7)
                box.set(gid=f"final-{i}", zorder=3)
                axes.add_patch(box)


def _spaced(token: str) -> str:
    """The token with its outer spaces written: in the middle of a cell they would not be seen.

    >>> _spaced(" Paris"), _spaced("of it")
    ('␣Paris', 'of it')
    """
    text = shown(token)
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    return "␣" * before + inner + "␣" * (len(text) - before - len(inner))


def _number(axes: Axes, n_layers: int, n_ranks: int, n_kept: int) -> None:
    step = next(step for step in LAYER_STEPS if n_layers <= MOST_LAYERS_LABELLED * step)
    axes.set_yticks(range(0, n_layers, step))
    axes.set_xticks(range(n_ranks), [str(rank + 1) for rank in range(n_ranks)])
    axes.tick_params(length=0, labelsize="small")
    axes.set_ylabel("Layer")
    axes.set_xlabel("Rank" if n_ranks >= n_kept else f"Rank (the first {n_ranks} of {n_kept})")
    axes.spines[:].set_visible(False)
