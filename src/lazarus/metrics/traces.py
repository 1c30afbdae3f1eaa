"""Every compared token of a few prompts: its divergence at a site, and what follows it at the output."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lazarus.metrics.outcomes import Outcomes
from lazarus.metrics.output import OUTPUT_METRICS
from lazarus.metrics.states import ROW_METRICS, AccumulatorState, RowValues, to_float64

N_CHOICES = 3
"""The next tokens that are kept of each model: the most probable ones."""

_DIVERGENCE = ROW_METRICS.index("divergence")
_KL, _AGREES = OUTPUT_METRICS.index("kl_base_finetuned"), OUTPUT_METRICS.index("top1_agreement")
_NUMBERS = ("kl", "agrees", "margin_base", "margin_finetuned", "rounding")


class TokenRows:
    """Keeps a row of numbers for each compared token of the `traced` prompts, in the order of the tokens.

    Prompts come in any order, and a prompt's tokens in theirs, in one update or in several.
    """

    def __init__(self, traced: Collection[int]) -> None:
        self.traced = frozenset(traced)
        self._parts: dict[int, list[NDArray[np.float64]]] = {}

    @property
    def of_prompt(self) -> dict[int, NDArray[np.float64]]:
        """Return the rows of each prompt that was seen, [tokens, numbers]."""
        return {prompt: np.concatenate(parts) for prompt, parts in self._parts.items()}

    def rows_of(self, prompts: Int[Tensor, " rows"]) -> NDArray[np.bool_]:
        """Return which rows are of a traced prompt."""
        return np.isin(prompts.cpu().numpy(), list(self.traced))

    def take(self, prompts: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Take in rows [rows, numbers], each of the prompt that it belongs to."""
        for prompt in self.traced.intersection(prompts.tolist()):
            self._parts.setdefault(prompt, []).append(values[prompts == prompt])

    def state(self) -> AccumulatorState:
        """The prompts that were seen, in order, how many tokens each has, and all their rows."""
        found = self.of_prompt
        prompts = sorted(found)
        width = found[prompts[0]].shape[1] if prompts else 0
        return {
            "prompts": np.array(prompts, dtype=np.int64),
            "n_tokens": np.array([len(found[prompt]) for prompt in prompts], dtype=np.int64),
            # `concatenate` refuses an empty list: no prompt may have been seen.
            "rows": np.concatenate([np.empty((0, width)), *(found[prompt] for prompt in prompts)]),
        }

    def add(self, state: AccumulatorState) -> None:
        """Take in what another one holds, from its `state`; they saw different prompts."""
        parts = np.split(state["rows"], np.cumsum(state["n_tokens"])[:-1])
        # Not strict: of no prompts `np.split` still makes one part, an empty one.
        for prompt, rows in zip(state["prompts"].tolist(), parts, strict=False):
            self._parts[prompt] = [rows]


class TokenTraces(TokenRows):
    """The divergence of each token at one site; NaN where a state is zero or not finite."""

    def update(self, prompts: Int[Tensor, " rows"], rows: RowValues) -> None:
        """Take in the metrics of every row of some prompts, from the host's memory."""
        if not self.traced.intersection(prompts.tolist()):
            return
        values = np.where(rows.valid.numpy(), rows.values[:, _DIVERGENCE].numpy(), np.nan)
        self.take(prompts.cpu().numpy(), values[:, None])


@dataclass(frozen=True)
class NextTokens:
    """The output after one token in both models; `choices` are the likeliest ids with their probabilities.

    KL(base‖fine-tuned) in nats. `margins`, in logits: how far each first choice is above the other model's;
    ∞ where a model cannot give that token. None, or no choice, where logits are not finite.
    """

    kl: float
    agrees: bool | None
    margins: tuple[float, float]
    rounding: float
    """one unit in the last place of the largest of these logits: two roundings of half a unit"""
    choices: tuple[list[tuple[int, float]], list[tuple[int, float]]]

    @classmethod
    def of(cls, row: NDArray[np.float64]) -> NextTokens:
        """Read a row of `TokenOutputs`."""
        kl, agrees, *margins, rounding = row[: len(_NUMBERS)].tolist()
        ids, probabilities = row[len(_NUMBERS) :].reshape(2, 2, -1).swapaxes(0, 1)
        choices = [
            [(int(i), p) for i, p in zip(*side, strict=True) if not np.isnan(i)]
            for side in zip(ids.tolist(), probabilities.tolist(), strict=True)
        ]
        known = None if np.isnan(agrees) else bool(agrees)
        return cls(kl, known, (margins[0], margins[1]), rounding, (choices[0], choices[1]))


