"""The map of components by layers as a file, for a paper, and as a plot in a notebook."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lazarus.render.base.figure import (
    LARGER,
    LAYER_STEPS,
    MOST_LAYER_TICKS,
    WIDTH_INCHES,
    drawable,
    new_figure,
    title,
    write_picture,
)
from lazarus.render.weights.grid import Grid, kind_of, outside
from lazarus.render.weights.table import most_changed_first
from lazarus.results import WeightDiffRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, LogNorm
    from matplotlib.figure import Figure

MOST_SINGLE_EXPERTS = 24
"""With more components than these, the experts of a layer are one row."""
MOST_ROWS = 40
MOST_OUTSIDE = 8
NAME_CHARACTERS = 28
ROW_INCHES, LEAST_INCHES, FRAME_INCHES = 0.19, 0.5, 1.0
RELATIVE_CHANGE = "Relative change ‖f − b‖ / ‖b‖"
ABOVE = "#D55E00"
MISSING, ZERO = "#C0C0C0", "#FFFFFF"
EDGE = "#E0E0E0"
BELOW = 1e-300
"""below every change of finite numbers that is not 0"""


@dataclass(frozen=True)
class Strip:
    """Rows of a map: names, and values [rows, columns], NaN where there is none."""

    names: Sequence[str]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Map:
    """The data of the figure."""

    inside: Strip
    outside: Strip
    layers: Sequence[int]
    told: Sequence[str]
    """what was put together or left out"""
    told_outside: Sequence[str]

    @classmethod
    def of(cls, record: WeightDiffRecord) -> Map:
        """The map of a result, with the experts as one where there are many components."""
        grid = Grid.of(record)
        told = []
        inside = _whole(record, grid)
        if len(grid.components) > MOST_SINGLE_EXPERTS:
            inside = _by_kind(record, grid)
            if len(inside.names) < len(grid.components):
                told.append("of the experts of a layer the most changed one")
        if len(inside.names) > MOST_ROWS:
            told.append(f"the {MOST_ROWS} most changed of {len(inside.names):,} components")
            inside = _largest(inside, MOST_ROWS)
        others = outside(record)
        left = [f"the {MOST_OUTSIDE} most changed of {len(others):,}"] if len(others) > MOST_OUTSIDE else []
        return cls(inside, _outside(record, others), grid.layers, told, left)

    @property
    def finite(self) -> NDArray[np.float64]:
        """Every relative change above 0."""
        values = np.concatenate([self.inside.values.ravel(), self.outside.values.ravel()])
        found: NDArray[np.float64] = values[np.isfinite(values) & (values > 0)]
        return found


def write_figure(record: WeightDiffRecord, stream: IO[bytes], format: Literal["png", "svg", "pdf"]) -> None:
    """The map as a figure 6.8 inches wide, two columns of most papers; 300 dots an inch in PNG."""
    shown = Map.of(record)
    write_picture(figure_size(shown), lambda figure: compose(record, shown, figure), stream, format)


def figure_size(shown: Map) -> tuple[float, float]:
    """Width and height in inches."""
    rows = len(shown.inside.names) + len(shown.outside.names)
    return WIDTH_INCHES, FRAME_INCHES + max(LEAST_INCHES, ROW_INCHES * rows)


def compose(record: WeightDiffRecord, shown: Map, figure: Figure) -> Axes:
    """Draw the map into an empty figure, the tensors outside the layers as bands below it.

    Returns:
        The axes of the map.
    """
    axes: Axes
    n_inside, n_outside = len(shown.inside.names), len(shown.outside.names)
    if n_inside and n_outside:
        axes, below = figure.subplots(2, 1, gridspec_kw={"height_ratios": [n_inside, n_outside]})
    else:
        axes = below = figure.subplots()
    image: Any = None
    if n_outside:
        image = _draw(record, shown, shown.outside, below)
        below.set_xticks([])
        below.set_xlabel(_told("Outside the layers, a band each", shown.told_outside))
    if n_inside:
        image = draw_map(record, shown, axes)
    if image is None:
        axes.text(0.5, 0.5, "No tensor was compared", transform=axes.transAxes, ha="center", va="center")
        axes.set_axis_off()
    else:
        _add_key(record, shown, figure, image, [axes] if axes is below else [axes, below])
    axes.set_title(title(record), loc="left", fontsize="medium", parse_math=False)
    return axes


def draw_map(record: WeightDiffRecord, shown: Map, axes: Axes) -> Any:
    """Draw components by layers; white is exactly 0, grey is no number, a dot is above the threshold."""
    image = _draw(record, shown, shown.inside, axes)
    step = next(s for s in LAYER_STEPS if len(shown.layers) <= s * MOST_LAYER_TICKS)
    places = [i for i, layer in enumerate(shown.layers) if layer % step == 0]
    axes.set_xticks([i + 0.5 for i in places], [str(shown.layers[i]) for i in places])
    axes.set_xlabel(_told("Layer", shown.told))
    return image


def plot_map(record: WeightDiffRecord, axes: Axes | None, method: str) -> Axes:
    """Draw the map on these axes with a colour bar, or all of the figure in a new one of pyplot's.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    shown = Map.of(record)
    if axes is None:
        width, height = figure_size(shown)
        return compose(record, shown, new_figure(method, (LARGER * width, LARGER * height)))
    image = draw_map(record, shown, axes) if shown.inside.names else None
    if image is None:
        axes.text(0.5, 0.5, "No layer was compared", transform=axes.transAxes, ha="center", va="center")
    else:
        axes.figure.colorbar(image, ax=axes, label=RELATIVE_CHANGE)
    return axes


