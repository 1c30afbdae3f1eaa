"""Small curves over layers, as the numbers that SVG needs: a page draws them without a script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lazarus.render.base.figure import LAYER_STEPS

WIDTH, HEIGHT = 340, 170
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 34
MOST_LAYER_TICKS = 7
MOST_MARKED = 40
"""layers of a curve whose points are marked one by one"""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """A line of a plot: its name, the class that gives it colour and dashes, and a value a layer."""

    name: str
    style: str
    values: Values


@dataclass(frozen=True)
class Point:
    """A layer's value, where it stands, and what it says when pointed at."""

    x: float
    y: float
    told: str


@dataclass(frozen=True)
class Curve:
    """A line as it is drawn: its stretches without a gap, and the points that are marked."""

    style: str
    stretches: Sequence[str]
    points: Sequence[Point]


@dataclass(frozen=True)
class Tick:
    """A place on an axis and what is written there."""

    place: float
    text: str


@dataclass(frozen=True)
class Plot:
    """A plot as the template draws it."""

    label: str
    lines: Sequence[Line]
    curves: Sequence[Curve]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    x_label: str


def plot(label: str, lines: Sequence[Line]) -> Plot:
    """Lines over layers on one scale from 0 to the largest value.

    Lines of other lengths share the axis by relative depth. A value that is None is a gap.
    """
    top = max((v for line in lines for v in line.values if v is not None), default=0.0) or 1.0
    lengths = {len(line.values) for line in lines}
    return Plot(
        label,
        lines,
        [_curve(line, top) for line in lines],
        _layer_ticks(lengths),
        [Tick(_y(share * top, top), f"{share * top:.2g}") for share in (0.0, 0.5, 1.0)],
        "Layer" if len(lengths) == 1 else "Relative depth",
    )


def _curve(line: Line, top: float) -> Curve:
    n_layers = len(line.values)
    stretches = [
        " ".join(f"{_x(layer, n_layers):.1f},{_y(value, top):.1f}" for layer, value in stretch)
        for stretch in _stretches(line.values)
    ]
    return Curve(line.style, stretches, list(_points(line, top)))


def _points(line: Line, top: float) -> Iterator[Point]:
    n_layers = len(line.values)
    # A point between two gaps has no line, and would not be seen.
    alone = {stretch[0][0] for stretch in _stretches(line.values) if len(stretch) == 1}
    for layer, value in enumerate(line.values):
        if value is not None and (n_layers <= MOST_MARKED or layer in alone):
            told = f"{line.name}, layer {layer}: {value:.4g}"
            yield Point(round(_x(layer, n_layers), 1), round(_y(value, top), 1), told)


def _stretches(values: Values) -> list[list[tuple[int, float]]]:
    """Return the layers and values between any two gaps."""
    found: list[list[tuple[int, float]]] = [[]]
    for layer, value in enumerate(values):
        if value is None:
            found.append([])
        else:
            found[-1].append((layer, value))
    return [stretch for stretch in found if stretch]


def _layer_ticks(lengths: set[int]) -> list[Tick]:
    if len(lengths) > 1:
        return [Tick(_x(0, 2), "first layer"), Tick(_x(1, 2), "last layer")]
    (n_layers,) = lengths
    step = next(step for step in LAYER_STEPS if n_layers <= MOST_LAYER_TICKS * step)
    return [Tick(_x(layer, n_layers), str(layer)) for layer in range(0, n_layers, step)]


def _x(layer: int, n_layers: int) -> float:
    share = layer / (n_layers - 1) if n_layers > 1 else 0.5
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)
