"""Models of which it is known where they part from SmolLM2-135M-Instruct, the base.

Run as `python -m benchmarks.pairs [NAME…]`; without names, all are made. Each is made once and kept in
benchmarks/cache, in the folder that `places.pair_folder(NAME)` gives:

block-7, -15, -23   only this block's MLP is trained, on arithmetic
last-two            only the last two blocks are trained, on arithmetic
lora-15-29          a PEFT adapter of the layers from 15 on, trained on arithmetic
lora-15-29-merged   the base with this adapter merged, in float32
lora-zero           an adapter of the same layers that is not trained: it changes nothing
narrow-mixed        the 40 steps of smollm2-arithmetic, but every other row is English prose
head                only the rows of lm_head for the ten digits, times 1.05; the embedding is the base's
norm                only the weight of block 12's input_layernorm, times 1.02

Where only some tensors may differ from the base's file, this is checked bit by bit before a folder
gets its name.
"""

import random
import string
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.places import BASE, STEPS, pair_folder
from benchmarks.results import Finetuning
from benchmarks.weights import (
    BATCH,
    HELD_OUT,
    SEED,
    arithmetic_rows,
    console,
    finetune,
    load_base,
    loss,
    make_base,
    make_once,
    save,
    token_rows,
)
from lazarus.demo.train import prose_split

BLOCKS = (7, 15, 23)
LAST_TWO = (28, 29)
PART_STEPS = 12
BLOCK_LEARNING_RATE = 3e-4
ADAPTER = "lora-15-29"
ADAPTER_LAYERS = range(15, 30)
ADAPTER_MODULES = {"q_proj": "self_attn", "v_proj": "self_attn", "up_proj": "mlp", "down_proj": "mlp"}
ADAPTER_LEARNING_RATE = 1e-3
HEAD_FACTOR = 1.05
NORM_BLOCK = 12
NORM_FACTOR = 1.02

WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"


class MixedFinetuning(Finetuning, frozen=True):
    """The plain losses are of arithmetic, these of prose."""

    prose_loss_before: float
    prose_loss_after: float


# --- trained ------------------------------------------------------------------------------------


