"""The likeliest next tokens, where whole distributions are not at hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lazarus.metrics.output import divergences, rows_at_once
from lazarus.metrics.states import RowValues, to_float64


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens at some places, the likeliest first."""

    ids: Int[Tensor, "rows k"]
    logprobs: Float[Tensor, "rows k_and_one"]
    """their log-probabilities, and that of all other tokens together"""

    @classmethod
    def of(cls, logits: Float[Tensor, "rows vocabulary"], k: int) -> TopTokens:
        """Return the `k` likeliest tokens of each row of logits."""
        k, n_rows = min(k, logits.shape[1]), rows_at_once(logits)
        parts = [_top(to_float64(part), k) for part in torch.split(logits, n_rows)]
        return cls(torch.cat([part.ids for part in parts]), torch.cat([part.logprobs for part in parts]))

    @property
    def first(self) -> Int[Tensor, " rows"]:
        """The first choices."""
        return self.ids[:, 0]


def compare_top(
    base: Float[Tensor, "rows vocabulary"] | TopTokens,
    finetuned: Float[Tensor, "rows vocabulary"] | TopTokens,
) -> RowValues:
    """Compare next-token distributions of which at least one is known by its likeliest tokens.

    As `compare_logits`, over the tokens of which both probabilities are known, and one outcome for all
    others: by the data-processing inequality KL and JS are no larger than those of the whole distributions.
    The rank is NaN where base does not list the fine-tuned model's first choice; logits have no distance.
    """
    sides = [TopTokens.of(side, 1) if isinstance(side, Tensor) else side for side in (base, finetuned)]
    ids = finetuned.ids if isinstance(finetuned, TopTokens) else sides[0].ids
    if isinstance(base, TopTokens) and not isinstance(finetuned, TopTokens):
        ids = base.ids
    known = _is_known(base, ids) & _is_known(finetuned, ids)
    log_p, log_q = _merged(base, ids, known), _merged(finetuned, ids, known)
    columns = [
        *divergences(log_p, log_q),
        (sides[0].first == sides[1].first).double(),
        _rank(base, sides[1].first),
        torch.full_like(log_p[:, 0], torch.nan),
    ]
    return RowValues(torch.stack(columns, dim=-1), ~(log_p.isnan() | log_q.isnan()).any(-1))


def _top(logits: Tensor, k: int) -> TopTokens:
    logprobs = logits.log_softmax(-1)
    found = logprobs.topk(k)
    others = logprobs.scatter(-1, found.indices, -torch.inf).logsumexp(-1, keepdim=True)
    return TopTokens(found.indices, torch.cat([found.values, others], dim=-1))


def _is_known(side: Tensor | TopTokens, ids: Tensor) -> Tensor:
    """Return of which ids the probability is known."""
    if isinstance(side, Tensor):
        return torch.ones_like(ids, dtype=torch.bool)
    return (ids[:, :, None] == side.ids[:, None, :]).any(-1)


def _merged(side: Tensor | TopTokens, ids: Tensor, known: Tensor) -> Float[Tensor, "rows outcomes"]:
    """Return the log-probabilities of the known ids, −∞ for the others, and last that of all the rest."""
    if isinstance(side, Tensor):
        logprobs = to_float64(side).log_softmax(-1)
        own = logprobs.gather(-1, ids).masked_fill(~known, -torch.inf)
        kept = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, ids, known)
        others = logprobs.masked_fill(kept, -torch.inf)
    else:
        place = ids[:, :, None] == side.ids[:, None, :]
        own = side.logprobs[:, None, :-1].expand(*place.shape).masked_fill(~place, -torch.inf).amax(-1)
        own = own.masked_fill(~known, -torch.inf)
        listed = (place & known[:, :, None]).any(1)
        nothing = torch.zeros_like(listed[:, :1])
        others = side.logprobs.masked_fill(torch.cat([listed, nothing], dim=-1), -torch.inf)
    return torch.cat([own, others.logsumexp(-1, keepdim=True)], dim=-1)


def _rank(base: Tensor | TopTokens, chosen: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    if isinstance(base, Tensor):
        own = base.gather(-1, chosen[:, None])
        return (1 + (base > own).sum(-1)).double()
    listed = base.ids == chosen[:, None]
    place = 1 + listed.double().argmax(-1).double()
    return place.masked_fill(~listed.any(-1), torch.nan)
