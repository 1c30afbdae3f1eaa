"""A prefix that all prompts have in common, such as a chat template's system prompt, runs once in each model.

A causal model reads it without knowing what follows, so its states are the same for every prompt, but for the
rounding of products of other shapes. Whether a model goes on from its cache as it should is not taken from a
list of families. Where a cache is more than keys and values, some go on wrongly and do not say so (Jamba,
Zamba), and in bfloat16 that may look like rounding: there the prefix runs with every prompt. Everywhere else
a few prompts decide: they run whole and from the cache, in both models, and must give the same rows at every
site. The longest is among them, because a window of attention that is handled wrongly (Moshi's) shows only in
prompts that are longer than it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from lazarus.batches import BatchPair, make_batches
from lazarus.engine.pair import ModelPair
from lazarus.engine.resident import run_pairs
from lazarus.errors import DeviceError, UnsupportedModelError
from lazarus.metrics import relative_l2
from lazarus.notes import Notes
from lazarus.sites import Position
from lazarus.tokens import TokenizedPrompt

FEWEST_TOKENS = 16
"""A shorter prefix hardly costs more than what goes on around a batch."""
SMALLEST_SAVING = 0.25
"""The share of all tokens that must be saved, net of the check: less is not worth another rounding."""
CHECKED_PROMPTS = 4


@dataclass(frozen=True)
class PrefixPlan:
    """The settings of a run that matter to a shared prefix."""

    position: Position
    batch_tokens: int
    pad_id: int
    obstacle: str | None = None
    """what in this run needs every prompt whole, as a clause of a note"""


def common_prefix(prompts: Sequence[TokenizedPrompt], leave: int = 1) -> int:
    """The number of first ids that all prompts have in common; each has at least `leave` more."""
    if not prompts:
        return 0
    # What the first and the last in order begin with, all between them begin with.
    first, last = min(prompts, key=_ids).ids, max(prompts, key=_ids).ids
    common = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], zip(first, last, strict=False)))
    return max(0, min(common, min(len(prompt.ids) for prompt in prompts) - leave))


def share_prefix(pair: ModelPair, prompts: Sequence[TokenizedPrompt], plan: PrefixPlan, notes: Notes) -> int:
    """Return how many first tokens of all prompts run once, if that saves enough and changes nothing.

    0 if not; rounding may differ. A prefix that would save enough is noted, whether it runs once or not.
    """
    position = plan.position
    n_tokens = common_prefix(prompts, -position if isinstance(position, int) and position < 0 else 1)
    if position == "response":  # the compared tokens of a prefix are those of every prompt
        n_tokens = min([n_tokens, *(prompt.response[0].start for prompt in prompts)])
    if n_tokens < FEWEST_TOKENS:
        return 0
    # Prompts of the same ids run once in any case: they save nothing.
    distinct = list({(tuple(prompt.ids), prompt.response): prompt for prompt in prompts}.values())
    checked = _pick_checked(distinct)
    if not _pays(distinct, checked, n_tokens):
        return 0
    obstacle = _obstacle(pair, distinct, plan) or _difference(pair, checked, n_tokens, plan)
    which = f"the first {n_tokens} tokens, the same in all prompts, ran"
    told = f"{which} once" if obstacle is None else f"{which} with each of them: {obstacle}"
    notes.add("shared-prefix", told)
    return n_tokens if obstacle is None else 0


def _ids(prompt: TokenizedPrompt) -> list[int]:
    return list(prompt.ids)


def _pick_checked(prompts: Sequence[TokenizedPrompt]) -> list[TokenizedPrompt]:
    """The longest, the shortest, and some between."""
    ordered = sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.index))
    places = {(len(ordered) - 1) * i // (CHECKED_PROMPTS - 1) for i in range(CHECKED_PROMPTS)}
    return [ordered[place] for place in sorted(places)]


def _pays(prompts: Sequence[TokenizedPrompt], checked: Sequence[TokenizedPrompt], n_tokens: int) -> bool:
    """Return whether so many fewer tokens run, when what the check runs is counted as well."""
    saved = (len(prompts) - 1) * n_tokens
    # Each checked prompt runs whole, and again without the prefix, which runs once.
    spent = n_tokens + sum(2 * len(prompt.ids) - n_tokens for prompt in checked)
    return saved - spent >= SMALLEST_SAVING * sum(len(prompt.ids) for prompt in prompts)


def _obstacle(pair: ModelPair, prompts: Sequence[TokenizedPrompt], plan: PrefixPlan) -> str | None:
    """Return what in the run or in the models needs every prompt whole; None if nothing does."""
    if plan.obstacle is not None:
        return plan.obstacle
    if pair.streams:
        return "the models run one block at a time"
    if pair.align == "text":
        return "each model reads the texts its own way"
    if not (pair.base_conventions.causal and pair.finetuned_conventions.causal):
        return "they are not read from left to right alone"
    if pair.padding(max(len(prompt.ids) for prompt in prompts)) != "right":
        return "prompts of several lengths cannot run together"
    return None


def _difference(
    pair: ModelPair, checked: Sequence[TokenizedPrompt], n_tokens: int, plan: PrefixPlan
) -> str | None:
    """Return what is not the same when these prompts go on from the prefix's cache; None if nothing is."""
    whole = make_batches(checked, plan.batch_tokens, "right", plan.pad_id)
    # Two generators, run in step: one batch's rows of each are held at a time.
    expected = _states(pair, BatchPair.same(whole), plan.position)
    try:
        found = _going_on(pair, BatchPair.same([batch.after(n_tokens) for batch in whole]), plan.position)
        for one, other in zip(expected, found, strict=True):
            if not one.isfinite().all() or not other.isfinite().all():
                return "states are not finite, so it cannot be seen whether a cache of them changes any"
            unlike = (one != other).any(dim=-1)  # of two rows of zeros no ratio is defined
            worst = relative_l2(one[unlike], other[unlike]).max().item() if unlike.any() else 0.0
            if worst > _limit(one.dtype):
                return f"states that went on from a cache of them differed by {worst:.2g} of their norm"
    except _NoCacheError as error:
        return str(error)
    return None


class _NoCacheError(Exception):
    """A model does not go on from a cache; the message is a clause on why."""


def _going_on(pair: ModelPair, batches: Sequence[BatchPair], position: Position) -> Iterator[Tensor]:
    """The same rows, of passes that go on from a cache. That they fail is no fault of whole passes."""
    try:
        yield from _states(pair, batches, position)
    except UnsupportedModelError as error:
        raise _NoCacheError("this architecture does not go on from a cache of keys and values") from error
    except DeviceError as error:
        raise _NoCacheError(f"going on from a cache of them failed: {error.marked.rstrip('.')}") from error


def _states(pair: ModelPair, batches: Sequence[BatchPair], position: Position) -> Iterator[Tensor]:
    """Both models' compared rows at every site but the logits."""
    for states in run_pairs(pair, batches, position, lambda _: None):
        if states.site != "logits":
            yield states.base
            yield states.finetuned


def _limit(dtype: torch.dtype) -> float:
    """The most that rows of the two ways may be apart: above the rounding of products, below a fault."""
    return max(1e-3, 16 * torch.finfo(dtype).eps)
