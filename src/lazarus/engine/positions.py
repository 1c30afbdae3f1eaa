"""Which tokens are compared. Masks and positions are applied here, once: nothing behind sees padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lazarus.errors import PositionError, UnsupportedModelError
from lazarus.metrics import to_float64
from lazarus.tokens import TokenBatch

Position = Literal["auto", "last", "mean", "all"] | int


def check_positions(position: Position, lengths: Sequence[int]) -> list[str]:
    """Refuse a position that a prompt does not have; returns what must be noted.

    Raises:
        PositionError: it names the first prompt without that token.
    """
    for index, length in enumerate(lengths):
        if isinstance(position, int) and not -length <= position < length:
            raise PositionError(
                f"Prompt {index} has {length} tokens, so none at position {position}. Choose another "
                "--position, or leave the prompt out."
            )
    alone = sum(length == 1 for length in lengths)
    if position in ("mean", "all") and alone:
        return [
            f"{alone} of {len(lengths)} prompts have one token, so their position 0 is compared, which "
            "is left out of the others: it is an attention sink and hardly depends on the text"
        ]
    return []


def compared_tokens(position: Position, length: int) -> range:
    """The indices that are compared in a prompt of this many tokens."""
    if isinstance(position, int):
        index = position % length
        return range(index, index + 1)
    if position == "last":
        return range(length - 1, length)
    return range(min(1, length - 1), length)


@dataclass(frozen=True)
class RowPicker:
    """Takes the compared rows out of a batch's states.

    `rows` and `tokens` index the batch; `prompts` says whose each picked row is. With `average`, a
    prompt's rows are averaged in float64 and there is one row a prompt.
    """

    rows: Int[Tensor, " picked"]
    tokens: Int[Tensor, " picked"]
    prompts: Int[Tensor, " out"]
    average: bool
    n_tokens: int

    @classmethod
    def of(cls, batch: TokenBatch, position: Position) -> RowPicker:
        """The picker of this batch's compared rows."""
        spans = [compared_tokens(position, length) for length in batch.lengths]
        sizes = torch.tensor([len(span) for span in spans])
        rows = torch.repeat_interleave(torch.arange(len(spans)), sizes)
        tokens = torch.tensor([token for span in spans for token in span])
        average = position == "mean"
        owners = torch.tensor(batch.prompts)
        return cls(rows, tokens, owners if average else owners[rows], average, batch.padded_length)

    def pick(self, states: Float[Tensor, "batch time hidden"]) -> Float[Tensor, "out hidden"]:
        """The compared rows; padding is never read, not even multiplied by zero.

        Raises:
            UnsupportedModelError: the states do not have one place for each token of the batch.
        """
        if states.shape[1] != self.n_tokens:
            raise UnsupportedModelError(
                f"a batch of {self.n_tokens} tokens a prompt gave states for {states.shape[1]}: this "
                "architecture adds positions of its own, so tokens cannot be matched. Shorter prompts "
                "may not need them."
            )
        picked = states[self.rows.to(states.device), self.tokens.to(states.device)]
        if not self.average:
            return picked
        wide = to_float64(picked)
        sums = wide.new_zeros(len(self.prompts), wide.shape[-1])
        counts = torch.bincount(self.rows, minlength=len(self.prompts)).to(wide)
        return sums.index_add_(0, self.rows.to(wide.device), wide) / counts[:, None]
