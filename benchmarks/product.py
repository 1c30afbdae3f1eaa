"""The product of float32 matrices: torch's default against oneDNN's, over the whole of lazarus, in turn.

Run as `python -m benchmarks.product BASE FINETUNED PROMPTS RUNS` by `benchmarks.size`; prints a `ProductRuns`
record as JSON. The models are loaded once, and each way is run once before any is measured. No option chooses
the product, so it is forced by moving the limits of the choice; what would have been chosen is told beside.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.in_process import timed
from benchmarks.naive import load_model
from benchmarks.results import ProductRuns, Way
from lazarus import ActivationDiff, activation_diff
from lazarus.engine import product
from lazarus.models import wrap_model

BATCH_TOKENS = (512, 1024)

console = Console(stderr=True)


class Runs:
    """Both models in memory, and the prompts."""

    def __init__(self, base: str, finetuned: str, prompts: str) -> None:
        self.models = load_model(base, "float32"), load_model(finetuned, "float32")
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.texts = Path(prompts).read_text(encoding="utf-8").splitlines()
        self.diffs: dict[tuple[str, int], ActivationDiff] = {}

    def way(self, path: str, batch_tokens: int) -> Callable[[], None]:
        """One comparison this way; `path` is `default`, `onednn`, or `chosen`."""
        limits: dict[str, dict[str, Any]] = {
            "default": {"FEWEST_FLOPS": float("inf")},
            "onednn": {"FEWEST_FLOPS": 0.0, "FASTER": 0.0},
            "chosen": {},
        }

        def run() -> None:
            with ExitStack() as stack:
                for name, value in limits[path].items():
                    stack.enter_context(patch.object(product, name, value))
                self.diffs[path, batch_tokens] = activation_diff(
                    *self.models,
                    self.texts,
                    tokenizer=self.tokenizer,
                    device="cpu",
                    batch_tokens=batch_tokens,
                )

        return run


def measure(runs: Runs, n_runs: int) -> ProductRuns:
    """Warm up, and measure every round: the ways forwards and backwards in turn."""
    keys = [(path, n) for path in ("default", "onednn") for n in BATCH_TOKENS]
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in keys}
    runs.way("chosen", BATCH_TOKENS[0])()
    chosen = runs.diffs["chosen", BATCH_TOKENS[0]].record.environment.matmul
    for key in keys:
        runs.way(*key)()
    for number in range(n_runs):
        for key in keys if number % 2 else reversed(keys):
            seconds[key].append(timed(runs.way(*key)))
        told = ", ".join(f"{path} {n} {seconds[path, n][-1]:.2f} s" for path, n in keys)
        console.print(f"run {number + 1} of {n_runs}: {told}", highlight=False)
    return _record(runs, chosen or "none", [Way(*key, seconds[key]) for key in keys])


def _record(runs: Runs, chosen: str, ways: list[Way]) -> ProductRuns:
    columns = [diff.results.column("divergence") for diff in runs.diffs.values()]
    candidates = _candidates(runs)
    return ProductRuns(
        chosen=chosen,
        gflops={one.path: one.gflops for one in candidates},
        errors={one.path: one.error for one in candidates},
        ways=ways,
        worst_divergence=max(float(abs(column - columns[0]).max()) for column in columns),
    )


def _candidates(runs: Runs) -> tuple[product.Candidate, ...]:
    """As a run of many tokens measures them; a process does that once."""
    model = wrap_model(runs.models[0], "base")
    return product.choose_product(model, int(product.FEWEST_FLOPS), BATCH_TOKENS[0]).candidates


def main(base: str, finetuned: str, prompts: str, runs: str) -> None:
    """Load, measure, write the record to standard output."""
    found = measure(Runs(base, finetuned, prompts), int(runs))
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
