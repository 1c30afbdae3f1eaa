"""Pairs of states at a site, and the tokens of a prompt that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lazarus.facts import Site
from lazarus.metrics import RowValues
from lazarus.tokens import TokenizedPrompt

Position = Literal["auto", "last", "mean", "all", "response", "every"] | int
"""the tokens of a prompt that are compared; `every` is all of them, position 0 too, as in a recording"""


@dataclass(frozen=True)
class StatePair:
    """The states of two models at one site: row i of both is the same token of prompt `prompts[i]`.

    All rows of a prompt come in one pair, but for those of the site `logits`, which may come in parts, one
    after the other. Where scores or embeddings are compared, they stand in place of the logits. The experts
    that are picked are rows of 0 and 1, one column an expert, of every compared token: never a mean.
    """

    site: Site
    prompts: Int[Tensor, " rows"]
    base: Float[Tensor, "rows base_width"]
    finetuned: Float[Tensor, "rows finetuned_width"]
    local: Float[Tensor, "rows base_width"] | None = None
    """what the fine-tuned model's block makes of base's states, where that was asked for"""
    trial: int | None = None
    """the number of a trial of the noise, in which `finetuned` is base once more; None otherwise"""
    change: Float[Tensor, " rows"] | None = None
    """at the experts that are picked: ‖f − b‖² of the block's output at each token; None with a mean"""
    compared: RowValues | None = None
    """at the logits: what they were compared to be, where of one side only the likeliest tokens are known"""

    @classmethod
    def of(cls, site: Site, prompts: Any, base: Any, finetuned: Any, trial: int | None = None) -> StatePair:
        """Return a pair from arrays that NumPy can read, or from lists: [rows] and [rows, width]."""
        owners = torch.as_tensor(prompts, dtype=torch.int64)
        return cls(site, owners, torch.as_tensor(base), torch.as_tensor(finetuned), trial=trial)


def tokens_of(prompt: TokenizedPrompt, position: Position, n_before: int = 0) -> Sequence[int]:
    """Return which tokens of a prompt are compared; its ids are those after the first `n_before` tokens."""
    if position == "response":
        return [token for span in prompt.response for token in span]
    return compared_tokens(position, n_before + len(prompt.ids))


def compared_tokens(position: Position, length: int) -> range:
    """Return the indices that are compared in a prompt of this many tokens, whatever the tokens are."""
    assert position != "response"
    if isinstance(position, int):
        index = position % length
        return range(index, index + 1)
    if position == "last":
        return range(length - 1, length)
    if position == "every":
        return range(length)
    return range(min(1, length - 1), length)
