"""Attribution held against what is known otherwise: all hybrids, one block alone, an adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import comb
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import pearsonr, spearmanr
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks import places, weights
from benchmarks.attribution_pairs import attributed, block, hybrid, load, prompts
from benchmarks.attribution_results import Agreement, Alone, Complete, Shapley
from lazarus.demo import BASE as DEMO_BASE
from lazarus.demo import FINETUNED as DEMO_FINETUNED
from lazarus.demo import PROMPTS as DEMO_PROMPTS
from lazarus.results import Attribution

ALONE = (7, 15, 23)
TENSOR = "model.layers.15.mlp.down_proj.weight"
ADAPTER_STEPS, ADAPTER_RATE = 30, 1e-3
ENDS = {"embedding and head": ("model.embed_tokens.", "lm_head."), "final_norm": ("model.norm.",)}

Hybrid = frozenset[str]


# --- all hybrids ------------------------------------------------------------------------------------


def measure_shapley() -> Shapley:
    """Hold the parts of the demo pair against the exact Shapley values of its ten groups."""
    base, other = load(DEMO_BASE), load(DEMO_FINETUNED)
    record, found = attributed(str(DEMO_BASE), str(DEMO_FINETUNED), DEMO_PROMPTS)
    parts = {group.name: group.nats for group in found.groups}
    exact = shapley(dict(_hybrids(base, other, list(parts))))
    layers = {group.name: group.layer for group in found.groups if group.layer is not None}
    divergence, changes = record.results.column("divergence").mean(0), weight_changes(base, other)
    numbers = {
        "attribution": parts,
        "divergence of the states": {name: float(divergence[layer]) for name, layer in layers.items()},
        "relative change of the weights": {name: changes[layer] for name, layer in layers.items()},
    }
    agreements = [_agreement(name, values, exact, list(layers)) for name, values in numbers.items()]
    return Shapley("demo pair", sum(exact.values()), exact, agreements)


def shapley(kl: Mapping[Hybrid, float]) -> dict[str, float]:
    """The mean gain of each group over all sets of the others, from the KL of every set."""
    names = max(kl, key=len)
    n = len(names)
    return {
        name: sum(
            (kl[chosen | {name}] - kl[chosen]) / comb(n - 1, len(chosen)) / n
            for chosen in kl
            if name not in chosen
        )
        for name in names
    }


def _hybrids(
    base: PreTrainedModel, other: PreTrainedModel, names: Sequence[str]
) -> Iterator[tuple[Hybrid, float]]:
    """Every set of groups, and KL(base‖hybrid) with it from the other model, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    rows = [json.loads(line)["prompt"] for line in DEMO_PROMPTS.read_text(encoding="utf-8").splitlines()]
    batch = tokenizer(rows, padding=True, padding_side="right", return_tensors="pt")
    expected = _last_log_p(base, batch)
    for size in range(len(names) + 1):
        for chosen in combinations(names, size):
            starts = [start for name in chosen for start in _starts(name)]
            here = _last_log_p(hybrid(base, other, starts) if starts else base, batch)
            yield frozenset(chosen), float((expected.exp() * (expected - here)).sum(-1).mean())


def _starts(name: str) -> tuple[str, ...]:
    return ENDS.get(name) or (block(int(name.removeprefix("block "))),)


@torch.no_grad()
def _last_log_p(model: PreTrainedModel, batch: Any) -> Tensor:
    """Log-probabilities of the next token after each row's last token, in float64."""
    last = batch["attention_mask"].sum(1) - 1
    found: Tensor = model(**batch).logits[torch.arange(len(last)), last].double().log_softmax(-1)
    return found


def weight_changes(base: PreTrainedModel, other: PreTrainedModel) -> dict[int, float]:
    """‖f − b‖ / ‖b‖ of all matrices of each block."""
    sums: dict[int, list[float]] = {}
    theirs = dict(other.named_parameters())
    for name, weight in base.named_parameters():
        if name.startswith("model.layers."):
            square = sums.setdefault(int(name.split(".")[2]), [0.0, 0.0])
            square[0] += float((theirs[name] - weight).double().square().sum())
            square[1] += float(weight.double().square().sum())
    return {layer: (change / whole) ** 0.5 for layer, (change, whole) in sums.items()}


def _agreement(
    number: str, values: Mapping[str, float], exact: Mapping[str, float], blocks: Sequence[str]
) -> Agreement:
    def both(names: Sequence[str]) -> tuple[list[float], list[float]]:
        return [values[name] for name in names], [exact[name] for name in names]

    return Agreement(
        number,
        float(pearsonr(*both(list(exact))).statistic) if len(values) == len(exact) else None,
        float(pearsonr(*both(blocks)).statistic),
        float(spearmanr(*both(blocks)).statistic),
    )


# --- one block alone --------------------------------------------------------------------------------


def measure_alone() -> list[Alone]:
    """Put one block of the fine-tune, and then one of its tensors, into base."""
    base, finetuned = load(places.BASE), load(places.finetuned())
    cases = {f"block {layer}": block(layer) for layer in ALONE} | {f"`{TENSOR}`": TENSOR}
    found = []
    for name, start in cases.items():
        how = "tensors" if start == TENSOR else "blocks"
        record, parts = attributed(
            base, hybrid(base, finetuned, [start]), prompts(), tokenizer=str(places.BASE), attribute=how
        )
        [group] = parts.groups
        others = record.results.column("nats").mean(0)
        others[group.layer or 0] = 0.0
        found.append(
            Alone(
                name,
                parts.kl,
                group.share or 0.0,
                float(abs(others).max()),
                parts.completeness_error,
                parts.n_points,
            )
        )
    return found


# --- an adapter -------------------------------------------------------------------------------------


def measure_adapter() -> list[Complete]:
    """Train an adapter on lines of arithmetic, and attribute what it does over base."""
    torch.manual_seed(weights.SEED)
    model, tokenizer = weights.load_base()
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    held_out, training = weights.arithmetic_rows(tokenizer, ADAPTER_STEPS * weights.BATCH)
    weights.finetune(adapted, training, held_out, ADAPTER_RATE)
    with TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        _, parts = attributed(str(places.BASE), f"{places.BASE}+{Path(folder)}", prompts())
    return [complete("SmolLM2 and an adapter", parts)]


def complete(pair: str, parts: Attribution) -> Complete:
    """What is told of the sum of the parts."""
    first = max(parts.groups, key=lambda group: group.nats)
    return Complete(pair, parts.kl, parts.completeness_error, parts.n_points, first.name, first.share or 0.0)
