"""Floating-point operations of a pass, as a function of the shape of its batch.

A pass over B prompts of T tokens takes a number of operations that is a polynomial in B and T: products with
weights have B·T rows, attention has B·T² pairs, and rotary positions are made once for all prompts. A few
tiny passes give its coefficients. Operations are those that torch's FlopCounterMode counts: of products of
matrices and of attention, two for a multiplication and an addition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lazarus.batches import TokenBatch
from lazarus.models import Clock
from lazarus.tokens import TokenizedPrompt

_ROWS, _LENGTHS = (1, 2), (2, 4, 6)


@dataclass(frozen=True)
class PassFlops:
    """The operations of a pass, as the coefficients of a polynomial."""

    coefficients: tuple[int, ...]

    def at(self, n_rows: int, n_tokens: int) -> int:
        """Return the operations of a batch of `n_rows` prompts, each padded to `n_tokens` tokens."""
        return sum(c * t for c, t in zip(self.coefficients, _terms(n_rows, n_tokens), strict=True))

    def of(self, batches: Sequence[TokenBatch]) -> int:
        """Return the operations of these batches."""
        return sum(self.at(len(batch.members), batch.padded_length) for batch in batches)


def count_passes(
    run: Callable[[TokenBatch], object], clock: Clock, batches: Sequence[TokenBatch]
) -> PassFlops:
    """Count the operations of tiny batches like those of a run: with their prefix, and some of their ids."""
    like = max(batches, key=lambda batch: batch.padded_length)
    ids = max((member.ids for member in like.members), key=len)
    counts, terms = list[int](), list[list[int]]()
    for n_rows in _ROWS:
        for n_tokens in _LENGTHS:
            text = [ids[i % len(ids)] for i in range(n_tokens)]
            batch = TokenBatch(
                [TokenizedPrompt(i, text) for i in range(n_rows)], like.pad_id, prefix=like.prefix
            )
            if not counts:
                run(batch)  # what is done once, such as reading the prefix, is not of every pass
            counts.append(count(partial(run, batch), clock))
            terms.append(_terms(n_rows, n_tokens))
    solved = np.linalg.solve(np.array(terms, dtype=float), np.array(counts, dtype=float))
    return PassFlops(tuple(round(each) for each in solved))


def count(run: Callable[[], object], clock: Clock) -> int:
    """Return the operations of a call, with those of blocks that were skipped in it."""
    with clock.counting(_Counter()):
        run()
        return clock.flops()


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts as torch's FlopCounterMode does, which is slow: it asks which module each operation is of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def get_total_flops(self) -> int:
        """Return the operations counted so far."""
        return self.total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


def _terms(n_rows: int, n_tokens: int) -> list[int]:
    powers = [1, n_tokens, n_tokens**2]
    return [*powers, *(n_rows * each for each in powers)]
