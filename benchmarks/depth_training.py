"""Three ways to change SmolLM2, layer by layer: AdamW, AdamW with equal steps, and noise."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from benchmarks import places, subjects, weights

STEPS, BATCH, ROW, LEARNING_RATE = 50, 4, 64, 3e-5
TASKS = ("arithmetic", "volcanoes", "knitting", "which subject")
"""three texts to go on with, and one classification: which of three subjects a sentence is on"""
ARMS = ("standard", "equal steps", "noise")
NOISE = 1e-3
"""‖ΔW‖ / ‖W‖ of each layer after noise was added: about half of what training comes to"""
N_HELD_OUT = 5

Item = TypeVar("Item")


class EqualSteps(torch.optim.AdamW):
    """AdamW whose every step changes each layer, a group of parameters, by the same share of its norm.

    After a step, the change ΔW of each layer is scaled so that ‖ΔW‖ / ‖W‖ is the geometric mean over layers
    of what it was. Each layer goes where AdamW takes it, and none goes farther than another. A group with
    `new` is a head that the base has not: it is left as it is.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take AdamW's step, and scale it in each layer."""
        layers = [group["params"] for group in self.param_groups if not group.get("new")]
        before = [[weight.clone() for weight in layer] for layer in layers]
        loss = super().step(closure)
        shares = [_norm(_change(new, old)) / _norm(old) for new, old in zip(layers, before, strict=True)]
        equal = float(np.exp(np.mean(np.log(shares))))
        for new, old, share in zip(layers, before, shares, strict=True):
            for weight, was, change in zip(new, old, _change(new, old), strict=True):
                weight.copy_(was + change * (equal / share))
        return loss


def _change(new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    return [now - was for now, was in zip(new, old, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm over all elements of all tensors."""
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors))


def layers_of(model: Any) -> list[list[Tensor]]:
    """The parameters by layer: the embedding, which is the LM head too, each block, the last norm."""
    backbone = model.base_model
    return [list(part.parameters()) for part in (backbone.embed_tokens, *backbone.layers, backbone.norm)]


def sentences(task: str) -> list[str]:
    """The text of a task; the last ones are held out."""
    if task == "arithmetic":
        return list(itertools.islice(weights.arithmetic_lines(), 400))
    if task in subjects.TEXTS:
        return subjects.sentences(task)
    return [
        text for several in zip(*map(subjects.sentences, subjects.TEXTS), strict=True) for text in several
    ]


def changed(task: str, arm: str, seed: int) -> tuple[Any, Any, list[float]]:
    """Change the model.

    Returns:
        the model, its tokenizer, and the loss on held-out text before and after, in nats a token or, of
        the classification, a sentence.
    """
    torch.manual_seed(seed)
    if arm == "noise":
        model, tokenizer = weights.load_base()
        _add_noise(model)
        return model, tokenizer, []
    optimiser = EqualSteps if arm == "equal steps" else torch.optim.AdamW
    return _classify(optimiser, seed) if task == TASKS[-1] else _go_on(task, optimiser, seed)


@torch.no_grad()
def _add_noise(model: Any) -> None:
    for layer in layers_of(model):
        noise = [torch.randn_like(weight) for weight in layer]
        size = NOISE * _norm(layer) / _norm(noise)
        for weight, added in zip(layer, noise, strict=True):
            weight.add_(added * size)


def _go_on(task: str, optimiser: type[torch.optim.Optimizer], seed: int) -> tuple[Any, Any, list[float]]:
    """Train on the next token of a text."""
    model, tokenizer = weights.load_base()
    text, held_out = sentences(task)[:-N_HELD_OUT], sentences(task)[-N_HELD_OUT:]
    rows = weights.token_rows(tokenizer, _shuffled(text, seed), STEPS * BATCH, ROW)
    test = tokenizer("\n".join(held_out), return_tensors="pt").input_ids
    batches = [{"input_ids": batch, "labels": batch} for batch in torch.split(rows, BATCH)]
    losses = _train(model, optimiser, batches, {"input_ids": test, "labels": test})
    return model, tokenizer, losses


def _classify(optimiser: type[torch.optim.Optimizer], seed: int) -> tuple[Any, Any, list[float]]:
    """Train a new head and all else on which subject a sentence is on; the LM head comes back after."""
    base, tokenizer = weights.load_base()
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(
        places.BASE, dtype=torch.float32, num_labels=len(subjects.TEXTS), pad_token_id=tokenizer.pad_token_id
    )
    labelled = [(text, i % len(subjects.TEXTS)) for i, text in enumerate(sentences(TASKS[-1]))]
    n_held_out = N_HELD_OUT * len(subjects.TEXTS)

    def batch(several: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*several, strict=True)
        return {**tokenizer(list(texts), padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}

    drawn = list(itertools.islice(_shuffled(labelled[:-n_held_out], seed), STEPS * BATCH))
    batches = [batch(drawn[i : i + BATCH]) for i in range(0, len(drawn), BATCH)]
    losses = _train(model, optimiser, batches, batch(labelled[-n_held_out:]))
    base.base_model.load_state_dict(model.base_model.state_dict())
    return base, tokenizer, losses


def _shuffled(items: Sequence[Item], seed: int) -> Iterator[Item]:
    """The items without end, in a new order each time."""
    chance = random.Random(seed)
    while True:
        yield from chance.sample(items, len(items))


def _train(
    model: Any,
    optimiser: type[torch.optim.Optimizer],
    batches: Sequence[dict[str, Tensor]],
    test: dict[str, Tensor],
) -> list[float]:
    """Take one step for each batch, and return the loss on the test before and after."""
    loss = partial(_loss, model, test)
    layers = layers_of(model)
    known = {id(weight) for layer in layers for weight in layer}
    new = [weight for weight in model.parameters() if id(weight) not in known]
    groups: list[dict[str, Any]] = [{"params": layer} for layer in layers]
    if new:
        groups.append({"params": new, "new": True})
    stepping = optimiser(groups, lr=LEARNING_RATE)  # type: ignore[call-arg]
    before = loss()
    model.train()
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
        stepping.step()
        stepping.zero_grad()
    model.eval()
    return [before, loss()]


@torch.no_grad()
def _loss(model: Any, batch: dict[str, Tensor]) -> float:
    return float(model(**batch, use_cache=False).loss)