def _told(label: str, told: Sequence[str]) -> str:
    return f"{label}   ({'; '.join(told)})" if told else label


def _draw(record: WeightDiffRecord, shown: Map, strip: Strip, axes: Axes) -> Any:
    rows, columns = strip.values.shape
    norm, colours = _scale(shown)
    # A log scale has no place for 0: it is drawn as what is below the scale, which has a colour of its own.
    values = np.ma.masked_invalid(np.where(strip.values == 0, BELOW, strip.values))
    axes.set_facecolor(MISSING)
    image = axes.pcolormesh(
        np.arange(columns + 1),
        np.arange(rows + 1),
        values,
        norm=norm,
        cmap=colours,
        edgecolors=EDGE,
        linewidth=0.3,
    )
    # The first component is at the top, as in a table.
    axes.set_ylim(rows, 0)
    labels = [drawable(name, NAME_CHARACTERS) for name in strip.names]
    axes.set_yticks(np.arange(rows) + 0.5, labels, parse_math=False)
    axes.tick_params(axis="y", length=0)
    above = np.argwhere(np.nan_to_num(strip.values, nan=-1.0) > record.settings.threshold)
    if len(above):
        marks = axes.scatter(
            above[:, 1] + 0.5, above[:, 0] + 0.5, s=9, c=ABOVE, edgecolors="w", linewidths=0.4
        )
        marks.set_gid("above")
    return image


def _scale(shown: Map) -> tuple[LogNorm, Colormap]:
    """Return a log scale from the least change to the largest; exactly 0 is below it, in its own colour."""
    import matplotlib
    from matplotlib.colors import LogNorm

    found = shown.finite
    least, most = (float(found.min()), float(found.max())) if found.size else (0.1, 1.0)
    if least == most:
        least, most = least / 2, most * 2
    # The least change itself must not be taken for one below the scale.
    colours = matplotlib.colormaps["viridis"].with_extremes(bad=MISSING, under=ZERO)
    return LogNorm(vmin=math.nextafter(least, 0.0), vmax=most), colours


def _add_key(record: WeightDiffRecord, shown: Map, figure: Figure, image: Any, axes: Sequence[Axes]) -> None:
    """The colour bar, and what is not on it."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    threshold = record.settings.threshold
    values = [*shown.inside.values.ravel(), *shown.outside.values.ravel()]
    bar = figure.colorbar(image, ax=list(axes), label="Relative change", pad=0.015, aspect=24)
    if shown.finite.size and shown.finite.min() <= threshold <= shown.finite.max():
        bar.ax.axhline(threshold, color=ABOVE, linewidth=1.2)
    has_any = any(value > threshold for value in values)
    entries: list[Any] = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            markersize=3,
            color=ABOVE,
            label=f"above the threshold {threshold:g}" + ("" if has_any else " (none)"),
        )
    ]
    if 0.0 in values:
        entries.append(Patch(facecolor=ZERO, edgecolor="#808080", linewidth=0.5, label="exactly 0"))
    if any(map(math.isnan, values)):
        entries.append(Patch(facecolor=MISSING, label="no number"))
    figure.legend(handles=entries, loc="outside lower left", ncols=len(entries), frameon=False)


def _whole(record: WeightDiffRecord, grid: Grid) -> Strip:
    return Strip(grid.components, grid.changes(record))


def _by_kind(record: WeightDiffRecord, grid: Grid) -> Strip:
    """Each kind of component at each layer; of its experts, the most changed one."""
    names = list(dict.fromkeys(map(kind_of, grid.components)))
    kinds = np.array([names.index(kind_of(name)) for name in grid.components])
    values = np.full((len(names), len(grid.layers)), np.nan)
    np.fmax.at(values, kinds, grid.changes(record))  # NaN only where there is no number at all
    return Strip(names, values)


def _largest(strip: Strip, count: int) -> Strip:
    most = np.nanmax(np.nan_to_num(strip.values, nan=-1.0), axis=1)
    # The largest are kept in the order of the model.
    kept = np.sort(np.argsort(-most, kind="stable")[:count])
    return Strip([strip.names[i] for i in kept], strip.values[kept])


def _outside(record: WeightDiffRecord, others: Sequence[int]) -> Strip:
    rows = [record.results[i] for i in others]
    rows = [rows[i] for i in sorted(most_changed_first(rows)[:MOST_OUTSIDE])]
    values = [[math.nan if row.relative_change is None else row.relative_change] for row in rows]
    return Strip([row.component for row in rows], np.array(values, dtype=np.float64).reshape(len(rows), 1))
