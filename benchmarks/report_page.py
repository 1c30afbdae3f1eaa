"""The report's size and speed in Chromium: `python -m benchmarks.report_page` from the root.

Three results without models, so that it takes a minute: how large the file is, when something is first
painted, when the curve is drawn, and how long a cell's numbers wait after the pointer has moved (medians of
three rounds, and the slowest move; the wait for the next frame, 17 ms, is in it).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from benchmarks import places
from lazarus.render.activation.page import write_html

sys.path.insert(0, str(places.ROOT / "tests"))

from browser import chromium, opened
from made_records import divergences, record_of, whole_record

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from lazarus.results import ActivationDiffRecord

ROUNDS = 3
MOVES = 40
SIZES = ((24, 8), (1000, 80), (20_000, 33))
DOCS = places.ROOT / "docs" / "reports.md"
MARKS = ("<!-- figures of benchmarks.report_page -->", "<!-- end of figures -->")
HEAD = (
    "| prompts × layers | size, MB | written in, s | first paint, ms | curve drawn, ms "
    "| hover over the map, ms | slowest | hover over the curve, ms | slowest |"
)
# Not wait_for_function: it evaluates strings, which the page's policy forbids.
PAINTED = """new Promise(done => new PerformanceObserver(list => {
  const [paint] = list.getEntriesByName('first-contentful-paint');
  if (paint) done(paint.startTime);
}).observe({ type: 'paint', buffered: true }))"""
# From the pointer's event until the frame after it: what a hand feels.
HOVER = """async ([selector, moves]) => {
  const target = document.querySelector(selector);
  target.scrollIntoView({ block: 'center', behavior: 'instant' });
  const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)));
  await frame();
  const box = target.getBoundingClientRect();
  const spent = [];
  for (let i = 0; i < moves; i += 1) {
    const x = box.left + box.width * (0.35 + 0.6 * ((i * 7) % moves) / moves);
    const y = box.top + Math.min(box.height, innerHeight) * (0.1 + 0.8 * ((i * 11) % moves) / moves);
    const start = performance.now();
    for (const kind of ['pointermove', 'mousemove']) {
      target.dispatchEvent(new PointerEvent(kind, { clientX: x, clientY: y, bubbles: true, view: window }));
    }
    await frame();
    spent.push(performance.now() - start);
  }
  return spent;
}"""


class Figures(msgspec.Struct, frozen=True):
    """What was measured of one page: medians of the rounds, and the slowest move."""

    size_bytes: int
    write_seconds: float
    first_paint_ms: float
    curve_ms: float
    map_hover_ms: float
    map_hover_worst_ms: float
    curve_hover_ms: float
    curve_hover_worst_ms: float

    def row(self, name: str) -> str:
        """The row of the table."""
        size, seconds, *milliseconds = msgspec.structs.astuple(self)
        cells = [name, f"{size / 1e6:.2f}", f"{seconds:.2f}", *(f"{time:.0f}" for time in milliseconds)]
        return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report_page", description=__doc__)
    parser.add_argument("--write-docs", action="store_true", help="write the table into docs/reports.md")
    chosen = parser.parse_args()
    rows = [HEAD, "|---|" + "---:|" * (HEAD.count("|") - 2)]
    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        for n_prompts, n_layers in SIZES:
            found = measured(browser, _record(n_prompts, n_layers), Path(folder) / "report.html")
            rows.append(found.row(f"{n_prompts:,} × {n_layers}"))
    if chosen.write_docs:
        page = DOCS.read_text(encoding="utf-8")
        before, rest = page.split(MARKS[0])
        _, after = rest.split(MARKS[1])
        DOCS.write_text("\n".join([before + MARKS[0], *rows, MARKS[1]]) + after, encoding="utf-8")
    sys.stdout.write("\n".join(rows) + "\n")


def measured(browser: Browser, record: ActivationDiffRecord, path: Path) -> Figures:
    """The figures of one result's page, opened anew in every round."""
    start = time.perf_counter()
    with path.open("wb") as stream:
        write_html(record, stream, "report.rows.parquet")
    seconds = time.perf_counter() - start
    rounds = [_opened_once(browser, path) for _ in range(ROUNDS)]
    paints, curves, maps, hovers = (list(values) for values in zip(*rounds, strict=True))
    on_map, on_curve = [v for values in maps for v in values], [v for values in hovers for v in values]
    return Figures(
        size_bytes=path.stat().st_size,
        write_seconds=seconds,
        first_paint_ms=statistics.median(paints),
        curve_ms=statistics.median(curves),
        map_hover_ms=statistics.median(on_map),
        map_hover_worst_ms=max(on_map),
        curve_hover_ms=statistics.median(on_curve),
        curve_hover_worst_ms=max(on_curve),
    )


def _opened_once(browser: Browser, path: Path) -> tuple[float, float, list[float], list[float]]:
    with opened(browser, path) as found:
        page = found.page
        paint = float(page.evaluate(PAINTED))
        page.wait_for_selector("#curve[data-drawn]")
        drawn = float(page.evaluate("performance.now()"))
        return paint, drawn, _hover(page, "#prompts-explorer .heat"), _hover(page, "#curve .nsewdrag")


def _hover(page: Page, selector: str) -> list[float]:
    spent: list[float] = page.evaluate(HOVER, [selector, MOVES])
    return spent


def _record(n_prompts: int, n_layers: int) -> ActivationDiffRecord:
    if n_prompts < 100:
        return whole_record(n_prompts, n_layers)
    texts = [f"Tell me about number {i}, " + "and why it matters " * (i % 30) for i in range(n_prompts)]
    return record_of(divergences(n_prompts, n_layers), texts)


if __name__ == "__main__":
    main()
