"""Estimates held against runs: `python -m benchmarks.estimates [--rounds N] [--only NAME ...]`.

Each run is estimated (`--estimate` of `activation-diff` or `series`) and then done, each in a process of its
own, by turns. A figure is what was estimated over what it took: seconds of the process, and the peak of its
memory as the kernel reports it. The models are SmolLM2-135M and its fine-tune, and the pair that ships. This
module imports no torch, because a process inherits the peak memory of the one that starts it.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.console import Console

from benchmarks import places
from benchmarks.commands import ENVIRONMENT, RSS_UNIT, python_module
from lazarus.demo import BASE as DEMO_BASE
from lazarus.demo import FINETUNED as DEMO_FINETUNED

RESULTS = places.ROOT / "benchmarks" / "results" / "estimates.json"
DOCS = places.ROOT / "docs" / "benchmarks.md"
DEMO, REAL = (DEMO_BASE, DEMO_FINETUNED), (places.BASE, places.finetuned())
RUNS: dict[str, tuple[tuple[Path, ...], int, tuple[str, ...]]] = {
    "the demo pair, 8 prompts": (DEMO, 8, ()),
    "20 prompts": (REAL, 20, ()),
    "200 prompts, bfloat16": (REAL, 200, ("--dtype", "bfloat16")),
    "100 prompts, --position all --localize": (REAL, 100, ("--position", "all", "--localize")),
    "100 prompts, --memory stream": (REAL, 100, ("--memory", "stream")),
    "200 prompts": (REAL, 200, ()),
    "100 prompts, a series of 3 models": ((*REAL, REAL[1], REAL[1]), 100, ()),
}
"""name → base and the other model, or those of a series; how many prompts, and the options"""
TIME_WITHIN, MEMORY_WITHIN = 0.25, 0.15
MARKS = "<!-- estimates: begin -->", "<!-- estimates: end -->"
_SCALES = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
console = Console(stderr=True)


class Pair(Struct, frozen=True):
    """An estimate and the run: seconds and bytes of each."""

    estimated_seconds: float
    seconds: float
    estimated_bytes: float
    peak_bytes: int
    estimating_seconds: float
    """what the estimate itself took"""


class Results(Struct, frozen=True):
    """All rounds of all runs, by their names."""

    n_threads: str
    runs: dict[str, list[Pair]]
    of_processor: bool = False
    """whether seconds are the processor's"""


def main() -> None:
    """Measure, save, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="compare seconds of the processor, with one thread: on a machine that others use as well",
    )
    parser.add_argument("--only", nargs="*", default=[], help="only these runs, and save nothing")
    given = parser.parse_args()
    wanted = {name: run for name, run in RUNS.items() if not given.only or name in given.only}
    found: dict[str, list[Pair]] = {name: [] for name in wanted}
    for _ in range(given.rounds):
        for name, (models, n_prompts, options) in wanted.items():
            pair = one_round(models, n_prompts, options, of_processor=given.processor_time)
            found[name].append(pair)
            console.print(
                f"{name}: {pair.estimated_seconds:.1f} of {pair.seconds:.1f} s, "
                f"{pair.estimated_bytes / 2**20:,.0f} of {pair.peak_bytes / 2**20:,.0f} MiB",
                highlight=False,
            )
    threads = "1" if given.processor_time else os.environ.get("OMP_NUM_THREADS", "all")
    results = Results(threads, found, given.processor_time)
    if not given.only:
        RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
        write_docs(DOCS)
    console.print(table(results), highlight=False)


def one_round(
    models: Sequence[Path], n_prompts: int, options: Sequence[str], *, of_processor: bool = False
) -> Pair:
    """Estimate a run, and do it."""
    texts = places.PROMPTS.read_text(encoding="utf-8").splitlines(keepends=True)[:n_prompts]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as prompts:
        prompts.writelines(texts)
        prompts.flush()
        base, *others = map(str, models)
        words = ["introspect", "activation-diff" if len(others) == 1 else "series", "-b", base]
        words += [word for other in others for word in ("-f", other)]
        words += ["-p", f"@{prompts.name}", *options]
        start = [sys.executable, "-c", BY_PROCESSOR] if of_processor else python_module("lazarus")
        environment = {**ENVIRONMENT, **({"OMP_NUM_THREADS": "1"} if of_processor else {})}
        told, seconds, _ = _measured([*start, *words, "--estimate"], environment, of_processor)
        _, taken, peak = _measured([*python_module("lazarus"), *words], environment, of_processor)
    return Pair(_seconds(told), taken, _bytes(told), peak, seconds)


BY_PROCESSOR = """
import time
time.perf_counter = time.process_time
import lazarus.estimating
lazarus.estimating.since_start = time.process_time
from lazarus.cli import main
main()
"""
"""The command, with the processor's clock in the place of the wall's."""


def _measured(
    command: Sequence[str], environment: dict[str, str], of_processor: bool
) -> tuple[str, float, int]:
    """Run a command to its end; returns what it printed, its seconds and its peak of memory in bytes."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as told:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=places.ROOT, env=environment, stdout=told, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed")
        told.seek(0)
        taken = usage.ru_utime + usage.ru_stime if of_processor else seconds
        return told.read(), taken, usage.ru_maxrss * RSS_UNIT


def _seconds(told: str) -> float:
    """Read the time of an estimate: `20.3 s`, `1 min 15 s` or `2 h 2 min`."""
    (line,) = re.findall(r"^Time +(.*)$", told, flags=re.MULTILINE)
    units = {"s": 1, "min": 60, "h": 3600}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (s|min|h)", line))


def _bytes(told: str) -> float:
    (number, unit), *_ = re.findall(r"^Memory +([\d.]+) (\w+)", told, flags=re.MULTILINE)
    return float(number) * _SCALES[unit]


def write_docs(page: Path) -> None:
    """Write the table of the last results into the page; nothing where there are none."""
    from benchmarks.trust_report import fill_in  # here, because it imports numpy

    if RESULTS.exists():
        fill_in(page, table(msgspec.json.decode(RESULTS.read_bytes(), type=Results)), MARKS)


def table(results: Results) -> str:
    """What was measured, as a table: ratios of each round, and the medians behind them."""
    rows = [
        "| run | time, estimated / taken | medians | memory, estimated / taken | medians | estimating |",
        "|---|---|---|---|---|---|",
    ]
    for name, pairs in results.runs.items():
        seconds = [pair.estimated_seconds / pair.seconds for pair in pairs]
        memory = [pair.estimated_bytes / pair.peak_bytes for pair in pairs]
        cells = (
            name,
            _ratios(seconds),
            f"{_median(p.estimated_seconds for p in pairs):.1f} s / "
            f"{_median(p.seconds for p in pairs):.1f} s",
            _ratios(memory),
            f"{_median(p.estimated_bytes for p in pairs) / 2**20:,.0f} / "
            f"{_median(p.peak_bytes for p in pairs) / 2**20:,.0f} MiB",
            f"{_median(p.estimating_seconds for p in pairs):.1f} s",
        )
        rows.append(f"| {' | '.join(cells)} |")
    n_rounds = max(map(len, results.runs.values()))
    told = (
        f"SmolLM2-135M and its fine-tune where no pair is named; float32 where no type is; threads: "
        f"{results.n_threads}; rounds: {n_rounds}{', in seconds of the processor' * results.of_processor}. "
        f"Asked: time within {TIME_WITHIN:.0%}, memory within "
        f"{MEMORY_WITHIN:.0%}."
    )
    return "\n".join([told, "", *rows])


def _ratios(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} × ({min(values):.2f}–{max(values):.2f})"


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
