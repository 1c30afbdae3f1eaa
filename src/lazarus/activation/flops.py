"""Floating-point operations of a run: those of all passes over the prompts, and of the LM heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from lazarus.activation.measure import Job, Part
from lazarus.batches import BatchPair, TokenBatch
from lazarus.engine import Head, ModelPair, Resident, RowPicker, Runner
from lazarus.estimating import count, count_passes
from lazarus.models import Clock
from lazarus.sites import Position


def flops_of_run(job: Job, part: Part, clock: Clock) -> int:
    """Return the operations of a part of a run, counted on a few tiny passes through the models in hand.

    They are those of `Job.run`, whether the models are read block by block or not.
    """
    pair, plan, noise = job.pair, job.plan, job.noise_plan(part)
    ours, theirs = [each.base for each in part.batches], [each.finetuned for each in part.batches]
    sides = (0,) if pair.is_alone else (0, 1)
    heads = [_head_flops(pair, side, clock) for side in sides]
    rows = sum(_head_rows(batch, plan.position) for batch in ours)
    total = rows * sum(heads) if pair.shares_vocabulary else 0
    prefixes = [_prefix_flops(pair, side, ours[0], clock) for side in sides]
    total += sum(prefixes)
    of_base = count_passes(_runs(pair, 0), clock, ours)
    if pair.is_alone:
        total += of_base.of(ours)
    elif pair.align == "ids":
        # Together: blocks that both models have in common run once, and with `localize` some run twice.
        both = Resident(pair, "last", localize=plan.localize)
        total += count_passes(lambda batch: both.run(BatchPair(batch, batch)), clock, ours).of(ours)
    else:
        total += of_base.of(ours) + count_passes(_runs(pair, 1), clock, theirs).of(theirs)
    for batch in part.sample:
        for parts in noise.recomposed(batch, pair.base.anatomy.context):
            # Each trial reads the prefix anew, and its logits are held against base's own, once more.
            total += prefixes[0] + of_base.of(parts)
            total += 2 * heads[0] * sum(_head_rows(each, plan.position) for each in parts)
    return total


def flops_beside(job: Job, part: Part, clock: Clock) -> int:
    """Return the operations of a part of a run where base's rows are kept, and only the other model runs."""
    pair, theirs = job.pair, [each.finetuned for each in part.batches]
    rows = sum(_head_rows(each.base, job.plan.position) for each in part.batches)
    heads = sum(_head_flops(pair, side, clock) for side in (0, 1)) if pair.shares_vocabulary else 0
    passes = count_passes(_runs(pair, 1), clock, theirs).of(theirs)
    return rows * heads + _prefix_flops(pair, 1, theirs[0], clock) + passes


def _runs(pair: ModelPair, side: int) -> Callable[[TokenBatch], object]:
    """Return what runs a batch through one of the two models."""
    return partial(_runner(pair, side).run, position="last")


def _runner(pair: ModelPair, side: int) -> Runner:
    model, conventions = (
        (pair.base, pair.base_conventions),
        (pair.finetuned, pair.finetuned_conventions),
    )[side]
    return Runner(model, conventions, pair.score_head(side))


def _prefix_flops(pair: ModelPair, side: int, batch: TokenBatch, clock: Clock) -> int:
    """Return the operations of a pass over the prefix that all batches have in common."""
    return count(lambda: _runner(pair, side).begin(batch, "last"), clock) if batch.prefix else 0


def _head_flops(pair: ModelPair, side: int, clock: Clock) -> int:
    """Return the operations of one row of logits."""
    runner = _runner(pair, side)
    if runner.head is None or runner.score_head is not None:
        return 0
    head: Head = runner.head
    width = runner.model.anatomy.hidden_size  # blocks of parallel streams are wider
    states = torch.zeros(2, width, dtype=runner.model.model.dtype, device=runner.model.device)
    one, two = (count(partial(head.logits, states[:n_rows]), clock) for n_rows in (1, 2))
    return two - one


def _head_rows(batch: TokenBatch, position: Position) -> int:
    """Return how many rows of a batch the head reads."""
    picker = RowPicker.of(batch, position)
    return len((RowPicker.of(batch, "last") if picker.average else picker).prompts)
