"""The numerical noise under every comparison: one model, with what ought not to matter changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from lazarus.batches import Padding, TokenBatch
from lazarus.engine.pair import ModelPair
from lazarus.engine.side import Side, joined, logit_pairs
from lazarus.sites import Position, StatePair

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

MOST_PROMPTS = 8
FEW_PROMPTS = 50
"""From so many prompts on, a tenth of them at most is used."""
EXTRA_PADDING = 8
FEWEST_ROWS = 8
"""Fewer prompts than this are run several times in a batch: one prompt's noise is a poor guess."""


@dataclass(frozen=True)
class NoisePlan:
    """The plan of the noise: on how many prompts it is measured, in batches of how many tokens."""

    n_prompts: int
    batch_tokens: int
    position: Position
    padding: Padding
    seed: int

    def copies(self, batch: TokenBatch) -> int:
        """Return how often the prompts of a batch are run at once, within the tokens of one batch."""
        if self.padding == "one_by_one":
            return 1
        room = self.batch_tokens // (len(batch.members) * batch.padded_length)
        return max(1, min(-(-FEWEST_ROWS // self.n_prompts), room))

    def recomposed(self, batch: TokenBatch, context: int | None) -> list[list[TokenBatch]]:
        """The same prompts in the same order: in two halves, or several times, and with more padding."""
        n_copies = self.copies(batch)
        extra_padding = self._extra_padding(batch, context)
        padded = replace(batch, members=batch.members * n_copies, extra_padding=extra_padding)
        if n_copies > 1:
            return [[replace(padded, extra_padding=0)], [padded]]
        middle = len(batch.members) // 2
        halves = [replace(batch, members=part) for part in (batch.members[:middle], batch.members[middle:])]
        return [halves if middle else [padded], [padded]]

    def _extra_padding(self, batch: TokenBatch, context: int | None) -> int:
        """The padding that a batch can have more: there may be no position for it, or it may be wrong."""
        if self.padding != "right":
            return 0
        taken = len(batch.prefix) + batch.padded_length
        room = EXTRA_PADDING if context is None else context - taken
        return max(0, min(EXTRA_PADDING, room))


def pick_sample(n_prompts: int, seed: int) -> list[int]:
    """The prompts on which the noise is measured: at most 8, and at most a tenth of 50 and more."""
    most = MOST_PROMPTS if n_prompts < FEW_PROMPTS else min(MOST_PROMPTS, n_prompts // 10)
    if n_prompts <= most:
        return list(range(n_prompts))
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(n_prompts, generator=generator)[:most].tolist())


def run_noise(
    pair: ModelPair,
    batches: Sequence[TokenBatch],
    plan: NoisePlan,
    advanced: Callable[[int], None],
) -> Iterator[StatePair]:
    """Base against base with what ought not to matter changed; yields each trial's number and pairs.

    Each trial runs the same prompts in other batches, with other padding where padding is right for the
    model, and with the first block's input moved by one unit in the last place; a prefix that runs once is
    moved as well. Few prompts are run several times in a batch, a trial each time. Both states of a pair
    are base's: no second copy of the weights is needed.
    """
    base = Side(pair.base, pair.base_conventions)
    generator = torch.Generator().manual_seed(plan.seed)
    for batch in batches:
        plain = base.run(batch, plan.position)
        trials = count()
        for parts in plan.recomposed(batch, pair.base.anatomy.context):
            moved, other_base = [], Side(pair.base, pair.base_conventions)
            with nudged(pair.base.anatomy.blocks[0], generator):
                other_base.begin(batch, plan.position)
            for part in parts:
                with nudged(pair.base.anatomy.blocks[0], generator):
                    moved.append(other_base.run(part, plan.position))
            for other in joined(moved).split(plan.copies(batch)):
                trial = next(trials)
                for site, b, f in zip(pair.sites, plain.sites, other.sites, strict=False):
                    yield StatePair(site, plain.prompts, b, f, trial=trial)
                yield from logit_pairs(base.head, base.head, plain, other, trial)
        advanced(batch.n_tokens)


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
