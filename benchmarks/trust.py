"""Hold the numbers against models of which the truth is known: `python -m benchmarks.trust`.

truth      blocks, adapters, a head and a norm that were changed and nothing else: what is found
null       function-preserving copies (MLP neurons permuted): how often they are called changed
power      one block's weights changed at random by a share of their norm: from where on it is found
coverage   resamples of 100 prompts out of 1,000: how often the interval holds the mean of all
readout    a fine-tune on arithmetic alone and one on half prose: the tokens that the difference promotes
cost       a run with everything against one with less, and against two bare forward passes

Every figure is saved to benchmarks/results/trust.json; `--write-docs` writes docs/trust.md from it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import pairs, places, trust_report, weights
from benchmarks.in_process import Pair, Stopwatch, run_bare, timed
from benchmarks.results import describe_machine
from benchmarks.trust_results import Cost, Coverage, Null, Power, ReadLayer, Trust, Truth
from lazarus import ActivationDiff, activation_diff
from lazarus.demo import BASE as DEMO_BASE
from lazarus.demo import FINETUNED as DEMO_FINETUNED
from lazarus.demo import PROMPTS
from lazarus.demo.train import prose_split
from lazarus.prompts import parse_prompts
from lazarus.statistics import intervals

PARTS = ("truth", "null", "power", "coverage", "readout", "cost")
DTYPES = ("float32", "bfloat16")
N_PROMPTS = (1, 5, 10, 50)
POWERS = {
    "float32": (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4),
    "bfloat16": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
POWER_BLOCK = 15
COST_ROUNDS = 5
POPULATION, DRAWN, DRAWS = 1000, 100, 1000
WORDS = 24
READ_POSITIONS = ("last", "mean", "1")
SUBJECT = {*"0123456789+-*=", "plus", "equals", "Question", "Answer", *weights.NAMES, *weights.THINGS}
"""Tokens that belong to the lines of arithmetic that were trained on."""

progress = Console(stderr=True)


def texts() -> list[str]:
    """The 200 prompts of the benchmark."""
    return places.PROMPTS.read_text(encoding="utf-8").splitlines()


def load(folder: Path, dtype: str) -> Any:
    """A model in memory, in this type."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


# --- truth --------------------------------------------------------------------------------------


def measure_truth(dtype: str) -> list[Truth]:
    """Each pair whose truth is known, as the command would be run on it."""
    names = {name: str(places.pair_folder(name)) for name in pairs.PAIRS if name != "narrow-mixed"}
    names["lora-zero"] = f"{places.BASE}+{names['lora-zero']}"
    names["lora-15-29"] = f"{places.BASE}+{names['lora-15-29']}"
    cases = [(name, str(places.BASE), folder) for name, folder in names.items() if "merged" not in name]
    cases.append(("merged against unmerged", names["lora-15-29-merged"], names["lora-15-29"]))
    cases.append(("the same folder", str(places.BASE), str(places.BASE)))
    return [_truth(name, base, finetuned, dtype) for name, base, finetuned in cases]


def _truth(name: str, base: str, finetuned: str, dtype: str) -> Truth:
    diff = activation_diff(base, finetuned, texts()[:50], dtype=dtype, device="cpu", localize=True)
    told = str(diff).split("Verdict: ")[1].splitlines()[0].replace(f"{places.CACHE}/", "")
    progress.print(f"{dtype}, {name}: {told}", highlight=False)
    return Truth(
        name=name,
        dtype=dtype,
        verdict=told,
        onset=diff.summary.onset_layer,
        most_divergent=diff.summary.most_divergent_layer,
        most_changed=diff.summary.most_changed_block,
        divergence=[layer.divergence or 0.0 for layer in diff.layers],
        local=[(layer.local.relative_l2 if layer.local else None) or 0.0 for layer in diff.layers],
    )


# --- null and power -----------------------------------------------------------------------------


def permute_neurons(model: Any, base: Any, seed: int) -> None:
    """Make `model` the base with the neurons of every MLP in another order: the same function."""
    generator = torch.Generator().manual_seed(seed)
    for block, original in zip(model.model.layers, base.model.layers, strict=True):
        order = torch.randperm(original.mlp.up_proj.out_features, generator=generator)
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            source = getattr(original.mlp, name).weight.data
            getattr(block.mlp, name).weight.data.copy_(source.index_select(axis, order))


