"""The compared tokens. Masks and positions are applied here, once: nothing behind sees padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lazarus.batches import TokenBatch
from lazarus.errors import PositionError, UnsupportedModelError
from lazarus.messages import option
from lazarus.metrics import on_device, to_float64
from lazarus.notes import Notes
from lazarus.sites import Position, tokens_of


def check_positions(position: Position, lengths: Sequence[int], notes: Notes) -> None:
    """Refuse a position that a prompt does not have; note prompts of a single token.

    Raises:
        PositionError: it names the first prompt without that token.
    """
    for index, length in enumerate(lengths):
        if isinstance(position, int) and not -length <= position < length:
            raise PositionError(
                f"Prompt {index} has {length} tokens, so none at position {position}. Choose another "
                f"{option('position')}, or leave the prompt out.",
                option="position",
            )
    alone = [index for index, length in enumerate(lengths) if length == 1]
    if position in ("mean", "all") and alone:
        notes.add(
            "lone-tokens",
            f"{len(alone)} of {len(lengths)} prompts have one token, so their position 0 is compared, which "
            "is left out of the others: it is an attention sink and hardly depends on the text",
            prompts=alone,
        )


@dataclass(frozen=True)
class RowPicker:
    """Takes the compared rows out of a batch's states.

    `rows` and `tokens` index the batch; `prompts` says whose each compared row is. With `average`, a
    prompt's rows are averaged in float64 and there is one row a prompt. `in_prefix` are the compared tokens
    of a prefix that does not run with the batch: `whole` puts their rows before each prompt's own.
    """

    rows: Int[Tensor, " picked"]
    tokens: Int[Tensor, " picked"]
    prompts: Int[Tensor, " out"]
    average: bool
    n_tokens: int
    in_prefix: Sequence[int] = ()
    n_own: tuple[int, ...] = ()
    """how many tokens of the batch itself are compared, of each prompt"""

    @classmethod
    def of(cls, batch: TokenBatch, position: Position) -> RowPicker:
        """The picker of this batch's compared rows."""
        n_prefix = len(batch.prefix)
        whole = [tokens_of(prompt, position, n_prefix) for prompt in batch.members]
        own = [[token - n_prefix for token in tokens if token >= n_prefix] for tokens in whole]
        # One prompt speaks for all: their compared tokens differ only after the prefix.
        in_prefix = [token for token in whole[0] if token < n_prefix]
        sizes = torch.tensor([len(each) for each in own])
        rows = torch.repeat_interleave(torch.arange(len(own)), sizes)
        # The dtype is for an empty list, as of a token in the prefix: an index cannot be of floats.
        tokens = torch.tensor([token for each in own for token in each], dtype=torch.long)
        average = position == "mean"
        owners = torch.tensor(batch.prompts)
        # A row of the prefix counts for every prompt, so it comes once for each.
        prompts = owners if average else owners.repeat_interleave(sizes + len(in_prefix))
        n_own = tuple(map(len, own))
        return cls(rows, tokens, prompts, average, batch.padded_length, in_prefix, n_own)

    def of_prefix(self, n_tokens: int) -> RowPicker:
        """The picker of what `whole` needs of the prefix, from its own pass: so many tokens of one row."""
        tokens = torch.tensor(self.in_prefix, dtype=torch.long)
        rows = torch.zeros_like(tokens)
        return RowPicker(rows, tokens, rows[:1] if self.average else rows, self.average, n_tokens)

    def pick(self, states: Float[Tensor, "batch time hidden"]) -> Float[Tensor, "out hidden"]:
        """Return the compared rows; padding is never read, not even multiplied by zero.

        Raises:
            UnsupportedModelError: the states do not have one place for each token of the batch.
        """
        if states.shape[1] != self.n_tokens:
            raise UnsupportedModelError(
                f"a batch of {self.n_tokens} tokens a prompt gave states for {states.shape[1]}: this "
                "architecture adds positions of its own, so tokens cannot be matched. Shorter prompts "
                "may not need them."
            )
        # Indexing copies, so the block's whole output is freed while the pass goes on; a slice would hold it.
        picked = states[on_device(self.rows, states.device), on_device(self.tokens, states.device)]
        if not self.average:
            return picked
        wide = to_float64(picked)
        sums = wide.new_zeros(len(self.prompts), wide.shape[-1])
        sums.index_add_(0, on_device(self.rows, wide.device), wide)
        return sums / on_device(self._counts, wide.device)

    @cached_property
    def _counts(self) -> Float[Tensor, "out 1"]:
        """Return the number of picked rows of each prompt."""
        return torch.bincount(self.rows, minlength=len(self.prompts)).double()[:, None]

    @cached_property
    def _n_own(self) -> Int[Tensor, "out 1"]:
        return torch.tensor(self.n_own)[:, None]

    def whole(
        self, picked: Float[Tensor, "own hidden"], in_prefix: Float[Tensor, "before hidden"]
    ) -> Float[Tensor, "out hidden"]:
        """Return the picked rows, with those of the prefix, or their mean, before each prompt's own."""
        n_before = len(self.in_prefix)
        if not n_before:
            return picked
        if self.average:
            # Both are means, so each weighs as many tokens as it is of.
            n_own = on_device(self._n_own, picked.device)
            return (in_prefix * n_before + picked * n_own) / (n_before + n_own)
        own_rows = torch.split(picked, list(self.n_own))
        return torch.cat([rows for own in own_rows for rows in (in_prefix, own)])
