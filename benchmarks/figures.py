"""Figures that are measured in parts, saved, and put into a page of the documentation."""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from benchmarks import places
from benchmarks.results import Machine, describe_machine


class Figure(Struct, frozen=True):
    """What was measured, each run's value, and what it should be."""

    part: str
    what: str
    values: list[float]
    unit: str = "×"
    most: float | None = None
    least: float | None = None

    @property
    def target(self) -> str:
        """The target in words."""
        if self.most is not None:
            return f"≤ {self.most:g}"
        return "" if self.least is None else f"≥ {self.least:g}"

    @property
    def shown(self) -> str:
        """The median, and the range of several runs."""
        middle = statistics.median(self.values)
        told = f"{_told(middle)} {self.unit}".rstrip()
        if len(self.values) == 1:
            return told
        return f"{told} ({_told(min(self.values))}–{_told(max(self.values))})"


def _told(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


class Results(Struct):
    """Every figure of the last run of each part."""

    created: str
    machine: Machine
    figures: list[Figure] = []


class Page(Struct, frozen=True):
    """Where the figures are saved, and the page that shows them between two marks."""

    results: str
    docs: str

    @property
    def marks(self) -> tuple[str, str]:
        """Return what stands before and after the figures."""
        return (
            f"<!-- figures of benchmarks.{self.results.removesuffix('.json')} -->",
            "<!-- end of figures -->",
        )


def table(results: Results) -> Table:
    """The figures, for a terminal."""
    found = Table("Figure", "Measured", "Target")
    for figure in results.figures:
        found.add_row(figure.what, figure.shown, figure.target)
    return found


def write_docs(results: Results, page: Page) -> None:
    """Put the figures into their place in the page."""
    path = places.ROOT / "docs" / page.docs
    before, rest = path.read_text(encoding="utf-8").split(page.marks[0])
    _, after = rest.split(page.marks[1])
    machine = results.machine
    lines = [
        f"{machine.cpu}, {machine.cores} cores, torch {machine.packages['torch']}; medians, and the range of "
        "several runs in parentheses.",
        "",
        "| | measured | target |",
        "|---|---|---|",
        *(f"| {f.what} | {f.shown} | {f.target} |" for f in results.figures),
    ]
    text = "\n".join([before.rstrip(), "", page.marks[0], *lines, page.marks[1]]) + after
    path.write_text(text, encoding="utf-8")


def run_parts(
    module: str, about: str, parts: Mapping[str, Callable[[int], Iterator[Figure]]], page: Page
) -> None:
    """Measure the chosen parts, print, save and write the page."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("--part", action="append", choices=parts, help="only this part; repeatable")
    parser.add_argument("--runs", type=int, default=3, help="rounds of what is repeated (default: 3)")
    parser.add_argument("--write-docs", action="store_true", help="only write the page from the last results")
    chosen = parser.parse_args()
    path = places.ROOT / "benchmarks" / "results" / page.results
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    results = Results(now, describe_machine())
    if path.exists():
        results.figures = msgspec.json.decode(path.read_bytes(), type=Results).figures
    for part in () if chosen.write_docs else chosen.part or parts:
        new = list(parts[part](chosen.runs))
        names = {figure.what for figure in new}
        figures = [figure for figure in results.figures if figure.what not in names] + new
        results.figures = sorted(figures, key=lambda figure: list(parts).index(figure.part))
        path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")
    write_docs(results, page)
    Console(width=None if sys.stdout.isatty() else 150).print(table(results))
