"""Measure lazarus against the naive loop: `python -m benchmarks.speed` from the root of the repository.

Every ratio is taken within one run, the runs are interleaved, and all of them are saved.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from benchmarks import places, report
from benchmarks.commands import measure_help, memory_by_prompts, run_module, whole_commands
from benchmarks.results import Finetuning, InProcess, Results, describe_machine, read, save

PARTS = ("help", "memory", "in-process", "commands")
DTYPES = ("float32", "bfloat16")
HELP_RUNS = 5
MOST_MEMORY_RUNS = 3
WIDTH = 150

progress = Console(stderr=True)


def parse() -> argparse.Namespace:
    """The options; `--quick` is a trial of everything in little time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--runs", type=int, help="rounds of each measurement (default: 5)")
    parser.add_argument("--prompts", type=int, help="only the first so many prompts, and save nothing")
    parser.add_argument(
        "--part",
        action="append",
        choices=PARTS,
        help="only this part, in the place of its last figures; repeatable",
    )
    parser.add_argument("--quick", action="store_true", help="try everything out; figures mean nothing")
    parser.add_argument(
        "--write-docs", action="store_true", help="only write docs/benchmarks.md from the last results"
    )
    chosen = parser.parse_args()
    chosen.runs = chosen.runs or (1 if chosen.quick else 5)
    chosen.prompts = chosen.prompts or (8 if chosen.quick else None)
    chosen.steps = 2 if chosen.quick else places.STEPS
    chosen.counts = (20, 100) if chosen.quick else (1_000, 20_000)
    return chosen


class Benchmark:
    """The chosen parts, one after the other, into one record."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.texts = places.PROMPTS.read_text(encoding="utf-8").splitlines()[: chosen.prompts]
        self.prompts = places.CACHE / "prompts.txt"
        self.models = (places.BASE, places.finetuned(chosen.steps))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.results = Results(now, describe_machine(), len(self.texts))
        if chosen.part and self.saves:
            self.results = _without(read(places.RESULTS), chosen.part, self.results)

    @property
    def saves(self) -> bool:
        """Return whether the results are those of all prompts, or parts of such results from this machine."""
        if self.chosen.prompts is not None:
            return False
        if not self.chosen.part:
            return True
        return places.RESULTS.exists() and read(places.RESULTS).machine.cpu == describe_machine().cpu

    def run(self) -> None:
        """Run them all, the short ones first."""
        parts = self.chosen.part or PARTS
        if "help" in parts:
            self.results.help = measure_help(HELP_RUNS)
        if "memory" in parts:
            self._run_memory()
        if "in-process" in parts or "commands" in parts:
            self._make_models()
        for dtype in DTYPES:  # in one process first: it brings the files into the system's cache
            if "in-process" in parts:
                self._run_in_process(dtype)
            if "commands" in parts:
                self._run_commands(dtype)

    def _make_models(self) -> None:
        run_module("benchmarks.weights", str(self.chosen.steps))
        facts = (self.models[1] / places.TRAINING_FACTS).read_bytes()
        self.results.finetuning = msgspec.json.decode(facts, type=Finetuning)
        self.prompts.write_text("\n".join(self.texts) + "\n", encoding="utf-8")

    def _run_in_process(self, dtype: str) -> None:
        arguments = (*self.models, self.prompts, dtype, str(self.chosen.runs))
        found = run_module("benchmarks.in_process", *arguments)
        self.results.in_process.append(msgspec.json.decode(found, type=InProcess))

    def _run_commands(self, dtype: str) -> None:
        rounds = self.results.commands[dtype] = []
        for found in whole_commands(*self.models, self.prompts, dtype, self.chosen.runs):
            rounds.append(found)
            seconds = f"lazarus {found.lazarus.seconds:.2f} s, naive loop {found.naive.seconds:.2f} s"
            progress.print(
                f"{dtype}, whole command {len(rounds)} of {self.chosen.runs}: {seconds}", highlight=False
            )

    def _run_memory(self) -> None:
        n_runs = min(self.chosen.runs, MOST_MEMORY_RUNS)
        for found in memory_by_prompts(self.texts, self.chosen.counts, n_runs):
            self.results.memory.append(found)
            progress.print(f"{found.n_prompts:,} prompts: peak {found.peak / 2**20:.0f} MiB", highlight=False)


def _without(last: Results, parts: Sequence[str], new: Results) -> Results:
    """The last results less the parts that are measured again."""
    return Results(
        new.created,
        new.machine,
        new.n_prompts,
        last.finetuning,
        [] if "in-process" in parts else last.in_process,
        {} if "commands" in parts else last.commands,
        [] if "memory" in parts else last.memory,
        None if "help" in parts else last.help,
    )


def write_docs(source: Path, target: Path) -> None:
    """Write the page of the last results."""
    target.parent.mkdir(exist_ok=True)
    target.write_text(report.markdown(read(source)), encoding="utf-8")
    from benchmarks import estimates, extras  # here, because one of them imports torch

    extras.write_docs(target)
    estimates.write_docs(target)


def main() -> None:
    """Measure, print and save; or write the page."""
    chosen = parse()
    if chosen.write_docs:
        write_docs(places.RESULTS, places.DOCS)
        return
    benchmark = Benchmark(chosen)
    try:
        benchmark.run()
    finally:  # what was measured before a fault is not lost
        save(benchmark.results, places.LAST_RESULTS)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(report.table(benchmark.results))
    if benchmark.saves:
        save(benchmark.results, places.RESULTS)


if __name__ == "__main__":
    main()
