"""Curves over the members, as the numbers that SVG needs: a page draws them without a script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lazarus.render.base.cells import shown
from lazarus.render.series.grid import labels
from lazarus.render.series.summary import kl
from lazarus.results import SeriesRecord

WIDTH, HEIGHT = 460, 200
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 38
MOST_TICKS = 8

Values = Sequence[float | None]


@dataclass(frozen=True)
class Point:
    """A member's value, where it stands, and what it says when pointed at."""

    x: float
    y: float
    told: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis and what is written there."""

    place: float
    text: str


@dataclass(frozen=True)
class Plot:
    """A plot as the template draws it."""

    title: str
    label: str
    stretches: Sequence[str]
    points: Sequence[Point]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    x_label: str


def trajectory(record: SeriesRecord) -> list[Plot]:
    """KL, distance from base, and the length of each step, over the members."""
    steps = [member.previous.distance if member.previous else None for member in record.members]
    found = [
        ("KL(base‖model), nats", [kl(member) for member in record.members]),
        ("Distance from base", [member.distance for member in record.members]),
        ("Distance from the one before", steps),
    ]
    return [plot(record, title, values) for title, values in found if any(v is not None for v in values)]


def places(record: SeriesRecord) -> list[float]:
    """Return where each member stands on the axis: at its step, or one after another."""
    steps = [member.step for member in record.members]
    known = [float(step) for step in steps if step is not None]
    ascends = len(known) == len(steps) and known == sorted(known)
    return known if ascends else [float(i) for i in range(len(steps))]


def plot(record: SeriesRecord, title: str, values: Values) -> Plot:
    """Values over the members on a scale from 0 to the largest; a value that is None is a gap."""
    at, names = places(record), labels(record)
    top = max((value for value in values if value is not None), default=0.0) or 1.0
    low, high = at[0], at[-1]

    def x(place: float) -> float:
        share = (place - low) / (high - low) if high > low else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM), 1)

    points: list[Point | None] = [
        None if value is None else Point(x(place), y(value), f"{name}: {value!r}")
        for place, name, value in zip(at, names, values, strict=True)
    ]
    has_steps = all(member.step is not None for member in record.members)
    every = -(-len(names) // MOST_TICKS)
    return Plot(
        title,
        f"{title} over {len(names)} models, at most {shown(top, '.4f')}",
        _stretches(points),
        [point for point in points if point is not None],
        [Tick(x(place), name) for place, name in list(zip(at, names, strict=True))[::every]],
        [Tick(y(share * top), f"{share * top:.2g}") for share in (0.0, 0.5, 1.0)],
        "Step" if has_steps else "Model",
    )


def _stretches(points: Sequence[Point | None]) -> list[str]:
    found: list[list[str]] = [[]]
    for point in points:
        if point is None:
            found.append([])
        else:
            found[-1].append(f"{point.x},{point.y}")
    return [" ".join(stretch) for stretch in found if stretch]
