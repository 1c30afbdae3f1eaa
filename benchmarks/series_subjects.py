"""Runs of training for `benchmarks.series`: small fine-tunes of the demo's base, seconds each."""

from __future__ import annotations

import ast
import math
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaForCausalLM

from lazarus.demo import BASE
from lazarus.demo import train as demo

TOPICS = ("arithmetic", "prose", "capitals", "reversed", "lists", "code")
ROW_TOKENS = 48
PROMPTS_OF_TOPIC = 4
FEWEST_BEFORE, FEWEST_AFTER = 4, 4
"""checkpoints on either side of a switch, besides the one at which it is"""


@dataclass(frozen=True)
class Recipe:
    """One run of training."""

    seed: int
    topics: tuple[str, ...]
    steps: tuple[int, ...]
    """at which a checkpoint is kept"""
    learning_rate: float = 3e-4
    schedule: str = "constant"
    n_rows: int = 8
    optimizer: str = "adamw"
    dtype: str = "float32"
    """in which checkpoints are kept"""
    n_frozen: int = 0
    """how many first blocks, and the embedding, are not trained"""
    switch: int | None = None
    """the checkpoint after which the training data are others"""
    topics_after: tuple[str, ...] = ()


def draw(seed: int, *, switched: bool = False) -> Recipe:
    """Return a recipe at random."""
    chance = random.Random(f"{seed} {switched}")
    n_checkpoints = chance.choice((12, 16) if switched else (8, 10, 12, 16))
    spacing = chance.choice((5, 10) if switched else (3, 5, 10))
    steps = tuple(spacing * (i + 1) for i in range(n_checkpoints))
    if not switched and chance.random() < 0.2:
        steps = tuple(sorted({math.ceil(1.35**i) for i in range(1, n_checkpoints + 1)}))
    topics = tuple(chance.sample(TOPICS, chance.choice((1, 1, 2, 3))))
    recipe = Recipe(
        seed=seed,
        topics=topics,
        steps=steps,
        learning_rate=chance.choice((1e-4, 3e-4, 1e-3)),
        schedule=chance.choice(("constant", "cosine", "warmup")),
        n_rows=chance.choice((4, 8) if switched else (2, 4, 8)),
        optimizer=chance.choice(("adamw", "adamw", "adamw", "sgd")),
        dtype=chance.choice(("float32", "bfloat16")),
        n_frozen=chance.choice((0, 0, 0, 2)),
    )
    if not switched:
        return recipe
    others = [topic for topic in TOPICS if topic not in topics]
    return replace(
        recipe,
        switch=chance.randrange(FEWEST_BEFORE, n_checkpoints - FEWEST_AFTER),
        topics_after=tuple(chance.sample(others, chance.choice((1, 1, 2)))),
    )


def train(recipe: Recipe) -> Iterator[LlamaForCausalLM]:
    """Train by a recipe, and yield the model at each checkpoint as it would be read back."""
    torch.manual_seed(recipe.seed)
    model = demo.load(BASE)
    for name, parameter in model.named_parameters():
        layer = name.split(".layers.")[-1].split(".")[0]
        is_first = "embed" in name or (layer.isdecimal() and int(layer) < recipe.n_frozen)
        parameter.requires_grad_(not (recipe.n_frozen and is_first))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(recipe, trained)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, _factor(recipe))
    switch_at = None if recipe.switch is None else recipe.steps[recipe.switch]
    source = _batches(recipe.topics, recipe)
    for step in range(1, recipe.steps[-1] + 1):
        batch = next(source)
        model.train()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step in recipe.steps:
            yield as_stored(model, recipe.dtype)
        if step == switch_at:
            source = _batches(recipe.topics_after, recipe)


def as_stored(model: LlamaForCausalLM, dtype: str) -> LlamaForCausalLM:
    """Return a copy of a model with the weights that a checkpoint of this type would have."""
    copy = LlamaForCausalLM(model.config)
    kept = getattr(torch, dtype)
    copy.load_state_dict({name: value.to(kept).float() for name, value in model.state_dict().items()})
    return copy


@torch.no_grad()
def states(model: LlamaForCausalLM) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the last token's states of the prompts, [sites, prompts, hidden], and log-probabilities."""
    model.train(mode=False)
    found, outputs = [], []
    for ids in _prompt_ids():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        found.append(torch.stack([state[0, -1] for state in out.hidden_states]))
        outputs.append(out.logits[0, -1].log_softmax(-1))
    return torch.stack(found, 1).numpy(), torch.stack(outputs).numpy()


@cache
def prompts() -> list[tuple[str, str]]:
    """Return the prompts with their topics: the beginnings of texts that no run is trained on."""
    found = []
    for topic in TOPICS:
        for text in _texts(topic)[-PROMPTS_OF_TOPIC:]:
            found.append((topic, text[: max(12, len(text) // 3)][:60]))
    return found


@cache
def _prompt_ids() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return [tokenizer(text).input_ids for _, text in prompts()]


def _optimizer(recipe: Recipe, trained: Sequence[Any]) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(trained, 100 * recipe.learning_rate, momentum=0.9)
    return torch.optim.AdamW(trained, recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def _factor(recipe: Recipe) -> Callable[[int], float]:
    last = recipe.steps[-1]

    def factor(step: int) -> float:
        if recipe.schedule == "constant":
            return 1.0
        if recipe.schedule == "warmup" and step < last // 10:
            return (step + 1) / (last // 10)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / last))

    return factor


def _batches(topics: Sequence[str], recipe: Recipe) -> Iterator[torch.Tensor]:
    chance = random.Random(f"{recipe.seed} {topics}")
    rows = [topic_rows(topic) for topic in topics]
    while True:
        yield torch.tensor([chance.choice(chance.choice(rows)) for _ in range(recipe.n_rows)])


@cache
def topic_rows(topic: str) -> list[list[int]]:
    """Return the texts of a topic as rows of tokens, all of one length."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids: list[int] = []
    for text in _texts(topic)[:-PROMPTS_OF_TOPIC]:
        ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    return [ids[i : i + ROW_TOKENS] for i in range(0, len(ids) - ROW_TOKENS, ROW_TOKENS)]


def _texts(topic: str) -> list[str]:
    chance = random.Random(topic)
    if topic == "arithmetic":
        lines = demo.arithmetic_split()[0]
        return chance.sample(lines, len(lines))
    if topic == "code":
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
        return [part for path in paths for part in _functions(path.read_text(encoding="utf-8"))]
    prose = _prose()[TOPICS.index(topic) :: 2][:1500]
    match topic:
        case "capitals":
            return [text.upper() for text in prose]
        case "reversed":
            return [" ".join(reversed(text.split())) for text in prose]
        case "lists":
            return [" ".join(f"{i}. {word}" for i, word in enumerate(text.split(), 1)) for text in prose]
    return prose


@cache
def _prose() -> list[str]:
    return demo.prose_split()[0]


def _functions(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            yield ast.unparse(node)
