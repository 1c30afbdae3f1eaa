"""Does fine-tuning change late layers most, and is that the size of their updates?

Run as `python -m benchmarks.depth [--write-docs]`. It changes SmolLM2-135M-Instruct in three ways, on four
tasks and with two seeds, compares each result with the base by Lazarus, and keeps the figures of each run
in benchmarks/cache/depth: an interrupted study goes on where it was. It takes over an hour on two cores.

The finding is that of Billa 2026, "Decomposing the Depth Profile of Fine-Tuning", arXiv 2604.17177.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from rich.console import Console

import lazarus
from benchmarks import places
from benchmarks.depth_report import Profile, Run, draw, page
from benchmarks.depth_training import ARMS, TASKS, changed, sentences
from benchmarks.trust_report import fill_in

SEEDS = (0, 1)
N_GENERAL, N_OWN = 40, 30
CACHE = places.CACHE / "depth"
RESULTS = places.ROOT / "benchmarks" / "results" / "depth.json"
DOCS = places.ROOT / "docs" / "study-depth.md"
FIGURE = places.ROOT / "docs" / "assets" / "study-depth.svg"
console = Console(stderr=True)


def measure(task: str, arm: str, seed: int) -> Run:
    """Change the model, save it in float32, and compare it."""
    model, tokenizer, losses = changed(task, arm, seed)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        general = places.PROMPTS.read_text(encoding="utf-8").splitlines()[:N_GENERAL]
        return Run(
            task=task,
            arm=arm,
            seed=seed,
            losses=losses,
            update=_updates(Path(folder)),
            general=_profile(Path(folder), general),
            own=_profile(Path(folder), sentences(task)[-N_OWN:]),
        )


def _profile(folder: Path, prompts: list[str]) -> Profile:
    diff = lazarus.activation_diff(
        places.BASE,
        folder,
        prompts,
        position="mean",
        localize=True,
        no_noise_floor=True,
        dtype="float32",
        device="cpu",
    )
    layers = diff.layers
    return Profile(
        divergence=[_known(layer.divergence) for layer in layers],
        relative_l2=[_known(layer.relative_l2) for layer in layers],
        local=[_known(layer.local.relative_l2 if layer.local else None) for layer in layers],
        per_prompt=[[float(f"{x:.5g}") for x in row] for row in diff.results.column("divergence").tolist()],
    )


def _updates(folder: Path) -> list[float]:
    """‖ΔW‖ / ‖W‖ of each block."""
    squares: dict[int, list[tuple[float, float]]] = {}
    for tensor in lazarus.weight_diff(places.BASE, folder).results:
        if tensor.layer is not None:
            found = (_known(tensor.change_norm) ** 2, _known(tensor.base_norm) ** 2)
            squares.setdefault(tensor.layer, []).append(found)
    sums = [map(sum, zip(*squares[layer], strict=True)) for layer in sorted(squares)]
    return [math.sqrt(change / base) for change, base in sums]


def _known(value: float | None) -> float:
    assert value is not None, "nothing of these models is without a number"
    return value


def study() -> list[Run]:
    """Every run, from the cache where it is there."""
    CACHE.mkdir(parents=True, exist_ok=True)
    found = []
    for seed, task, arm in itertools.product(SEEDS, TASKS, ARMS):
        if arm == "noise" and task != TASKS[0]:
            continue  # noise knows of no task
        kept = CACHE / f"{task}-{arm}-{seed}.json".replace(" ", "-")
        if not kept.exists():
            console.print(f"{task}, {arm}, seed {seed}", highlight=False)
            kept.write_bytes(msgspec.json.encode(measure(task, arm, seed)))
        found.append(msgspec.json.decode(kept.read_bytes(), type=Run))
    return found


def main() -> None:
    """Measure, keep what was measured, and write the page and its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--write-docs", action="store_true", help="from the results that are kept, without measuring"
    )
    if not parser.parse_args().write_docs:
        RESULTS.write_bytes(b"[" + b",\n".join(map(msgspec.json.encode, study())) + b"]\n")  # a line a run
    runs = msgspec.json.decode(RESULTS.read_bytes(), type=list[Run])
    draw(runs, FIGURE)
    fill_in(DOCS, "\n\n".join(page(runs)))


if __name__ == "__main__":
    main()