def change_block(share: float, model: Any, base: Any, seed: int) -> None:
    """Make `model` the base with one block's matrices moved at random by `share` of their norm."""
    model.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers[POWER_BLOCK].modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.data.float()
            noise = torch.randn(weight.shape, generator=generator)
            layer.weight.data.copy_(weight + noise * (share * weight.norm() / noise.norm()))


def verdicts(
    folder: Path,
    dtype: str,
    n_runs: int,
    change: Callable[[Any, Any, int], None],
    sizes: Sequence[int] = N_PROMPTS,
) -> list[ActivationDiff]:
    """The results of runs of base against a changed copy, each on one or a few prompts of its own."""
    base, model = load(folder, dtype), load(folder, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for run in range(n_runs):
        change(model, base, run)
        choice = random.Random(run)
        chosen = choice.sample(texts(), choice.choice(sizes))
        found.append(activation_diff(base, model, chosen, tokenizer=tokenizer, device="cpu", seed=run))
    return found


def highest_ratio(diff: ActivationDiff) -> float:
    """The largest ratio of a relative L2 to its floor, over all sites and the logits."""
    places_ = [(m.relative_l2, m.noise_floor) for m in (*diff.layers, *diff.sites)]
    if diff.record.output is not None:
        places_.append((diff.record.output.logits_relative_l2, diff.record.output.noise_floor))
    return max((value or 0.0) / floor for value, floor in places_ if floor)


def measure_null(name: str, folder: Path, dtype: str, n_runs: int) -> Null:
    """Return how often a function-preserving copy is called changed."""
    found = verdicts(folder, dtype, n_runs, permute_neurons)
    ratios = [highest_ratio(diff) for diff in found]
    n_changed = sum(diff.summary.verdict == "changed" for diff in found)
    progress.print(f"null, {name}, {dtype}: {n_changed} of {n_runs} changed", highlight=False)
    median, high = (float(q) for q in np.quantile(ratios, [0.5, 0.95]))
    return Null(name, dtype, n_runs, n_changed, median, high, max(ratios))


def measure_power(dtype: str, n_runs: int) -> list[Power]:
    """The share of runs that are called changed, for growing changes, until all are."""
    found = []
    for share in POWERS[dtype]:
        diffs = verdicts(places.BASE, dtype, n_runs, partial(change_block, share), (10,))
        n_changed = sum(diff.summary.verdict == "changed" for diff in diffs)
        found.append(Power(dtype, share, n_runs, n_changed))
        progress.print(f"power, {dtype}: {share:.1e}: {n_changed} of {n_runs}", highlight=False)
        if n_changed == n_runs:
            break
    return found


# --- coverage, readout, cost --------------------------------------------------------------------


def measure_coverage(dtype: str) -> Coverage:
    """Return how often the interval of 100 prompts, drawn out of 1,000, holds the mean of all 1,000."""
    prose = [" ".join(paragraph.split()[:WORDS]) for paragraph in prose_split()[0]]
    prompts = random.Random(0).sample(prose, POPULATION)
    diff = activation_diff(
        places.BASE, places.finetuned(), prompts, dtype=dtype, device="cpu", no_noise_floor=True
    )
    divergence = diff.results.column("divergence")
    truth, draws = divergence.mean(0), np.random.default_rng(0)
    held = np.zeros(divergence.shape[1])
    for draw in range(DRAWS):
        found = intervals(divergence[draws.integers(POPULATION, size=DRAWN)], draw)
        assert found is not None
        held += (found.low <= truth) & (truth <= found.high)
    share = held / DRAWS
    progress.print(f"coverage: {share.min():.3f} to {share.max():.3f}", highlight=False)
    return Coverage(dtype, DRAWS, float(share.min()), float(share.mean()), float(share.max()))


def measure_readout(name: str, base: Path, finetuned: Path, prompts: Sequence[str]) -> list[ReadLayer]:
    """Return what the mean difference promotes on prompts that have nothing to do with arithmetic."""
    found = []
    for position in READ_POSITIONS:
        diff = activation_diff(base, finetuned, prompts, device="cpu", readout="auto", position=position)
        for read in diff.record.readout or []:
            promoted = [token.token for token in read.finetuned_promoted]
            n_subject = sum(token.strip() in SUBJECT for token in promoted)
            found.append(ReadLayer(name, position, read.layer, promoted, n_subject, read.static_share))
    progress.print(f"readout, {name}: {[row.n_subject for row in found]}", highlight=False)
    return found


def readout_pairs() -> Iterator[tuple[str, Path, Path, list[str]]]:
    """Two fine-tunes of SmolLM2 on general prompts, and the demo pair on its prompts of prose."""
    yield "SmolLM2, arithmetic alone", places.BASE, places.finetuned(), texts()
    yield "SmolLM2, half prose", places.BASE, places.pair_folder("narrow-mixed"), texts()
    prompts = [prompt.text for prompt in parse_prompts([f"@{PROMPTS}"]).prompts if prompt.group == "prose"]
    yield "demo, arithmetic alone", DEMO_BASE, DEMO_FINETUNED, prompts


def measure_cost(dtype: str, n_runs: int) -> list[Cost]:
    """Seconds of runs with more and with less, and of two bare forward passes, interleaved."""
    tokenizer = AutoTokenizer.from_pretrained(places.BASE)
    pair = Pair(load(places.BASE, dtype), load(places.finetuned(), dtype), tokenizer, texts())
    batches = pair.batches(pair.run_lazarus(Stopwatch()).record.settings.batch_tokens)
    found = []
    for _ in range(n_runs):
        found.append(
            Cost(
                dtype,
                bare=timed(lambda: run_bare(pair.stacks, batches)),
                without_noise=_run(pair, no_noise_floor=True),
                default=_run(pair),
                everything_else=_run(pair, readout="auto"),
                localized=_run(pair, localize=True),
            )
        )
        progress.print(f"cost, {dtype}: {found[-1].told()}", highlight=False)
    return found


def _run(pair: Pair, **options: Any) -> float:
    return timed(
        lambda: activation_diff(
            pair.base, pair.finetuned, pair.texts, tokenizer=pair.tokenizer, device="cpu", **options
        )
    )


# --- all ----------------------------------------------------------------------------------------


def measure(trust: Trust, parts: Sequence[str], n_runs: int) -> None:
    """Run the parts that are asked for, in the place of their last figures."""
    if "truth" in parts:
        trust.truth = [row for dtype in DTYPES for row in measure_truth(dtype)]
    if "null" in parts:
        models = (("SmolLM2-135M", places.BASE, n_runs // 2), ("demo base", DEMO_BASE, n_runs))
        trust.null = [measure_null(n, folder, d, runs) for n, folder, runs in models for d in DTYPES]
    if "power" in parts:
        trust.power = [row for dtype in DTYPES for row in measure_power(dtype, max(2, n_runs // 10))]
    if "coverage" in parts:
        trust.coverage = measure_coverage("float32")
    if "readout" in parts:
        trust.readout = [row for case in readout_pairs() for row in measure_readout(*case)]
    if "cost" in parts:
        trust.cost = [row for dtype in DTYPES for row in measure_cost(dtype, COST_ROUNDS)]


def main() -> None:
    """Measure and save; or write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trust", description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; repeatable")
    parser.add_argument(
        "--runs",
        type=int,
        default=200,
        help="runs of the null (half of it on SmolLM2, a tenth for the power)",
    )
    parser.add_argument("--write-docs", action="store_true", help="only write docs/trust.md")
    chosen = parser.parse_args()
    if chosen.write_docs:
        trust_report.write(places.TRUST, places.TRUST_DOCS)
        return
    weights.main()
    if not {"truth", "readout"}.isdisjoint(chosen.part or PARTS):
        pairs.main()
    there = places.TRUST.exists()
    trust = msgspec.json.decode(places.TRUST.read_bytes(), type=Trust) if there else Trust()
    trust.machine = describe_machine()
    try:
        measure(trust, chosen.part or PARTS, chosen.runs)
    finally:
        places.TRUST.write_bytes(msgspec.json.format(msgspec.json.encode(trust), indent=1))


if __name__ == "__main__":
    main()
