"""The curve over layers and the local change below it, drawn by matplotlib on axes that are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lazarus.render.activation.attribution import nats_by_layer
from lazarus.render.activation.series import LayerSeries, Values, measured
from lazarus.render.base.figure import (
    BLUE,
    GREEN,
    GREY,
    LAYER_STEPS,
    MOST_LAYER_TICKS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    drawable,
)
from lazarus.results import ActivationDiffRecord, GroupCurve

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Entry = tuple[Any, str]
"""of a legend: an artist, or several drawn over each other, and its label"""

DIVERGENCE = "Divergence (1 − cosine similarity)"
OFF = ",\noff the scale"

GROUP_CHARACTERS = 24
MOST_GROUPS = 6
MOST_LARGE_MARKERS = 40
FITS = 2.5
"""a reference that is higher than so many times the curve would flatten it, and is left off the scale"""

THRESHOLD_DASHES: Any = (0, (4, 2))
UNRELATED_DASHES: Any = (0, (6, 2, 1, 2))
NOISE_DASHES: Any = (0, (1, 1.5))
GROUP_STYLES: tuple[tuple[str, Any, str], ...] = (
    (ORANGE, (0, (5, 1.5)), "s"),
    (PURPLE, (0, (1.5, 1)), "^"),
    (GREEN, (0, (5, 1.5, 1, 1.5)), "v"),
    (SKY, (0, (8, 2)), "P"),
    (GREY, (0, (3, 1, 1, 1, 1, 1)), "X"),
    (VERMILLION, (0, (2, 2)), "*"),
)


def draw_curve(record: ActivationDiffRecord, axes: Axes) -> None:
    """Draw the divergence per layer with what it is to be compared with; CKA where widths differ."""
    series = LayerSeries.of(record)
    entries: list[Entry] = []
    if measured(series.divergence):
        top = _top(series, record)
        entries += [_draw_mean(series, axes, len(record.prompts)), *_draw_groups(record, axes)]
        entries += [_draw_threshold(series, axes, top), *_draw_unrelated(series, axes, top)]
        entries += _draw_noise_floor(series, axes)
        axes.set_ylim(0, 1.05 * top)
        axes.set_ylabel(DIVERGENCE)
    elif measured(series.cka):
        entries += [_draw_cka(series, axes)]
    else:
        axes.text(0.5, 0.5, "No layer could be measured", transform=axes.transAxes, ha="center", va="center")
        axes.set_ylabel(DIVERGENCE)
        axes.set_yticks([])
    _finish(record, axes)
    if entries:
        _add_legend(entries, axes)


def draw_local(record: ActivationDiffRecord, axes: Axes) -> None:
    """Draw what each block's own weights change: a bar a layer, none where it is 0 or not measured."""
    series = LayerSeries.of(record)
    width = min(0.64, len(series.layers) / 10)
    for bar in axes.bar(series.layers, _array(series.local), width=width, color=GREEN):
        bar.set_gid("local")
    most = _highest([series.local])
    if most == 0:
        told = "exactly 0 where it was measured" if None in series.local else "exactly 0 in every block"
        axes.text(0.5, 0.5, told, transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([0])
    axes.set_ylabel("Local change\n(relative L2)")
    axes.set_ylim(0, 1.08 * most or 1.0)
    _finish(record, axes)


def draw_nats(record: ActivationDiffRecord, axes: Axes) -> None:
    """Draw each block's part in KL(base‖fine-tuned), a bar a layer, and tell what is outside the blocks."""
    found = record.attribution
    assert found is not None
    layers, parts = [layer.layer for layer in record.layers], nats_by_layer(record)
    width = min(0.64, len(layers) / 10)
    for bar in axes.bar(layers, _array(parts), width=width, color=GREEN):
        bar.set_gid("nats")
    outside = found.sum - sum(value or 0.0 for value in parts)
    told = f"outside the blocks: {outside:.4f}"
    axes.text(0.99, 0.95, told, transform=axes.transAxes, ha="right", va="top", fontsize="small")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylabel("Part of the KL\n(nats)")
    _finish(record, axes)


def number_layers(record: ActivationDiffRecord, axes: Axes) -> None:
    """Make the horizontal axis the layers, with whole numbers only."""
    from matplotlib.ticker import MultipleLocator

    n_layers = len(record.layers)
    step = next(step for step in LAYER_STEPS if n_layers <= MOST_LAYER_TICKS * step)
    axes.set_xlim(-0.5, n_layers - 0.5)
    axes.xaxis.set_major_locator(MultipleLocator(step))
    has_counterparts = any(layer.finetuned_layer is not None for layer in record.layers)
    axes.set_xlabel("Layer of base" if has_counterparts else "Layer")


def _draw_mean(series: LayerSeries, axes: Axes, n_prompts: int) -> Entry:
    values = _array(series.divergence)
    (line,) = axes.plot(series.layers, values, color=BLUE, marker="o", linewidth=1.4)
    line.set(markersize=_marker_size(series), gid="divergence", zorder=3)
    label = "one prompt" if n_prompts == 1 else f"mean of {n_prompts:,} prompts"
    if not measured(series.low):
        return line, label
    return (_draw_interval(series, axes), line), f"{label},\n95 % interval"


def _draw_interval(series: LayerSeries, axes: Axes) -> Artist:
    low, high = _array(series.low), _array(series.high)
    band = axes.fill_between(series.layers, low, high, color=BLUE, alpha=0.22, linewidth=0)
    band.set(gid="interval", zorder=2)
    # Padded, so that the first and the last layer have a neighbour that is not measured.
    is_measured = np.pad(~np.isnan(low), 1)
    alone = np.flatnonzero(is_measured[1:-1] & ~is_measured[:-2] & ~is_measured[2:])
    if len(alone):  # a band needs two layers side by side to be seen
        lines = axes.vlines(alone, low[alone], high[alone], color=BLUE, alpha=0.4, linewidth=3)
        lines.set(gid="interval-alone", zorder=2)
    return band


def _draw_groups(record: ActivationDiffRecord, axes: Axes) -> list[Entry]:
    entries: list[Entry] = []
    # There is a style for each group that is drawn at most, so that some may be left.
    for i, (curve, (color, dashes, marker)) in enumerate(zip(_groups(record), GROUP_STYLES, strict=False)):
        values = _array(curve.divergence)
        (line,) = axes.plot(range(len(values)), values, color=color, linestyle=dashes, linewidth=0.9)
        every = 1 + len(values) // MOST_LARGE_MARKERS * 4
        line.set(marker=marker, markersize=2.5, markevery=every, gid=f"group-{i}")
        entries.append((line, f"{drawable(curve.group, GROUP_CHARACTERS)} ({curve.n_prompts:,})"))
    n_left_out = len(record.groups.curves) - len(entries) if record.groups else 0
    return [*entries, (_nothing(), f"groups not drawn: {n_left_out}")] if n_left_out else entries


def _draw_threshold(series: LayerSeries, axes: Axes, top: float) -> Entry:
    line = axes.axhline(series.threshold, color=VERMILLION, linestyle=THRESHOLD_DASHES, linewidth=0.8)
    line.set_gid("threshold")
    label = f"threshold {_number(series.threshold)}{'' if series.threshold <= top else OFF}"
    flagged = [i for i, is_flagged in enumerate(series.flagged) if is_flagged]
    if not flagged:
        return line, label
    values = _array(series.divergence)[flagged]
    (marks,) = axes.plot(flagged, values, color=VERMILLION, linestyle="none", marker="D")
    marks.set(markersize=1.3 * _marker_size(series), gid="flagged", zorder=4)
    return (line, marks), f"{label},\nlayers above it"


def _draw_unrelated(series: LayerSeries, axes: Axes, top: float) -> list[Entry]:
    if not measured(series.unrelated):
        return []
    line = _draw_reference(series.unrelated, axes, UNRELATED_DASHES)
    line.set(gid="unrelated")
    least = min(value for value in series.unrelated if value is not None)
    is_off = f", min {_number(least, 2)}{OFF}" if least > top else ""
    return [(line, f"unrelated prompts{is_off}")]


def _draw_noise_floor(series: LayerSeries, axes: Axes) -> list[Entry]:
    if not measured(series.noise_floor):
        return []
    line = _draw_reference(series.noise_floor, axes, NOISE_DASHES)
    line.set(gid="noise_floor")
    return [(line, f"noise floor, max {_number(_highest([series.noise_floor]), 2)}")]


def _draw_reference(values: Values, axes: Axes, dashes: Any) -> Artist:
    (line,) = axes.plot(range(len(values)), _array(values), color=GREY, linestyle=dashes, linewidth=0.9)
    line.set_marker("_" if len(values) == 1 else "")  # a line needs two layers to be seen
    return line


def _draw_cka(series: LayerSeries, axes: Axes) -> Entry:
    (line,) = axes.plot(series.layers, _array(series.cka), color=BLUE, marker="o", linewidth=1.4)
    line.set(gid="cka", markersize=_marker_size(series))
    least = min(value for value in series.cka if value is not None)
    axes.set_ylim(min(0.0, least - 0.05), 1.05)
    axes.set_ylabel("CKA (debiased, linear)")
    return line, "CKA; 1 is the\nsame geometry"


def _finish(record: ActivationDiffRecord, axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    number_layers(record, axes)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.spines[["top", "right"]].set_visible(False)


def _add_legend(entries: Sequence[Entry], axes: Axes) -> None:
    handles, labels = zip(*entries, strict=True)
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    legend = axes.legend(handles, ["·"] * len(labels), frameon=False, handlelength=2.6, **place)
    # Set afterwards: it reads $…$ as mathematics, and matplotlib 3.9 drops a label that begins with "_".
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def _top(series: LayerSeries, record: ActivationDiffRecord) -> float:
    """The highest value on the scale: of what was measured, and of references not far above it."""
    groups = [curve.divergence for curve in _groups(record)]
    own = _highest([series.divergence, series.high, series.noise_floor, *groups])
    if own == 0:
        return series.threshold or 1.0
    references = [series.threshold, _highest([series.unrelated])]
    return max([own, *(value for value in references if value <= FITS * own)])


def _groups(record: ActivationDiffRecord) -> list[GroupCurve]:
    curves = record.groups.curves if record.groups else []
    return [curve for curve in curves if measured(curve.divergence)][:MOST_GROUPS]


def _number(value: float, digits: int = 6) -> str:
    """Return the shortest form of a number, with a minus sign."""
    return f"{value:.{digits}g}".replace("-", "−")


def _marker_size(series: LayerSeries) -> float:
    return 3.5 if len(series.layers) <= MOST_LARGE_MARKERS else 1.6


def _array(values: Values) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _highest(many: Sequence[Values]) -> float:
    return max((value for values in many for value in values if value is not None), default=0.0)


def _nothing() -> Artist:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none")
