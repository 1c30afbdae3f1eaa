"""A pair of next-token distributions → how far apart they are."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from lazarus.metrics.outcomes import Outcomes
from lazarus.metrics.states import RowValues, to_float64

OUTPUT_METRICS = (
    "kl_base_finetuned",
    "kl_finetuned_base",
    "js",
    "top1_agreement",
    "base_rank_of_finetuned_top1",
    "logits_relative_l2",
)

MOST_LOGITS = 2**24
"""The logits of each model that are held at once, at most."""
LOGITS_AT_ONCE = 2**17
"""The logits that a CPU compares at once: few enough to stay in its cache."""
LOGITS_ON_DEVICE = 2**22
"""The logits that an accelerator compares at once: 27 rows of a vocabulary of 152,000 tokens.

It takes about a dozen copies of them in float64, so 0.4 GB. An operation then reads and writes 0.1 GB, which
takes far longer than starting it, so that more at once would only take memory.
"""
COPIES = 12
"""The copies in float64 that a comparison makes of what it compares, about."""


def compare_logits(
    base: Float[Tensor, "rows base_tokens"],
    finetuned: Float[Tensor, "rows finetuned_tokens"],
    outcomes: Outcomes | None = None,
) -> RowValues:
    """Compare each pair of next-token distributions, from their logits, in float64.

    KL(base‖finetuned) and KL(finetuned‖base) in nats, 0 to ∞; Jensen-Shannon divergence in nats, 0 to
    ln 2 (Lin 1991); whether the first choices are the same, 0 or 1; the rank that base gives to the
    fine-tuned model's first choice, from 1; and ‖f − b‖/‖b‖ of the logits themselves. A row with a NaN
    or +∞ is not valid; −∞ is a token that cannot come.

    Where the vocabularies differ, `outcomes` says which ids are the same token. All tokens that one model
    alone has are one more outcome. First choices are each model's own; one that base lacks ranks after all of
    base's.
    """
    n_rows = rows_at_once(base)
    parts = [
        _compare(b, f, outcomes)
        for b, f in zip(*(torch.split(x, n_rows) for x in (base, finetuned)), strict=True)
    ]
    return RowValues(torch.cat([p.values for p in parts]), torch.cat([p.valid for p in parts]))


def rows_at_once(logits: Float[Tensor, "rows tokens"]) -> int:
    """Return how many rows of logits are compared at once on the device where that is done."""
    return max(1, _at_once(logits.device) // max(1, logits.shape[1]))


def _at_once(device: torch.device) -> int:
    # `to_float64` moves those of MPS to the CPU.
    return LOGITS_AT_ONCE if device.type in ("cpu", "mps") else LOGITS_ON_DEVICE


def logits_bytes(n_rows: int, n_tokens: int, device: torch.device, *, with_noise: bool) -> int:
    """Return about what the logits of both models take while rows of them are compared."""
    held = min(n_rows, max(1, MOST_LOGITS // max(1, n_tokens))) * n_tokens
    at_once = min(held, max(n_tokens, _at_once(device)))
    # Of each model, and two copies more while the likeliest tokens are found.
    compared = 4 * 4 * held + COPIES * 8 * at_once
    # Those of a trial are compared as states are, all at once: seven copies in float64.
    return max(compared, (2 * 4 + 7 * 8) * held) if with_noise else compared


def has_distribution(logits: Float[Tensor, "rows tokens"]) -> Bool[Tensor, " rows"]:
    """Return which rows of logits are a distribution: no NaN, no +∞, and not −∞ throughout."""
    # Row by row: all logits in float64 at once would take several times their memory.
    return torch.stack([row.double().logsumexp(-1).isfinite() for row in logits.cpu()])


def _compare(
    base: Float[Tensor, "rows base_tokens"],
    finetuned: Float[Tensor, "rows finetuned_tokens"],
    outcomes: Outcomes | None,
) -> RowValues:
    b, f = to_float64(base), to_float64(finetuned)
    # Before the merge: a first choice is a token of the model's own vocabulary.
    agrees, rank = _first_choices(b, f, outcomes)
    if outcomes is not None:
        b, f = outcomes.merged(b, f)
    log_p, log_q = b.log_softmax(-1), f.log_softmax(-1)
    columns = [
        *divergences(log_p, log_q),
        agrees.double(),
        rank.double(),
        _relative_l2(b, f),
    ]
    # log_softmax gives NaN for a row with NaN or +∞, and for one that is −∞ throughout.
    return RowValues(torch.stack(columns, dim=-1), ~(log_p.isnan() | log_q.isnan()).any(-1))


def divergences(
    log_p: Float[Tensor, "rows outcomes"], log_q: Float[Tensor, "rows outcomes"]
) -> list[Float[Tensor, " rows"]]:
    """Return KL(p‖q), KL(q‖p) and the Jensen-Shannon divergence, in nats, from log-probabilities."""
    p, q, gap, opposite = log_p.exp(), log_q.exp(), log_p - log_q, log_q - log_p
    return [
        _mean_gap(p, gap),
        _mean_gap(q, opposite),
        (_mean_gap(p, _gap_to_middle(gap)) + _mean_gap(q, _gap_to_middle(opposite))) / 2,
    ]


def _first_choices(base: Tensor, finetuned: Tensor, outcomes: Outcomes | None) -> tuple[Tensor, Tensor]:
    """The agreement of both models' first choices, and the rank in base of the fine-tuned model's."""
    ours, theirs = base.argmax(-1), finetuned.argmax(-1)
    known = torch.ones_like(theirs, dtype=torch.bool)
    if outcomes is not None:
        theirs, known = outcomes.translated(theirs, 1)
    # A token that base lacks ranks after all of base's.
    chosen = base.gather(-1, theirs[:, None]).masked_fill(~known[:, None], -torch.inf)
    return (ours == theirs) & known, 1 + (base > chosen).sum(-1)


def _mean_gap(p: Tensor, gap: Tensor) -> Float[Tensor, " rows"]:
    """Σ p gap, where a token of probability 0 adds nothing: the KL divergence for gap = log p − log q."""
    # 0 · ∞ is NaN. Such rows are rare, and masking is another pass over all tokens, so it waits for one.
    terms = p * gap
    total: Tensor = terms.sum(-1)
    return terms.masked_fill_(p == 0, 0.0).sum(-1) if _may_be(total.isnan()) else total


def _may_be(flags: Bool[Tensor, " rows"]) -> bool:
    """Return whether any is set; also where only a device knows, which the host would have to wait for."""
    return flags.device.type != "cpu" or bool(flags.any())


def _gap_to_middle(gap: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows vocabulary"]:
    """log p − log ½(p + q), from log p − log q; exactly 0 for 0."""
    # log σ(x) = −log(1 + e⁻ˣ). Not by softplus, whose last bits depend on how many rows there are: what does
    # not fill a vector register it computes by another function.
    return logsigmoid(gap).add_(math.log(2))


def _relative_l2(base: Tensor, finetuned: Tensor) -> Float[Tensor, " rows"]:
    """‖f − b‖ / ‖b‖ over the tokens that both models can give; 0 for logits that are all the same."""
    difference, length = (finetuned - base).norm(dim=-1), base.norm(dim=-1)
    # −∞ − (−∞) is NaN: tokens that a model cannot give are left out, which takes copies of the logits.
    if _may_be(~(difference + length).isfinite()):
        impossible = ~(base.isfinite() & finetuned.isfinite())
        difference = (finetuned - base).masked_fill(impossible, 0.0).norm(dim=-1)
        length = base.masked_fill(impossible, 0.0).norm(dim=-1)
    # Two rows of zeros do not differ, and 0 / 0 would be NaN.
    return torch.where(difference == 0, difference, difference / length)
