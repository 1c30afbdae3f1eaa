"""Faults planted into one block of another runtime's run: whether `--localize` names the block.

Run as `python -m benchmarks.planted [TYPE ...]`. SmolLM2 runs in NumPy (tests/numpy_llama.py), with a
fault in one block, and is recorded; then it is compared with the same weights in transformers. A tiny Mixtral
whose experts are swapped in one block runs in transformers. Prints a table, one row a fault.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import lazarus
from benchmarks.places import BASE, CACHE, ROOT
from lazarus import BFloat16Bits, Recording

sys.path.insert(0, str(ROOT / "tests"))
from factories import word_tokenizer
from numpy_llama import Defect, bfloat16_bits, forward, read_model

N_PROMPTS = 6
console = Console()
WINDOW = 8

FAULTS: Mapping[str, list[Defect]] = {
    "plain": [
        Defect("norm_epsilon", 3, 100.0),
        Defect("norm_epsilon", 14, 1000.0),
        Defect("norm_epsilon", 28, 1000.0),
        Defect("rope_base", 1, 0.1),
        Defect("rope_base", 9, 0.1),
        Defect("rope_base", 17, 0.5),
        Defect("rope_base", 26, 0.1),
        Defect("attention_scale", 2, 1.05),
        Defect("attention_scale", 11, 1.05),
        Defect("attention_scale", 20, 1.1),
        Defect("attention_scale", 29, 1.05),
        Defect("mask", 4, 1),
        Defect("mask", 16, 1),
        Defect("mask", 25, 1),
        Defect("int4", 0, matrix="mlp.down_proj"),
        Defect("int4", 6, matrix="mlp.gate_proj"),
        Defect("int4", 13, matrix="self_attn.v_proj"),
        Defect("int4", 21, matrix="self_attn.o_proj"),
        Defect("int4", 27, matrix="mlp.up_proj"),
        Defect("bfloat16_sums", 5, 16),
        Defect("bfloat16_sums", 15, 16),
        Defect("bfloat16_sums", 24, 16),
    ],
    "windowed": [
        Defect("sliding_window", 2, 1),
        Defect("sliding_window", 12, -1),
        Defect("sliding_window", 22, 1),
    ],
    "biased": [
        Defect("missing_bias", 1),
        Defect("missing_bias", 10),
        Defect("missing_bias", 23),
    ],
}
SWAPPED = (1, 3)
"""the blocks of the tiny Mixtral of which two experts are swapped"""


@dataclass(frozen=True)
class Found:
    """One comparison: the planted block, and what was said of every block."""

    model: str
    fault: str
    layer: int | None
    named: int | None
    verdict: str | None
    local: list[float]
    floors: list[float]

    @property
    def is_named(self) -> bool:
        """Return whether the planted block is the one that is named."""
        return self.named == self.layer

    @property
    def excess(self) -> float:
        """How many times its floor the planted block has changed."""
        assert self.layer is not None
        return self.local[self.layer] / self.floors[self.layer]


def main(dtypes: list[str]) -> None:
    """Print every row of each type as it is found, and then how many blocks were named."""
    texts = (ROOT / "benchmarks" / "prompts.txt").read_text(encoding="utf-8").splitlines()[:N_PROMPTS]
    for dtype in dtypes:
        rows = list[Found]()
        for row in chain(numpy_rows(texts, dtype), mixtral_rows(dtype)):
            console.print(told(row), highlight=False, soft_wrap=True)
            rows.append(row)
        planted = [row for row in rows if row.layer is not None]
        visible = [row for row in planted if row.excess >= 2]
        named = sum(row.is_named for row in visible)
        console.print(
            f"{dtype}: {len(planted)} planted, {len(visible)} at least twice the floor, {named} named\n"
        )


def numpy_rows(texts: list[str], dtype: str) -> Iterator[Found]:
    """Record SmolLM2 as NumPy runs it, without a fault and with each, and compare it."""
    for kind, faults in FAULTS.items():
        folder = made(kind)
        config, weights = read_model(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text)["input_ids"] for text in texts]
        for fault in (None, *faults):
            with tempfile.TemporaryDirectory() as place:
                known: dict[str, Any] = {
                    "model": kind,
                    "n_layers": config["num_hidden_layers"],
                    "hidden_size": config["hidden_size"],
                    "run_dtype": dtype,
                    "runtime": "NumPy",
                }
                with Recording.create(Path(place, "r"), **known) as recording:
                    for one, text in zip(ids, texts, strict=True):
                        states = forward(weights, config, one, defect=fault, dtype=dtype)
                        recording.add(one, as_stored(states, dtype), text=text)
                yield compared(folder, Path(place, "r"), kind, fault)


def as_stored(states: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return states in the type in which they were computed."""
    if dtype == "float32":
        return {site: rows.astype(np.float32) for site, rows in states.items()}
    return {site: BFloat16Bits(bfloat16_bits(rows)) for site, rows in states.items()}


