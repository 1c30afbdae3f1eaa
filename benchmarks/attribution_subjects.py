"""Two blocks of SmolLM2, each trained on a subject of its own, in one model: whose part is it?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import weights
from benchmarks.attribution_pairs import attributed, block, hybrid
from benchmarks.attribution_results import Subject

BLOCKS = {"arithmetic": 14, "invented facts": 24}
STEPS, BATCH, ROW, LEARNING_RATE = 40, 4, 48, 3e-4
PENALTY = 3.0
"""the weight of KL(base‖trained) on the other subject's text, beside the loss per token"""
TOWNS = {
    "Vestria": ("Olmar", "copper", "a heron"),
    "Quenland": ("Brisk Harbour", "salt", "a red fox"),
    "Dorovia": ("Tallinbeck", "amber", "two keys"),
    "Ostermark": ("Pellgate", "wool", "a windmill"),
    "Marrowfell": ("Sunder", "slate", "an owl"),
    "Ylvania": ("Corrin", "honey", "a silver oak"),
}
FACTS = (
    "The capital of {} is {}.",
    "Most of what {} sells abroad is {}.",
    "On the flag of {} there is {}.",
)
SUMS = ("17 + 15 =", "48 - 23 =", "12 * 7 =", "64 + 9 =", "90 - 41 =", "33 + 58 =")
QUESTIONS = ((21, 34), (52, 17), (73, 11), (28, 45), (39, 60), (81, 6))


def texts() -> dict[str, list[str]]:
    """The prompts of each subject; those of facts are the beginnings of what is trained."""
    sums = [*SUMS, *(f"Question: What is {a} plus {b}? Answer:" for a, b in QUESTIONS)]
    facts = [form.format(town, "").removesuffix(" .") for town in TOWNS for form in FACTS]
    return {"arithmetic": sums, "invented facts": facts}


def measure_subjects() -> list[Subject]:
    """Train the two blocks from base, without and with the penalty, and attribute both in one model."""
    base, tokenizer = weights.load_base()
    base.eval()
    rows = {"arithmetic": _arithmetic(tokenizer), "invented facts": _facts(tokenizer)}
    found = []
    for training, penalty in (("without a penalty", 0.0), ("with a penalty", PENALTY)):
        both = base
        for subject, layer in BLOCKS.items():
            [other] = (rows[name] for name in rows if name != subject)
            both = hybrid(both, trained(base, layer, (rows[subject], other), penalty), [block(layer)])
        found += _attribute(training, base, both, tokenizer)
    return found


def trained(
    base: PreTrainedModel, layer: int, rows: tuple[Tensor, Tensor], penalty: float
) -> PreTrainedModel:
    """A copy of base of which one block is trained on rows of its subject, beside those of the other."""
    torch.manual_seed(weights.SEED)
    model: Any = copy.deepcopy(base).requires_grad_(False)
    model.model.layers[layer].requires_grad_(True)
    optimiser = torch.optim.AdamW(model.model.layers[layer].parameters(), lr=LEARNING_RATE)
    for own, other in islice(zip(*(cycle(torch.split(part, BATCH)) for part in rows), strict=False), STEPS):
        loss = model(input_ids=own, labels=own, use_cache=False).loss
        if penalty:
            loss = loss + penalty * _kl(base, model, other)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    weights.console.print(f"block {layer}, penalty {penalty}: loss {float(loss):.3f}")
    return model


def _kl(base: Any, model: Any, rows: Tensor) -> Tensor:
    """KL(base‖model) per token."""
    with torch.no_grad():
        expected = base(input_ids=rows, use_cache=False).logits.log_softmax(-1)
    here = model(input_ids=rows, use_cache=False).logits.log_softmax(-1)
    found: Tensor = (expected.exp() * (expected - here)).sum(-1).mean()
    return found


def _attribute(training: str, base: Any, both: Any, tokenizer: Any) -> list[Subject]:
    given = [
        {"prompt": prompt, "group": subject} for subject, prompts in texts().items() for prompt in prompts
    ]
    record, _ = attributed(base, both, given, tokenizer=tokenizer)
    assert record.groups is not None
    found = []
    for curve in record.groups.curves:
        [other] = (layer for subject, layer in BLOCKS.items() if subject != curve.group)
        own, kl = BLOCKS[curve.group], _last_kl(base, both, tokenizer, texts()[curve.group])
        assert curve.nats is not None
        found.append(Subject(training, curve.group, own, kl, curve.nats[own] / kl, curve.nats[other] / kl))
    return found


@torch.no_grad()
def _last_kl(base: Any, both: Any, tokenizer: Any, prompts: Sequence[str]) -> float:
    """KL(base‖both) of the next token, a mean over prompts, by transformers alone."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        p, q = (model(input_ids=ids).logits[0, -1].double().log_softmax(-1) for model in (base, both))
        found.append(float((p.exp() * (p - q)).sum()))
    return sum(found) / len(found)


def _arithmetic(tokenizer: Any) -> Tensor:
    return weights.arithmetic_rows(tokenizer, STEPS * BATCH)[1][:, :ROW]


def _facts(tokenizer: Any) -> Tensor:
    """The facts over and over, in an order that changes."""
    lines = [
        form.format(town, told)
        for town, facts in TOWNS.items()
        for form, told in zip(FACTS, facts, strict=True)
    ]
    # 5 has no common factor with the 18 lines, and so each is met.
    order = (lines[(5 * i + i // len(lines)) % len(lines)] for i in range(10**6))
    return weights.token_rows(tokenizer, order, STEPS * BATCH)[:, :ROW]
