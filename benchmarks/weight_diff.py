"""weight-diff against what it must not be much slower than: `python -m benchmarks.weight_diff`.

Whole commands, imports and all, in turn, the files in the system's cache. `modeldelta` (PyPI) must be on the
path, or named by MODELDELTA.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from rich.console import Console

from benchmarks import places
from benchmarks.commands import measure, python_module
from benchmarks.figures import Figure, Page, run_parts
from benchmarks.results import Command
from benchmarks.size import random_llamas

MEBIBYTE = 2**20
GIGABYTE = 1e9
MOST_MEMORY = 500e6 / MEBIBYTE
progress = Console(stderr=True)


def weight_diff(base: str | Path, finetuned: str | Path, *options: str) -> list[str]:
    """The command line of weight-diff."""
    return python_module("lazarus", "introspect", "weight-diff", "-b", base, "-f", finetuned, "-q", *options)


def timed(what: str, command: list[str]) -> Command:
    """Run a command, and say what it took."""
    found = measure(command)
    progress.print(f"{what}: {found.seconds:.1f} s, {found.peak / MEBIBYTE:.0f} MiB", highlight=False)
    return found


def measure_size(n_runs: int) -> Iterator[Figure]:
    """Two checkpoints of 3 GB, in bfloat16 and in float32."""
    pairs = {"bfloat16": random_llamas(27, 2048), "float32": random_llamas(13, 2048, "float32")}
    for dtype, (base, finetuned) in pairs.items():
        size = sum(file.stat().st_size for file in Path(base).glob("*.safetensors")) / GIGABYTE
        what = f"two checkpoints of {size:.1f} GB in {dtype}"
        ratios, peaks = [], []
        measure(python_module("benchmarks.numpy_pass", base, finetuned))  # from now on both read from memory
        for _ in range(n_runs):
            theirs = timed("NumPy", python_module("benchmarks.numpy_pass", base, finetuned))
            ours = timed("weight-diff", weight_diff(base, finetuned))
            ratios.append(ours.seconds / theirs.seconds)
            peaks.append(ours.peak / MEBIBYTE)
        told = "seconds, weight-diff / reading both and one pass of NumPy float32"
        yield Figure("size", f"{what}: {told}", ratios, most=1.5)
        yield Figure("size", f"{what}: peak memory", peaks, "MiB", most=round(MOST_MEMORY))


def measure_modeldelta(n_runs: int) -> Iterator[Figure]:
    """SmolLM2 and its fine-tune, against modeldelta."""
    command = os.environ.get("MODELDELTA") or shutil.which("modeldelta")
    if command is None:
        raise SystemExit("modeldelta is not here: install it beside, and name its command in MODELDELTA")
    pair = (places.BASE, places.finetuned())
    rounds: list[tuple[Command, Command, Command]] = []
    for _ in range(n_runs):
        theirs = timed("modeldelta", [command, "-q", *map(str, pair)])
        rounds.append(
            (
                theirs,
                timed("weight-diff", weight_diff(*pair)),
                timed("--spectrum", weight_diff(*pair, "--spectrum")),
            )
        )
    name = "SmolLM2-135M and its fine-tune"
    faster = [theirs.seconds / ours.seconds for theirs, ours, _ in rounds]
    yield Figure("modeldelta", f"{name}: seconds, modeldelta / weight-diff", faster, least=5)
    faster = [theirs.seconds / spectrum.seconds for theirs, _, spectrum in rounds]
    yield Figure("modeldelta", f"{name}: seconds, modeldelta / weight-diff --spectrum", faster, least=2)
    for place, what in enumerate(("modeldelta", "weight-diff", "weight-diff --spectrum")):
        peaks = [each[place].peak / MEBIBYTE for each in rounds]
        yield Figure("modeldelta", f"{name}: peak memory of {what}", peaks, "MiB")
    saved = places.CACHE / "weight-diff.json"
    measure(weight_diff(*pair, "-o", str(saved)))
    summary = msgspec.json.decode(saved.read_bytes())["summary"]
    skipped = 272 - summary["n_tensors"] + summary["n_unmatched"]
    yield Figure("modeldelta", f"{name}: tensors of 272 that weight-diff skips", [skipped], "", most=0)


PARTS: dict[str, Callable[[int], Iterator[Figure]]] = {
    "size": measure_size,
    "modeldelta": measure_modeldelta,
}

if __name__ == "__main__":
    run_parts("benchmarks.weight_diff", __doc__ or "", PARTS, Page("weight_diff.json", "weights.md"))
