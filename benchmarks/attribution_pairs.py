"""The pairs of `python -m benchmarks.attribution`: roundings, fine-tunes and hybrids of SmolLM2."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import lazarus
from benchmarks import places
from benchmarks.quantised import Method, quantise
from lazarus.results import ActivationDiffRecord, Attribution

N_PROMPTS, N_PAIRS = 12, 20


def prompts(count: int = N_PROMPTS) -> list[str]:
    """The first prompts of the benchmark."""
    return places.PROMPTS.read_text(encoding="utf-8").splitlines()[:count]


def load(folder: Path) -> PreTrainedModel:
    """A model in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def attributed(base: Any, other: Any, texts: Any, **options: Any) -> tuple[ActivationDiffRecord, Attribution]:
    """The record of a run in float32 with an attribution to blocks, and the attribution."""
    options = {"attribute": "blocks", "no_noise_floor": True, "dtype": "float32", **options}
    record = lazarus.activation_diff(base, other, texts, **options).record
    assert record.attribution is not None
    return record, record.attribution


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


def hybrid(model: PreTrainedModel, other: PreTrainedModel, starts: Sequence[str]) -> PreTrainedModel:
    """A copy of a model whose parameters with these starts of their names are the other's."""
    found = copy.deepcopy(model)
    theirs = other.state_dict()
    found.load_state_dict(
        {name: theirs[name] for name in theirs if name.startswith(tuple(starts))}, strict=False
    )
    return found


def block(layer: int) -> str:
    """The start of the names of a block's parameters."""
    return f"model.layers.{layer}."