class TokenOutputs(TokenRows):
    """The output after each compared token: KL, whether first choices agree, margins, and likely tokens."""

    def update(
        self,
        prompts: Int[Tensor, " rows"],
        logits: tuple[Float[Tensor, "rows base_tokens"], Float[Tensor, "rows finetuned_tokens"]],
        compared: RowValues,
        outcomes: Outcomes | None,
        rows: Int[Tensor, " rows"] | None = None,
    ) -> None:
        """Take in both models' logits at some rows, and what `compare_logits` says of them, on the host.

        `rows` are the places of the rows in the logits, where these have others too.
        """
        wanted = self.rows_of(prompts)
        if not wanted.any():
            return
        at = torch.from_numpy(np.flatnonzero(wanted))
        base, finetuned = logits
        # A copy of all logits is made only where it has to be.
        if rows is not None or not wanted.all():
            places = at if rows is None else rows[at]
            base, finetuned = (side[places.to(side.device)] for side in logits)
        chosen = _choices(base, finetuned, outcomes).cpu().numpy()
        numbers = compared.values[at][:, [_KL, _AGREES]].numpy()
        found = np.concatenate([numbers, chosen], axis=1)
        found[~compared.valid.numpy()[wanted]] = np.nan
        self.take(prompts.cpu().numpy()[wanted], found)


def margin_motion(
    base: Float[Tensor, "rows tokens"], moved: Float[Tensor, "rows tokens"]
) -> Float[Tensor, ""]:
    """Return the most that the margin between base's two likeliest tokens moves at any row, in logits.

    NaN where no row has two finite logits in both.
    """
    ids = base.topk(min(2, base.shape[-1])).indices
    one, other = (to_float64(side.gather(-1, ids)) for side in (base, moved))
    motion = ((one[:, 0] - one[:, -1]) - (other[:, 0] - other[:, -1])).abs()
    nothing = motion.new_full((1,), -1.0)  # less than any motion; also of no rows
    most = torch.cat([nothing, motion.masked_fill(~motion.isfinite(), -1.0)]).max()
    return most.masked_fill(most < 0, torch.nan)


def _choices(base: Tensor, finetuned: Tensor, outcomes: Outcomes | None) -> Float[Tensor, "rows numbers"]:
    """Margins and rounding, and then ids and probabilities of the likeliest tokens: base's, fine-tuned's."""
    ours, theirs = base.argmax(-1), finetuned.argmax(-1)
    margins = [_margin(base, ours, theirs, outcomes, 1), _margin(finetuned, theirs, ours, outcomes, 0)]
    largest = [side.amax(-1).abs().double() * torch.finfo(side.dtype).eps for side in (base, finetuned)]
    margins.append(torch.maximum(*(each.to(base.device) for each in largest)))
    n_choices = min(N_CHOICES, base.shape[-1], finetuned.shape[-1])
    likely = [part for side in (base, finetuned) for part in _likeliest(side, n_choices)]
    device = base.device
    return torch.cat([torch.stack(margins, -1), *(part.to(device).double() for part in likely)], dim=-1)


def _margin(logits: Tensor, own: Tensor, other: Tensor, outcomes: Outcomes | None, side: int) -> Tensor:
    """Return how far a model's first choice is above that of the other `side`; ∞ if it lacks that token."""
    known = torch.ones_like(other, dtype=torch.bool)
    if outcomes is not None:
        other, known = outcomes.translated(other, side)
    found = to_float64(logits.gather(-1, torch.stack([own, other.to(own.device)], -1)))
    return (found[:, 0] - found[:, 1]).masked_fill(~known.to(found.device), torch.inf)


def _likeliest(logits: Tensor, n_choices: int) -> tuple[Tensor, Tensor]:
    """Return the most probable ids and their probabilities, each [rows, choices], first the first choice."""
    # Of equal logits `topk` returns any, and greedy decoding takes the first.
    first = logits.argmax(-1, keepdim=True)
    ids = torch.cat([first, logits.scatter(-1, first, -torch.inf).topk(n_choices).indices], -1)[:, :n_choices]
    # In float32 at least: exact to what is shown, and half the memory of float64.
    wide = logits.float() if logits.element_size() < 4 else logits
    return ids, (wide.gather(-1, ids) - wide.logsumexp(-1, keepdim=True)).exp()
