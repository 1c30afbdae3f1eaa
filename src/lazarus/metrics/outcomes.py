"""The next tokens that two models can both give, and those that only one of them can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lazarus.metrics.transfers import on_device


@dataclass(frozen=True)
class Outcomes:
    """The ids of two vocabularies that are the same token. All tokens that only one has are one more outcome.

    `base` and `finetuned` are the ids of the tokens that both have, in the same order. The outcome of the
    others comes last. A model that has none of them gives it the probability 0.
    """

    base: Int[Tensor, " common"]
    finetuned: Int[Tensor, " common"]
    n_tokens: tuple[int, int]
    """for how many tokens each model has logits"""

    @property
    def n_common(self) -> int:
        """The number of tokens that both have."""
        return len(self.base)

    @property
    def n_own(self) -> tuple[int, int]:
        """The number of tokens that base alone has, and that the fine-tuned model alone has."""
        return self.n_tokens[0] - self.n_common, self.n_tokens[1] - self.n_common

    def merged(
        self, base: Float[Tensor, "rows base_tokens"], finetuned: Float[Tensor, "rows finetuned_tokens"]
    ) -> tuple[Float[Tensor, "rows outcomes"], Float[Tensor, "rows outcomes"]]:
        """Return the logits of the outcomes: those of the common tokens, and log Σ exp of all others."""
        return _merged(base, self.base), _merged(finetuned, self.finetuned)

    def of_ids(self, ids: Int[Tensor, " rows"], side: int) -> Int[Tensor, " rows"]:
        """Return the outcome that each id of one model belongs to; `n_common` for a token of its own."""
        places = torch.full((self.n_tokens[side],), self.n_common, device=ids.device)
        known = on_device((self.base, self.finetuned)[side], ids.device)
        places[known] = torch.arange(self.n_common, device=ids.device)
        return places[ids]

    def translated(
        self, ids: Int[Tensor, " rows"], side: int
    ) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
        """Return the other model's ids of tokens of one model, and which of them it has; 0 for the others."""
        outcome = self.of_ids(ids, side)
        theirs = on_device((self.finetuned, self.base)[side], ids.device)
        # One more place, for a token that the other lacks; it may be the only one.
        return torch.cat([theirs, theirs.new_zeros(1)])[outcome], outcome < self.n_common


def match_outcomes(
    base: Mapping[str, int] | None, finetuned: Mapping[str, int] | None, n_tokens: tuple[int, int]
) -> Outcomes | None:
    """Match two vocabularies by their tokens; None where every id is the same token in both.

    `base` and `finetuned` map tokens to ids, and `n_tokens` is for how many ids each model has logits. An id
    without a token, as a padded LM head has, is matched with the same id of the other model if that has none
    either. Without the vocabularies all ids are matched by number.
    """
    ours, theirs = _names(base or {}, n_tokens[0]), _names(finetuned or {}, n_tokens[1])
    if base is None or finetuned is None:
        ours, theirs = [None] * n_tokens[0], [None] * n_tokens[1]
    if ours == theirs:
        return None
    places = {token: i for i, token in enumerate(theirs) if token is not None}
    pairs = []
    for i, token in enumerate(ours):
        if token is not None:
            if token in places:
                pairs.append((i, places[token]))
        elif i < len(theirs) and theirs[i] is None:
            pairs.append((i, i))
    # `reshape` gives two columns even where no token is common.
    one, other = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return Outcomes(one, other, n_tokens)


def _names(ids: Mapping[str, int], n_tokens: int) -> list[str | None]:
    """The token of each id."""
    names: list[str | None] = [None] * n_tokens
    for token, i in ids.items():
        if 0 <= i < n_tokens:
            names[i] = token
    return names


def _merged(logits: Tensor, common: Tensor) -> Tensor:
    here = common.cpu()
    own = torch.ones(logits.shape[-1], dtype=torch.bool)
    own[here] = False
    # Found on the host: how many there are decides on a shape.
    rest = logits[:, torch.nonzero(own).flatten().to(logits.device)]
    rest = rest.logsumexp(-1, keepdim=True)  # of no logits it is −∞, the probability 0
    common = on_device(common, logits.device)
    return torch.cat([logits[:, common], rest], dim=-1)
