"""Attribution held against experiments on SmolLM2: `python -m benchmarks.attribution [--only PART]`.

completeness   how far the parts are from the divergence that they should add up to, and the points it took
restored       the divergence that is left where three blocks are set back to base: the three that attribution
               names, those with the largest change of their weights, and those with the largest local change
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lazarus
from benchmarks import places, weights
from benchmarks.quantised import Method, quantise
from benchmarks.trust_report import fill_in, table
from lazarus.demo import BASE as DEMO_BASE
from lazarus.demo import FINETUNED as DEMO_FINETUNED

PARTS = ["completeness", "restored"]
N_PROMPTS, N_RESTORED, N_PAIRS = 12, 3, 20
RESULTS = places.ROOT / "benchmarks" / "results" / "attribution.json"
DOCS = places.ROOT / "docs" / "attribution.md"
console = Console(stderr=True)


class Complete(Struct, frozen=True):
    """The parts of one pair, added up."""

    pair: str
    kl: float
    error: float
    n_points: int
    first: str
    share: float


class Restored(Struct, frozen=True):
    """The divergence of one pair, and what is left of it with three blocks set back to base."""

    pair: str
    kl: float
    attribution: float
    weight_change: float
    local_change: float


class Results(Struct, frozen=True):
    """All that was measured."""

    completeness: list[Complete] = []
    restored: list[Restored] = []


def prompts() -> list[str]:
    """The first prompts of the benchmark."""
    return places.PROMPTS.read_text(encoding="utf-8").splitlines()[:N_PROMPTS]


def load(folder: Path) -> PreTrainedModel:
    """A model in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def rounded(model: PreTrainedModel, bits: Mapping[int, int], method: Method) -> PreTrainedModel:
    """A copy with the matrices of each block rounded to so many bits, in groups of 64 columns."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if name.endswith("_proj.weight"):
                codes, scales = quantise(weight, bits[int(name.split(".")[2])], method)
                groups = codes.float().reshape(len(weight), scales.shape[1], -1)
                weight.copy_((groups * scales.float()[..., None]).reshape(weight.shape))
    return found


def uniform(model: PreTrainedModel, bits: int) -> dict[int, int]:
    """As many bits for every block."""
    return dict.fromkeys(range(model.config.num_hidden_layers), bits)


def pairs(base: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """Quantisations of SmolLM2 and fine-tunes of it."""
    n_layers = base.config.num_hidden_layers
    methods: tuple[Method, ...] = ("nearest", "mse")
    for bits in (3, 4, 5):
        for method in methods:
            yield f"{bits} bits, {method}", rounded(base, uniform(base, bits), method)
    for seed in range(N_PAIRS - 8):
        chance = random.Random(seed)
        widths = {n: chance.choice((3, 4, 5, 6)) for n in range(n_layers)}
        yield f"3 to 6 bits, drawn {seed}", rounded(base, widths, methods[seed % 2])
    finetuned = load(places.finetuned())
    yield "fine-tune", finetuned
    yield "fine-tune, 4 bits", rounded(finetuned, uniform(base, 4), "nearest")


def measure_completeness() -> list[Complete]:
    """Attribute the demo pair, the fine-tune of SmolLM2, and roundings."""
    base = load(places.BASE)
    cases: list[tuple[str, Any, Any, Any]] = [
        ("demo pair", str(DEMO_BASE), str(DEMO_FINETUNED), None),
        ("SmolLM2, fine-tune", base, load(places.finetuned()), places.BASE),
        *(
            (
                f"SmolLM2 in {bits} bits",
                base,
                rounded(base, uniform(base, bits), "nearest"),
                places.BASE,
            )
            for bits in (4, 3)
        ),
    ]
    found = []
    for name, one, other, tokenizer in cases:
        diff = lazarus.activation_diff(
            one,
            other,
            prompts(),
            tokenizer=tokenizer and str(tokenizer),
            attribute="blocks",
            no_noise_floor=True,
            dtype="float32",
        )
        parts = diff.record.attribution
        assert parts is not None
        first = max(parts.groups, key=lambda group: group.nats)
        found.append(
            Complete(name, parts.kl, parts.completeness_error, parts.n_points, first.name, first.share or 0.0)
        )
        console.print(found[-1])
    return found


def measure_restored() -> list[Restored]:
    """Set the three blocks that each ranking names first back to base."""
    base, found = load(places.BASE), []
    tokenizer = AutoTokenizer.from_pretrained(places.BASE)
    for name, other in pairs(base):
        started = time.perf_counter()
        options = {"tokenizer": tokenizer, "no_noise_floor": True}
        diff = lazarus.activation_diff(base, other, prompts(), attribute="blocks", localize=True, **options)
        parts = diff.record.attribution
        assert parts is not None
        rankings = {
            "attribution": {g.layer: g.nats for g in parts.groups if g.layer is not None},
            "weight_change": _weight_changes(base, other),
            "local_change": {each.layer: each.local.relative_l2 or 0.0 for each in diff.layers if each.local},
        }
        left = {}
        for ranking, values in rankings.items():
            chosen = sorted(values, key=lambda layer: -values[layer])[:N_RESTORED]
            hybrid = lazarus.activation_diff(base, _restored(base, other, chosen), prompts(), **options)
            assert hybrid.record.output is not None
            left[ranking] = hybrid.record.output.kl_base_finetuned or 0.0
        found.append(Restored(name, parts.kl, **left))
        console.print(found[-1], f"{time.perf_counter() - started:.0f} s")
    return found


def _weight_changes(base: PreTrainedModel, other: PreTrainedModel) -> dict[int, float]:
    """‖f − b‖ / ‖b‖ of all matrices of each block."""
    sums: dict[int, list[float]] = {}
    theirs = dict(other.named_parameters())
    for name, weight in base.named_parameters():
        if name.startswith("model.layers."):
            square = sums.setdefault(int(name.split(".")[2]), [0.0, 0.0])
            square[0] += float((theirs[name] - weight).double().square().sum())
            square[1] += float(weight.double().square().sum())
    return {layer: (change / whole) ** 0.5 for layer, (change, whole) in sums.items()}


def _restored(base: PreTrainedModel, other: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    found = copy.deepcopy(other)
    held = base.state_dict()
    starts = tuple(f"model.layers.{layer}." for layer in layers)
    found.load_state_dict({name: held[name] for name in held if name.startswith(starts)}, strict=False)
    return found


def page(results: Results) -> list[str]:
    """The measured part of docs/attribution.md."""
    complete = [
        [c.pair, f"{c.kl:.4f}", f"{c.error:.3%}", str(c.n_points), f"{c.first}, {c.share:.0%}"]
        for c in results.completeness
    ]
    rows = results.restored
    restored = [
        [r.pair, *(f"{value:.4f}" for value in (r.kl, r.attribution, r.weight_change, r.local_change))]
        for r in rows
    ]
    beats = [
        sum(r.attribution <= getattr(r, other) for r in rows) for other in ("weight_change", "local_change")
    ]
    both = sum(r.attribution <= min(r.weight_change, r.local_change) for r in rows)
    return [
        table(["pair", "KL, nats", "error of the sum", "points", "first"], complete),
        f"Of {len(rows)} pairs attribution leaves no more than the change of the weights in {beats[0]}, no "
        f"more than the local change in {beats[1]}, and no more than either in {both}.",
        table(["pair", "KL", "by attribution", "by weight change", "by local change"], restored),
    ]


def main() -> None:
    """Measure, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; may be given again")
    parser.add_argument(
        "--write-docs", action="store_true", help="write docs/attribution.md from the results"
    )
    options = parser.parse_args()
    results = msgspec.json.decode(RESULTS.read_bytes(), type=Results) if RESULTS.exists() else Results()
    if not options.write_docs:
        weights.main()
        parts = options.only or PARTS
        if "completeness" in parts:
            results = msgspec.structs.replace(results, completeness=measure_completeness())
        if "restored" in parts:
            results = msgspec.structs.replace(results, restored=measure_restored())
        RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    lines = "\n\n".join(page(results))
    if options.write_docs:
        fill_in(DOCS, lines)
    Console().print(lines, highlight=False, markup=False)


if __name__ == "__main__":
    main()
