"""What the same model gives when what ought not to matter is changed: the noise under every comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lazarus.tokens import TokenBatch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

MOST_PROMPTS = 16
FEW_PROMPTS = 50
"""From so many prompts on, a tenth of them at most is used."""
FEWEST_ROWS = 8
"""Fewer prompts than this are run several times in a batch: one prompt's noise is a poor guess."""


@dataclass(frozen=True)
class NoisePlan:
    """How the noise is measured: on how many prompts, in batches of how many tokens."""

    n_prompts: int
    batch_tokens: int
    seed: int

    def copies(self, batch: TokenBatch) -> int:
        """How often the prompts of a batch are run at once, within the tokens of one batch."""
        room = self.batch_tokens // (len(batch.members) * batch.padded_length)
        return max(1, min(-(-FEWEST_ROWS // self.n_prompts), room))


def pick_sample(n_prompts: int, seed: int) -> list[int]:
    """The prompts on which the noise is measured: at most 16, and at most a tenth of 50 and more."""
    most = MOST_PROMPTS if n_prompts < FEW_PROMPTS else min(MOST_PROMPTS, n_prompts // 10)
    if n_prompts <= most:
        return list(range(n_prompts))
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(n_prompts, generator=generator)[:most].tolist())


@contextmanager
def nudged(block: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Move every number that first enters a block by one unit in the last place, up or down at random."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        handle.remove()  # a block that runs again in the same pass gets what it got
        return (one_ulp_away(args[0], generator), *args[1:])

    handle = block.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def one_ulp_away(states: Tensor, generator: torch.Generator) -> Tensor:
    """Each number's next larger or next smaller neighbour in magnitude; 0, ∞ and NaN stay.

    Neighbouring floating-point numbers of one sign are neighbouring integers, read bit by bit.
    """
    integers = _INTEGERS[states.element_size()]
    signs = torch.randint(0, 2, states.shape, generator=generator, dtype=integers) * 2 - 1
    moved = (states.contiguous().view(integers) + signs.to(states.device)).view(states.dtype)
    return torch.where((states != 0) & states.isfinite(), moved, states)
