"""Attribution held against experiments: `python -m benchmarks.attribution [--only PART]`.

cost           seconds in passes of base, and memory
completeness   how far the parts are from the divergence that they should add up to, and the points it took
adapter        the same of an adapter over SmolLM2
alone          SmolLM2 with one block, or one tensor, of its fine-tune: it should have all of the divergence
shapley        the exact Shapley values of the demo pair, from all hybrids of its groups
subjects       two blocks that are trained on two subjects: which block is blamed on the prompts of each
restored       the divergence that is left where three blocks are set back to base: the three that attribution
               names, those with the largest change of their weights, and those with the largest local change
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel

import lazarus
from benchmarks import places, weights
from benchmarks.attribution_cost import measure_cost
from benchmarks.attribution_oracles import (
    complete,
    measure_adapter,
    measure_alone,
    measure_shapley,
    weight_changes,
)
from benchmarks.attribution_pairs import attributed, block, hybrid, load, pairs, prompts, rounded, uniform
from benchmarks.attribution_results import Complete, Restored, Results, page
from benchmarks.attribution_subjects import measure_subjects
from benchmarks.trust_report import fill_in
from lazarus.demo import BASE as DEMO_BASE
from lazarus.demo import FINETUNED as DEMO_FINETUNED

N_RESTORED = 3
RESULTS = places.ROOT / "benchmarks" / "results" / "attribution.json"
DOCS = places.ROOT / "docs" / "attribution.md"
console = Console(stderr=True)


def measure_completeness() -> list[Complete]:
    """Attribute the demo pair, the fine-tune of SmolLM2, and roundings."""
    base = load(places.BASE)
    cases: list[tuple[str, Any, Any, Path | None]] = [
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
        _, parts = attributed(one, other, prompts(), tokenizer=tokenizer and str(tokenizer))
        found.append(complete(name, parts))
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
            "weight_change": weight_changes(base, other),
            "local_change": {each.layer: each.local.relative_l2 or 0.0 for each in diff.layers if each.local},
        }
        left = {}
        for ranking, values in rankings.items():
            chosen = sorted(values, key=lambda layer: -values[layer])[:N_RESTORED]
            left[ranking] = _left(base, other, chosen, options)
        found.append(Restored(name, parts.kl, **left))
        console.print(found[-1], f"{time.perf_counter() - started:.0f} s")
    return found


def _left(
    base: PreTrainedModel, other: PreTrainedModel, layers: Sequence[int], options: dict[str, Any]
) -> float:
    """KL(base‖other) with these blocks of the other set back to base."""
    restored = hybrid(other, base, [block(layer) for layer in layers])
    output = lazarus.activation_diff(base, restored, prompts(), **options).record.output
    assert output is not None
    return output.kl_base_finetuned or 0.0


PARTS: dict[str, Callable[[], object]] = {
    "cost": measure_cost,  # before the process is large, because its children inherit its peak of memory
    "completeness": measure_completeness,
    "adapter": measure_adapter,
    "alone": measure_alone,
    "shapley": measure_shapley,
    "subjects": measure_subjects,
    "restored": measure_restored,
}


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
        for part in options.only or PARTS:
            found: Any = {part: PARTS[part]()}
            results = msgspec.structs.replace(results, **found)
            RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    lines = "\n\n".join(page(results))
    if options.write_docs:
        fill_in(DOCS, lines)
    Console().print(lines, highlight=False, markup=False)


if __name__ == "__main__":
    main()
