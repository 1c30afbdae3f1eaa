"""The cost of options that measure more: `python -m benchmarks.extras [--prompts N] [--rounds N]`.

Each option's run and the same run without it take turns in one process, on SmolLM2 and its fine-tune, both
in memory. A figure is the median of the rounds' ratios. What `--attribute` costs is measured by
`benchmarks.attribution`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks import places
from benchmarks.in_process import Pair
from benchmarks.naive import load_model
from benchmarks.trust_report import fill_in, table
from lazarus import activation_diff

RESULTS = places.ROOT / "benchmarks" / "results" / "extras.json"
DOCS = places.ROOT / "docs" / "benchmarks.md"
OPTIONS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any], float | None]] = {
    "--sites all": ({}, {"sites": "all"}, 1.15),
    "--localize --sites all": ({"localize": True}, {"localize": True, "sites": "all"}, None),
    "single tokens, with --position all": (
        {"position": "all", "token_prompts": "none"},
        {"position": "all"},
        1.2,
    ),
    "--readout auto, with --position all": (
        {"position": "all", "token_prompts": "none"},
        {"position": "all", "token_prompts": "none", "readout": "auto"},
        None,
    ),
}
"""name → the options of the run without it and of the run with it, and what was asked for"""
console = Console(stderr=True)


class Results(Struct, frozen=True):
    """All that was measured."""

    n_prompts: int
    n_threads: int
    costs: list[Cost]


class Cost(Struct, frozen=True):
    """The ratios of one option, a round each, and the seconds behind the medians."""

    option: str
    ratios: list[float]
    without: float
    with_it: float
    asked: float | None


def main() -> None:
    """Measure, save, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    pair = Pair(
        load_model(str(places.BASE), "float32"),
        load_model(str(places.finetuned()), "float32"),
        AutoTokenizer.from_pretrained(places.BASE),
        places.PROMPTS.read_text(encoding="utf-8").splitlines()[: given.prompts],
    )
    wanted = [name for name in OPTIONS if not given.only or name in given.only]
    found = [measure(pair, name, given.rounds) for name in wanted]
    results = Results(len(pair.texts), torch.get_num_threads(), found)
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    write_docs(DOCS)


def write_docs(page: Path) -> None:
    """Write the table of the last results into the page; nothing where there are none."""
    if RESULTS.exists():
        fill_in(page, report(msgspec.json.decode(RESULTS.read_bytes(), type=Results)))


def measure(pair: Pair, name: str, n_rounds: int) -> Cost:
    """Take both runs in turn; the first round warms up and is thrown away."""
    without, with_it, asked = OPTIONS[name]
    runs = [_run(pair, without), _run(pair, with_it)]
    rounds = [[_seconds(run) for run in runs] for _ in range(n_rounds + 1)][1:]
    ratios = [second / first for first, second in rounds]
    console.print(f"{name}: {', '.join(f'{r:.2f}' for r in ratios)}", highlight=False)
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    return Cost(name, ratios, medians[0], medians[1], asked)


def _run(pair: Pair, options: Mapping[str, Any]) -> Callable[[], object]:
    return lambda: activation_diff(
        pair.base, pair.finetuned, pair.texts, tokenizer=pair.tokenizer, device="cpu", **options
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def report(results: Results) -> str:
    """What was measured, as a table."""
    rows = [
        (
            f"`{cost.option}`" if cost.option.startswith("--") else cost.option,
            f"{statistics.median(cost.ratios):.2f} × ({min(cost.ratios):.2f}–{max(cost.ratios):.2f})",
            "" if cost.asked is None else f"{cost.asked:g} ×",
            f"{cost.with_it:.1f} s / {cost.without:.1f} s",
        )
        for cost in results.costs
    ]
    head = ("option", "with it / without", "asked", "medians behind it")
    told = (
        f"SmolLM2-135M and its fine-tune, float32, {results.n_prompts} prompts, {results.n_threads} threads, "
        f"{len(results.costs[0].ratios)} rounds."
    )
    return f"{told}\n\n{table(head, rows)}"


if __name__ == "__main__":
    main()
