"""The logit lens of one model on the prompt: choices, probabilities and ranks, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lazarus.lens.vocabulary import Vocabulary
from lazarus.notes import Note, Notes
from lazarus.results import ModelInfo
from lazarus.tokens import TokenizedPrompt


@dataclass(frozen=True)
class Lens:
    """One of the two models on the prompt: next-token logits after each block, [layers, vocabulary].

    A layer with a NaN or +∞ has no distribution, and nothing is read from it; −∞ is a token that cannot come.
    """

    info: ModelInfo
    why_not_finite: Callable[[], Note | None]
    """finds out why logits of some layers are not finite; None where the states and logits are"""
    vocabulary: Vocabulary
    prompt: TokenizedPrompt
    logits: Float[Tensor, "layers vocabulary"]
    notes: Notes = field(default_factory=Notes)
    """on how the model behaves, and how its layers were read"""
    not_recorded: tuple[int, ...] = ()
    """layers of a recording without states: nothing is read from them"""

    @cached_property
    def log_totals(self) -> Tensor:
        """log Σ exp(logit) of each layer, in float64, [layers]; not finite where nothing is read."""
        # Row by row: all logits in float64 would take twice the memory. −∞ adds nothing; +∞ and NaN stay.
        return torch.stack([row.double().logsumexp(-1) for row in self.logits])

    @cached_property
    def valid(self) -> list[bool]:
        """Return whether each layer has a distribution."""
        flags: list[bool] = self.log_totals.isfinite().tolist()
        return flags

    @cached_property
    def first_choices(self) -> list[int | None]:
        """Each layer's most probable token, the lowest id of equal ones; None where nothing is read."""
        chosen = self.logits.argmax(-1).tolist()
        return [token if valid else None for token, valid in zip(chosen, self.valid, strict=True)]

    def top(self, layer: int, n_tokens: int) -> list[tuple[int, float]]:
        """The most probable tokens of a layer and their probabilities; of equal ones the lower ids first."""
        if not self.valid[layer]:
            return []
        row = self.logits[layer]
        # Of equal logits topk returns any, so all that reach the last value are sorted again.
        least = row.topk(n_tokens).values[-1]
        found = (row >= least).nonzero()[:, 0].tolist()
        found.sort(key=lambda token: (-float(row[token]), token))
        probabilities = (row[found].double() - self.log_totals[layer]).exp().tolist()
        return list(zip(found, probabilities, strict=True))[:n_tokens]

    def probabilities(self, token_id: int) -> list[float | None]:
        """A token's probability at each layer; None where nothing is read."""
        found = (self.logits[:, token_id].double() - self.log_totals).exp().tolist()
        return [p if valid else None for p, valid in zip(found, self.valid, strict=True)]

    def ranks(self, token_id: int) -> list[int | None]:
        """At each layer, the number of tokens that are more probable, plus 1; None where nothing is read."""
        found = (1 + (self.logits > self.logits[:, token_id, None]).sum(-1)).tolist()
        return [rank if valid else None for rank, valid in zip(found, self.valid, strict=True)]

    def emergence(self, token_id: int) -> int | None:
        """Return the layer from which a token is the first choice to the end; None if it is not there."""
        others = [layer for layer, first in enumerate(self.first_choices) if first != token_id]
        layer = others[-1] + 1 if others else 0
        return layer if layer < len(self.first_choices) else None

    def likeliest(self, token_ids: list[int]) -> int | None:
        """Return the most probable of these tokens at the last layer, the first of equals; None for none."""
        if not token_ids:
            return None
        last = self.logits[-1]
        return max(token_ids, key=lambda token: float(last[token])) if self.valid[-1] else token_ids[0]
