"""The curve as a file, for a paper; the curve, and prompts × layers, as plots in a notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lazarus.errors import UsageError
from lazarus.messages import option
from lazarus.render.activation.attribution import draw_attribution
from lazarus.render.activation.curve import DIVERGENCE, draw_curve, draw_local, draw_nats, number_layers
from lazarus.render.activation.series import LayerSeries, measured
from lazarus.render.base.figure import LARGER, WIDTH_INCHES, drawable, new_figure, title, write_picture
from lazarus.results import ActivationDiffRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["compose", "draw_curve", "draw_heatmap", "draw_local", "figure_size", "write_figure"]

HEIGHT_INCHES = 3.0
PANEL_INCHES = 1.2
PROMPT_CHARACTERS = 40
MOST_PROMPTS_LABELLED = 40


def write_figure(
    record: ActivationDiffRecord, stream: IO[bytes], format: Literal["png", "svg", "pdf"]
) -> None:
    """The curve as a figure 6.8 inches wide, two columns of most papers; 300 dots an inch in PNG.

    A reader's own settings of matplotlib have no part in it, and none of them is changed.
    """
    write_picture(figure_size(record), lambda figure: compose(record, figure), stream, format)


def figure_size(record: ActivationDiffRecord) -> tuple[float, float]:
    """Width and height in inches: a local change has a panel of its own, and so has an attribution."""
    return WIDTH_INCHES, HEIGHT_INCHES + PANEL_INCHES * len(_below(record))


def _below(record: ActivationDiffRecord) -> list[Callable[[ActivationDiffRecord, Axes], None]]:
    """Return what draws each of the panels below the curve."""
    is_measured = {
        draw_local: measured(LayerSeries.of(record).local),
        draw_nats: record.attribution is not None,
    }
    return [draw for draw, there in is_measured.items() if there]


def compose(record: ActivationDiffRecord, figure: Figure) -> Axes:
    """Draw the curve into an empty figure; below it the local change and the attribution, if there are any.

    Returns:
        The axes of the curve.
    """
    axes: Axes
    panels = _below(record)
    if not panels:
        axes = figure.subplots()
        draw_curve(record, axes)
    else:
        heights = [2.2, *[1] * len(panels)]
        axes, *below = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights})
        draw_curve(record, axes)
        for draw, panel in zip(panels, below, strict=True):
            draw(record, panel)
        for upper in (axes, *below[:-1]):
            upper.set_xlabel("")
        figure.align_ylabels()
    axes.set_title(title(record), loc="left", fontsize="medium", parse_math=False)
    return axes


def draw_heatmap(record: ActivationDiffRecord, axes: Axes, *, sort: bool = False) -> None:
    """Draw the divergence of every prompt at every layer, with a colour bar; grey is not measured.

    Args:
        record: the result.
        axes: where to draw.
        sort: the most divergent prompt first, by its mean over layers; else in the order of the prompts.
    """
    import matplotlib

    divergence = record.results.column("divergence")
    order = _most_divergent_first(divergence) if sort else np.arange(len(divergence))
    image = axes.imshow(
        np.ma.masked_invalid(divergence[order]),
        aspect="auto",
        cmap=matplotlib.colormaps["cividis"].with_extremes(bad="#C0C0C0"),
        vmin=0.0,
        # two models that are the same have no range of colours
        vmax=float(np.nanmax(divergence, initial=0.0)) or 1.0,
    )
    number_layers(record, axes)
    if len(order) <= MOST_PROMPTS_LABELLED:
        labels = [drawable(record.prompts[i].text, PROMPT_CHARACTERS) for i in order]
        axes.set_yticks(range(len(order)), labels, fontsize="small", parse_math=False)
    else:
        axes.set_ylabel("Prompt, most divergent first" if sort else "Prompt")
    axes.figure.colorbar(image, ax=axes, label=DIVERGENCE)


def plot_curve(record: ActivationDiffRecord, axes: Axes | None) -> Axes:
    """Draw the curve on these axes; without, in a new figure of pyplot's, local change included.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    if axes is None:
        width, height = figure_size(record)
        return compose(record, new_figure("plot", (LARGER * width, LARGER * height)))
    draw_curve(record, axes)
    return axes


def plot_attribution(record: ActivationDiffRecord, axes: Axes | None) -> Axes:
    """Draw who caused the change of the output on these axes, or in a new figure of pyplot's.

    Raises:
        MissingPackageError: matplotlib is not installed.
        UsageError: the result has no attribution.
    """
    if record.attribution is None:
        raise UsageError(
            f"there is no attribution in this result. Run with {option('attribute', 'blocks')}.",
            option="attribute",
        )
    if axes is None:
        axes = new_figure("attribution", (WIDTH_INCHES, HEIGHT_INCHES)).subplots()
        axes.set_title(title(record), loc="left", fontsize="medium", parse_math=False)
    draw_attribution(record.attribution, axes)
    return axes


def plot_heatmap(record: ActivationDiffRecord, axes: Axes | None, *, sort: bool) -> Axes:
    """Draw prompts × layers on these axes, or in a new figure of pyplot's.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    if axes is None:
        n_labelled = min(len(record.prompts), MOST_PROMPTS_LABELLED)
        figure = new_figure("heatmap", (WIDTH_INCHES, max(2.4, 0.8 + 0.17 * n_labelled)))
        axes = figure.subplots()
        axes.set_title(title(record), loc="left", fontsize="medium", parse_math=False)
    draw_heatmap(record, axes, sort=sort)
    return axes


def _most_divergent_first(divergence: NDArray[np.float64]) -> NDArray[np.intp]:
    is_measured = ~np.isnan(divergence)
    sums = np.where(is_measured, divergence, 0.0).sum(axis=1)
    return np.argsort(-sums / np.maximum(1, is_measured.sum(axis=1)), kind="stable")
