"""The pictures of the documentation: reports of the demo pair and of a real pair, and a figure.

    python -m benchmarks.screenshots [--folder docs/assets]

Needs Chromium, and the pair that `python -m benchmarks.weights` makes.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from benchmarks.places import CACHE, PROMPTS, ROOT

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"


@dataclass(frozen=True)
class Shot:
    """One picture: which run, which part of its report, in which scheme."""

    name: str
    folder: Path
    arguments: Sequence[str]
    scheme: str = "light"
    section: str | None = None
    """the id of a part of the page; its top where none is named"""


DEMO = (ROOT / "src" / "lazarus" / "demo", ("-b", "base", "-f", "arithmetic", "-p", "@prompts.jsonl"))
REAL = (CACHE, ("-b", "smollm2", "-f", "smollm2-arithmetic", "-p", f"@{PROMPTS}", "--position", "all"))
SHOTS = (
    Shot("report-demo", *DEMO),
    Shot("report-demo-dark", *DEMO, scheme="dark"),
    Shot("report-smollm2", *REAL),
    Shot("report-smollm2-prompts", *REAL, section="prompts"),
    Shot("report-smollm2-tokens", *REAL, section="tokens"),
)


def main() -> None:
    """Run, open, and save every picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "assets")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as work, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS.split())
        for shot in SHOTS:
            page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=shot.scheme)  # type: ignore[arg-type]
            page.goto(report_of(shot, Path(work)).as_uri())
            (folder / f"{shot.name}.png").write_bytes(picture(page, shot))
        browser.close()
        shutil.copy(report_of(SHOTS[-1], Path(work)).with_suffix(".svg"), folder / "figure-smollm2.svg")


def report_of(shot: Shot, work: Path) -> Path:
    """The report of the run, made once for all of its pictures."""
    report = work / f"{shot.folder.name}.html"
    if not report.exists():
        command = [sys.executable, "-m", "lazarus", "introspect", "activation-diff", *shot.arguments]
        options = ["--localize", "--readout", "auto", "-q"]
        options += ["-o", str(report), "-o", str(report.with_suffix(".svg"))]
        subprocess.run([*command, *options], cwd=shot.folder, check=True, stdout=subprocess.DEVNULL)
    return report


def picture(page: Page, shot: Shot) -> bytes:
    """Return what the window shows, once the plots in it are drawn."""
    page.wait_for_selector("#curve[data-drawn]")
    if shot.section is not None:
        page.locator(f"#{shot.section}").evaluate("part => part.scrollIntoView({behavior: 'instant'})")
    page.wait_for_timeout(1000)  # for a person to look at, not a check: whatever is not drawn would show
    stream = io.BytesIO()
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(stream, "PNG", optimize=True)
    return stream.getvalue()


if __name__ == "__main__":
    main()
