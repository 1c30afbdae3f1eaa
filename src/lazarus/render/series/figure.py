"""The trajectory of a series as a figure: layers by members, KL and distance over the members."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from lazarus.render.base.figure import (
    BLUE,
    LARGER,
    VERMILLION,
    WIDTH_INCHES,
    drawable,
    new_figure,
    write_picture,
)
from lazarus.render.base.words import counted
from lazarus.render.series.grid import distances, divergences, labels
from lazarus.render.series.plots import places
from lazarus.render.series.summary import kl
from lazarus.results import SeriesRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT_INCHES = 5.2
NAME_CHARACTERS = 48
MOST_TICKS = 8
LABEL_CHARACTERS = 14


def write_figure(record: SeriesRecord, stream: IO[bytes], format: Literal["png", "svg", "pdf"]) -> None:
    """The map, the curves and the distances, 6.8 inches wide; 300 dots an inch in PNG."""
    write_picture((WIDTH_INCHES, HEIGHT_INCHES), lambda figure: compose(record, figure), stream, format)


def compose(record: SeriesRecord, figure: Figure) -> Axes:
    """Draw all of it into an empty figure; returns the axes of the map."""
    axes: Any = figure.subplots(2, 2)
    draw_map(record, axes[0, 0])
    draw_distances(record, axes[0, 1])
    draw_curve(record, axes[1, 0], "kl")
    draw_curve(record, axes[1, 1], "distance")
    models = counted(len(record.members), "model")
    title = f"{models} against {drawable(record.base.id, NAME_CHARACTERS)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", parse_math=False)
    found: Axes = axes[0, 0]
    return found


def plot_map(record: SeriesRecord, axes: Axes | None, method: str) -> Axes:
    """Draw the map on these axes, or all of the figure in a new one of pyplot's.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    if axes is None:
        size = (LARGER * WIDTH_INCHES, LARGER * HEIGHT_INCHES)
        return compose(record, new_figure(method, size))
    draw_map(record, axes)
    return axes


def draw_map(record: SeriesRecord, axes: Axes) -> None:
    """Draw the divergence of layers by members; grey is no number."""
    values = divergences(record)
    _image(axes, values, "Divergence")
    axes.set_ylabel("Layer")
    axes.invert_yaxis()
    _name_columns(record, axes)


def draw_distances(record: SeriesRecord, axes: Axes) -> None:
    """Draw the distance of any two members."""
    _image(axes, distances(record), "Distance")
    _name_columns(record, axes)
    ticks, names = _ticks(record)
    axes.set_yticks(ticks, names, parse_math=False)


def draw_curve(record: SeriesRecord, axes: Axes, which: Literal["kl", "distance"]) -> None:
    """Draw KL over the members; or the distance from base, and the length of each step."""
    at = places(record)

    def line(values: list[float | None], colour: str, label: str, style: str) -> None:
        numbers = np.array(values, dtype=np.float64)
        axes.plot(at, numbers, style, color=colour, label=label, linewidth=1.2, markersize=3)

    if which == "kl":
        line([kl(member) for member in record.members], BLUE, "KL", "o-")
        axes.set_ylabel("KL(base‖model), nats")
    else:
        line([member.distance for member in record.members], BLUE, "from base", "o-")
        before = [member.previous.distance if member.previous else None for member in record.members]
        line(before, VERMILLION, "from the one before", "s--")
        axes.set_ylabel("Distance")
        axes.legend(frameon=False)
    for finding in record.findings:
        if finding.kind == "change_point" and finding.interval is not None:
            last = len(at) - 1
            low, high = (at[min(max(member, 0), last)] for member in finding.interval)
            after = at[min(finding.interval[1] + 1, last)]
            axes.axvspan(low, max(high, after), color="#808080", alpha=0.2, linewidth=0)
    axes.set_ylim(bottom=0)
    has_steps = all(member.step is not None for member in record.members)
    axes.set_xlabel("Step" if has_steps else "Model")


def _image(axes: Axes, values: Any, label: str) -> None:
    import matplotlib

    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#C0C0C0")
    finite = values[np.isfinite(values)]
    top = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    image = axes.imshow(
        np.ma.masked_invalid(values), aspect="auto", cmap=colours, vmin=0.0, vmax=top, interpolation="nearest"
    )
    axes.figure.colorbar(image, ax=axes, label=label)


def _name_columns(record: SeriesRecord, axes: Axes) -> None:
    ticks, names = _ticks(record)
    turned = max(map(len, names)) > 5
    axes.set_xticks(ticks, names, parse_math=False, rotation=90 if turned else 0)


def _ticks(record: SeriesRecord) -> tuple[list[int], list[str]]:
    every = -(-len(record.members) // MOST_TICKS)
    ticks = list(range(0, len(record.members), every))
    names = labels(record)
    return ticks, [drawable(names[i], LABEL_CHARACTERS) for i in ticks]