def make_block(folder: Path, block: int) -> None:
    """Train one block's MLP and nothing else."""
    torch.manual_seed(SEED)
    model, tokenizer = load_base()
    model.requires_grad_(False)
    model.model.layers[block].mlp.requires_grad_(True)
    facts = _finetune_part(model, tokenizer, BLOCK_LEARNING_RATE)
    save(model.to(torch.bfloat16), tokenizer, folder, facts)
    prefix = f"model.layers.{block}.mlp"
    check_changes(folder, {f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down")})


def _finetune_part(model: Any, tokenizer: Any, learning_rate: float) -> Finetuning:
    held_out, training = arithmetic_rows(tokenizer, PART_STEPS * BATCH)
    return finetune(model, training, held_out, learning_rate)


def make_last_two(folder: Path) -> None:
    """Train the last two blocks and nothing else."""
    torch.manual_seed(SEED)
    model, tokenizer = load_base()
    model.requires_grad_(False)
    model.model.layers[-2:].requires_grad_(True)
    facts = _finetune_part(model, tokenizer, BLOCK_LEARNING_RATE)
    save(model.to(torch.bfloat16), tokenizer, folder, facts)
    prefixes = tuple(f"model.layers.{block}." for block in LAST_TWO)
    check_changes(folder, {name for name in load_file(folder / WEIGHTS) if name.startswith(prefixes)})


def make_adapter(folder: Path) -> None:
    """Train an adapter of the layers from 15 on."""
    model, tokenizer = _with_new_adapter()
    facts = _finetune_part(model, tokenizer, ADAPTER_LEARNING_RATE)
    save(model, tokenizer, folder, facts)


def _with_new_adapter() -> tuple[Any, Any]:
    """The base with an adapter whose B is zero."""
    torch.manual_seed(SEED)
    model, tokenizer = load_base()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=list(ADAPTER_MODULES),
        layers_to_transform=list(ADAPTER_LAYERS),
    )
    return get_peft_model(model, config), tokenizer


def make_mixed(folder: Path) -> None:
    """Train as smollm2-arithmetic was, but with every other row of prose."""
    torch.manual_seed(SEED)
    model, tokenizer = load_base()
    n_rows = STEPS * BATCH // 2
    held_out, arithmetic = arithmetic_rows(tokenizer, n_rows)
    held_out_prose, prose = _prose_rows(tokenizer, n_rows)
    training = torch.stack((arithmetic, prose), dim=1).flatten(0, 1)
    prose_before = loss(model, held_out_prose)
    facts = finetune(model, training, held_out)
    prose_after = loss(model, held_out_prose)
    console.print(f"loss on prose {prose_before:.3f} before, {prose_after:.3f} after")
    mixed = MixedFinetuning(
        facts.steps,
        facts.learning_rate,
        facts.loss_before,
        facts.loss_after,
        facts.seconds,
        prose_before,
        prose_after,
    )
    save(model.to(torch.bfloat16), tokenizer, folder, mixed)


def _prose_rows(tokenizer: Any, n_rows: int) -> tuple[Tensor, Tensor]:
    """Rows of the standard library's docstrings: the held-out ones, and those for training."""
    training, held_out = prose_split()
    order = random.Random(SEED)
    order.shuffle(training)
    order.shuffle(held_out)
    return token_rows(tokenizer, held_out, HELD_OUT), token_rows(tokenizer, training, n_rows)


# --- not trained --------------------------------------------------------------------------------


def make_merged(folder: Path) -> None:
    """Merge the trained adapter, in float32, so that the result is true to rounding."""
    make_once(pair_folder(ADAPTER), make_adapter)
    model, tokenizer = load_base()
    merged = PeftModel.from_pretrained(model, pair_folder(ADAPTER)).merge_and_unload()
    save(merged, tokenizer, folder)
    changed = {
        f"model.layers.{layer}.{part}.{module}.weight"
        for layer in ADAPTER_LAYERS
        for module, part in ADAPTER_MODULES.items()
    }
    check_changes(folder, changed, torch.float32)


def make_zero_adapter(folder: Path) -> None:
    """Save an adapter as it is before any training."""
    save(*_with_new_adapter(), folder)


@torch.no_grad()
def make_head(folder: Path) -> None:
    """Part lm_head from the embedding, and scale its rows for the ten digits."""
    model, tokenizer = load_base(torch.bfloat16)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.lm_head.weight[tokenizer.convert_tokens_to_ids(list(string.digits))] *= HEAD_FACTOR
    save(model, tokenizer, folder)
    check_changes(folder, {HEAD})


@torch.no_grad()
def make_norm(folder: Path) -> None:
    """Scale the weight of one norm."""
    model, tokenizer = load_base(torch.bfloat16)
    model.model.layers[NORM_BLOCK].input_layernorm.weight *= NORM_FACTOR
    save(model, tokenizer, folder)
    check_changes(folder, {f"model.layers.{NORM_BLOCK}.input_layernorm.weight"})


# --- all ----------------------------------------------------------------------------------------


def check_changes(folder: Path, expected: set[str], dtype: torch.dtype = torch.bfloat16) -> None:
    """Stop unless exactly these tensors differ from the base's; the others are the same in every bit."""
    base, other = load_file(BASE / WEIGHTS), load_file(folder / WEIGHTS)
    names = base.keys() | other.keys()
    changed = {name for name in names if not _same_bits(base.get(name), other.get(name), dtype)}
    if changed != expected or not base.keys() <= other.keys():
        wrong = ", ".join(sorted(changed ^ expected))
        raise SystemExit(f"{folder}: these tensors should differ from the base's and don't, or do: {wrong}")
    console.print(f"{len(changed)} of {len(other)} tensors differ from the base's")


def _same_bits(base: Tensor | None, other: Tensor | None, dtype: torch.dtype) -> bool:
    if base is None or other is None or other.dtype != dtype:
        return False
    return torch.equal(base.to(dtype).view(torch.uint8), other.view(torch.uint8))


PAIRS: dict[str, Callable[[Path], None]] = {
    **{f"block-{block}": partial(make_block, block=block) for block in BLOCKS},
    "last-two": make_last_two,
    ADAPTER: make_adapter,
    f"{ADAPTER}-merged": make_merged,
    "lora-zero": make_zero_adapter,
    "narrow-mixed": make_mixed,
    "head": make_head,
    "norm": make_norm,
}


def main(names: Sequence[str] = ()) -> None:
    """Make those that are named, or all, unless they are in the cache."""
    if unknown := [name for name in names if name not in PAIRS]:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(PAIRS)}")
    make_once(BASE, make_base)
    for name in names or PAIRS:
        make_once(pair_folder(name), PAIRS[name])


if __name__ == "__main__":
    main(sys.argv[1:])
