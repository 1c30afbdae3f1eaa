"""Prompts that run together: batches cut where padding and their number cost least together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from lazarus.tokens import TokenizedPrompt

Padding = Literal["right", "equal_lengths", "one_by_one"]

BATCH_COST = 64
"""The cost of a further batch, in tokens: on a CPU, products of fewer rows are slower by about as much."""


@dataclass(frozen=True)
class TokenBatch:
    """Prompts that run together. The padded tensors are made when they are asked for, and not kept."""

    members: list[TokenizedPrompt]
    pad_id: int
    extra_padding: int = 0
    """tokens of padding beyond the longest prompt"""
    prefix: tuple[int, ...] = ()
    """ids before those of every member, which run once and not with the batch"""

    @property
    def prompts(self) -> list[int]:
        """Return whose the rows are."""
        return [prompt.index for prompt in self.members]

    @property
    def lengths(self) -> list[int]:
        """The tokens of each row, padding left out."""
        return [len(prompt.ids) for prompt in self.members]

    @property
    def n_tokens(self) -> int:
        """The tokens of all rows, padding left out."""
        return sum(self.lengths)

    @property
    def padded_length(self) -> int:
        """The tokens of each row, padding included."""
        return max(self.lengths) + self.extra_padding

    @property
    def n_padded(self) -> int:
        """The tokens of all rows, padding included."""
        return len(self.members) * self.padded_length

    def padded(self) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
        """Input ids and attention mask, padded on the right."""
        lengths = self.lengths
        input_ids = torch.full((len(lengths), self.padded_length), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(self.members):
            input_ids[row, : lengths[row]] = torch.tensor(prompt.ids)
            mask[row, : lengths[row]] = 1
        return input_ids, mask

    def after(self, n_prefix: int) -> TokenBatch:
        """The same prompts, without their first `n_prefix` tokens, which are the same and run before."""
        if not n_prefix:
            return self
        members = [replace(prompt, ids=prompt.ids[n_prefix:]) for prompt in self.members]
        return replace(self, members=members, prefix=tuple(self.members[0].ids[:n_prefix]))


@dataclass(frozen=True)
class BatchPair:
    """The same prompts for both models: the same batch, or each tokenizer's own reading of the texts."""

    base: TokenBatch
    finetuned: TokenBatch

    @classmethod
    def of(
        cls, base: Sequence[TokenBatch], finetuned: Sequence[TokenizedPrompt], pad_id: int
    ) -> list[BatchPair]:
        """Each batch of base beside the fine-tuned model's reading of its prompts."""
        return [cls(b, TokenBatch([finetuned[i] for i in b.prompts], pad_id)) for b in base]

    @classmethod
    def same(cls, batches: Sequence[TokenBatch]) -> list[BatchPair]:
        """The same ids for both models."""
        return [cls(batch, batch) for batch in batches]


def make_batches(
    tokenized: Sequence[TokenizedPrompt],
    batch_tokens: int,
    padding: Padding,
    pad_id: int,
    n_prefix: int = 0,
) -> list[TokenBatch]:
    """Prompts of like length together, the longest first, at most `batch_tokens` with padding.

    The first `n_prefix` tokens are the same in all, and run before the batches.

    Of all ways to cut the sorted prompts into batches it takes the cheapest, where a batch costs its
    padded tokens and `BATCH_COST` more. A prompt longer than `batch_tokens` is a batch of its own.
    """
    prompts = sorted(tokenized, key=lambda prompt: (-len(prompt.ids), prompt.index))
    lengths = [len(prompt.ids) - n_prefix for prompt in prompts]
    cheapest, ends = [0] * (len(prompts) + 1), [0] * len(prompts)
    # From the end: what a cut costs includes the cheapest way to cut all that comes after it.
    for start in reversed(range(len(prompts))):
        candidates = range(start + 1, start + 1 + _most_rows(lengths, start, batch_tokens, padding))
        cheapest[start], ends[start] = min(
            (BATCH_COST + lengths[start] * (end - start) + cheapest[end], end) for end in candidates
        )
    batches, start = [], 0
    while start < len(prompts):
        batches.append(TokenBatch(prompts[start : ends[start]], pad_id).after(n_prefix))
        start = ends[start]
    return batches


def _most_rows(lengths: Sequence[int], start: int, batch_tokens: int, padding: Padding) -> int:
    """Return how many prompts may run together from `start` on."""
    if padding == "one_by_one":
        return 1
    most = min(max(1, batch_tokens // lengths[start]), len(lengths) - start)
    if padding == "right":
        return most
    return next((n for n in range(1, most) if lengths[start + n] != lengths[start]), most)