def mixtral_rows(dtype: str) -> Iterator[Found]:
    """Record a tiny Mixtral, as it is and with two experts swapped, and compare it."""
    base = tiny_mixtral().to(getattr(torch, dtype))
    texts = [f"t{5 + i} t17 t{80 - i} t3 t21 t{40 + i}" for i in range(N_PROMPTS)]
    for layer in (None, *SWAPPED):
        changed = tiny_mixtral().to(getattr(torch, dtype))
        if layer is not None:
            gate = changed.model.layers[layer].mlp.gate.weight
            with torch.no_grad():
                gate[[0, 1]] = gate[[1, 0]].clone()  # so token for expert 0 goes to expert 1
        with tempfile.TemporaryDirectory() as place:
            lazarus.record(changed, texts, Path(place, "r"), tokenizer=word_tokenizer())
            diff = lazarus.activation_diff(
                base, Path(place, "r"), tokenizer=word_tokenizer(), localize=True, position="all"
            )
            yield row_of(diff, "mixtral", "swapped_experts" if layer is not None else "none", layer)


def compared(folder: Path, recording: Path, kind: str, fault: Defect | None) -> Found:
    """Compare a recording with the model that it is of."""
    diff = lazarus.activation_diff(folder, recording, localize=True, position="all")
    name = "none" if fault is None else f"{fault.fault} {fault.amount:g}"
    return row_of(diff, kind, name, None if fault is None else fault.layer)


def row_of(diff: lazarus.ActivationDiff, kind: str, name: str, layer: int | None) -> Found:
    """Return what a comparison found."""
    local = [each.local for each in diff.layers]
    return Found(
        kind,
        name,
        layer,
        diff.summary.most_changed_block,
        diff.summary.verdict,
        [change.relative_l2 or 0.0 for change in local if change],
        [change.noise_floor or 0.0 for change in local if change],
    )


def told(row: Found) -> str:
    """Return a row of the table: the planted block, what was named, and the largest change of others."""
    at = "" if row.layer is None else f"{row.layer:>3} {row.local[row.layer]:.5f} {row.excess:>9.1f}"
    others = [value for i, value in enumerate(row.local) if i != row.layer]
    ratio = [v / f for i, (v, f) in enumerate(zip(row.local, row.floors, strict=True)) if i != row.layer]
    return (
        f"{row.model:<9}{row.fault:<22}{at:<26} named {row.named!s:<5} {row.verdict!s:<12} "
        f"others {max(others):.5f} = {max(ratio):.1f} floors"
    )


def made(kind: str) -> Path:
    """Return the folder of a model of this kind, made of SmolLM2's weights."""
    if kind == "plain":
        return BASE
    folder: Path = CACHE / f"planted-{kind}"
    if folder.exists():
        return folder
    source = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    settings = source.config.to_dict()
    if kind == "windowed":
        for name in ("attention_bias", "mlp_bias", "pretraining_tp", "architectures", "model_type"):
            settings.pop(name, None)
        model: Any = MistralForCausalLM(MistralConfig(**{**settings, "sliding_window": WINDOW}))
    else:
        model = LlamaForCausalLM(type(source.config)(**{**settings, "attention_bias": True}))
    model = model.to(torch.bfloat16)
    model.load_state_dict(source.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def tiny_mixtral() -> MixtralForCausalLM:
    """Return four blocks of four experts, random."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config).eval()


if __name__ == "__main__":
    main(sys.argv[1:] or ["float32", "bfloat16"])
