"""The noise of a block's own change: base's blocks on base's own states, as another run has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lazarus.activation.measure import Job
from lazarus.activation.recorded_rows import averaged
from lazarus.batches import BatchPair, TokenBatch, make_batches
from lazarus.engine import EXTRA_PADDING, GivenStates, NoisePlan, Work, run
from lazarus.facts import Site
from lazarus.sites import Position, StatePair, tokens_of
from lazarus.tokens import TokenizedPrompt


def local_noise(job: Job, recorded_dtype: str, again: GivenStates | None = None) -> Iterator[StatePair]:
    """Yield what each block of base makes of base's own states, as another run of a few prompts has them.

    Each trial runs these prompts in other batches, with what enters the first block moved by one unit in the
    last place, and takes the states for a recording, in its type. So a block differs from itself by as much
    as two runs of one block do. A pair has the number of its trial; `finetuned` is the state after the block
    in the other run, and `local` what the block makes of the state before it. The states `again`, of another
    run of base that the caller has, are one more trial.
    """
    prompts = [prompt for batch in job.whole.sample for prompt in batch.members]
    generator = torch.Generator().manual_seed(job.plan.seed)
    dtype = getattr(torch, recorded_dtype, torch.float32)
    own = _batches(job, prompts)
    alone = [replace(batch, members=[prompt]) for batch in own for prompt in batch.members]
    for trial, batches in enumerate((alone, _padded(job, own))):
        states = _states(job, batches, generator, dtype)
        yield from _replayed(job, own, states, trial)
    if again is not None:
        yield from _replayed(job, own, again, 2)


def _batches(job: Job, prompts: Sequence[TokenizedPrompt]) -> list[TokenBatch]:
    padding = job.pair.padding(job.plan.longest)
    return make_batches(prompts, job.plan.batch_tokens, padding, job.plan.pad_ids[0])


def _padded(job: Job, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Return the batches with more padding, where padding is right for the model and there is room for it."""
    context = job.pair.base.anatomy.context
    if job.pair.padding(job.plan.longest) != "right":
        return list(batches)
    return [
        replace(batch, extra_padding=min(EXTRA_PADDING, max(0, (context or 10**9) - batch.padded_length)))
        for batch in batches
    ]


def _states(
    job: Job, batches: Sequence[TokenBatch], generator: torch.Generator, dtype: torch.dtype
) -> GivenStates:
    """Run these batches, moved, and return the states of every token of their prompts, in a type."""
    rows: dict[tuple[int, Site], Tensor] = {}
    work = replace(_work(job, batches, "every"), nudge=generator)
    for pair in run(job.pair, work, lambda _: None):
        if pair.site == "embedding" or isinstance(pair.site, int):
            for prompt in torch.unique_consecutive(pair.prompts).tolist():
                own = (pair.prompts == prompt).to(pair.base.device)
                rows[prompt, pair.site] = pair.base[own].to(dtype)
    return lambda prompt, site: rows[prompt, site]


def _replayed(
    job: Job, batches: Sequence[TokenBatch], states: GivenStates, trial: int
) -> Iterator[StatePair]:
    position = job.plan.position
    tokens = {prompt.index: tokens_of(prompt, position) for batch in batches for prompt in batch.members}
    for pair in run(job.pair, replace(_work(job, batches, position), given=states), lambda _: None):
        if pair.local is None:
            continue
        picked = [
            states(prompt, pair.site)[list(tokens[prompt])]
            for prompt in torch.unique_consecutive(pair.prompts).tolist()
        ]
        after = torch.cat([averaged(rows) if position == "mean" else rows for rows in picked])
        yield StatePair(pair.site, pair.prompts, after, after, pair.local, trial)


def _work(job: Job, batches: Sequence[TokenBatch], position: Position) -> Work:
    padding = job.pair.padding(job.plan.longest)
    nothing = NoisePlan(0, job.plan.batch_tokens, position, padding, job.plan.seed)
    return Work(BatchPair.same(batches), [], nothing, position, localize=False)
