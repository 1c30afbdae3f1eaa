"""Run all batches of a comparison, in one process or shared by many, and accumulate what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from lazarus.activation.accumulation import Accumulation
from lazarus.activation.runplan import RunPlan
from lazarus.batches import BatchPair, TokenBatch
from lazarus.engine import GivenStates, KeptStates, ModelPair, NoisePlan, Work, run
from lazarus.metrics import AccumulatorState
from lazarus.notes import Note
from lazarus.shards import Shard, WorkFolder, run_shards, states
from lazarus.sites import StatePair

FEWER_IF_STREAMED = 8


def measure(
    job: Job, folder: WorkFolder | None, totals: Accumulation, running: Callable[[int], None]
) -> list[Note]:
    """Run all prompts through both models, and a sample of them through base again for the noise.

    `running` is told the number of tokens in all. Returns a note where a part of the work was done before.

    Raises:
        SaveError: the work is kept in a folder, and the disk gave out.
    """
    running(job.whole.n_tokens)
    if folder is not None:
        return _measure_shared(job, folder, totals)
    totals.take(job.run_all())
    return []


@dataclass(frozen=True)
class Part:
    """A part of the work: batches of the comparison, and of the noise."""

    batches: Sequence[BatchPair]
    sample: Sequence[TokenBatch]
    again: Sequence[TokenBatch] = ()
    """batches of other parts, of which the noise needs what base makes of them; not counted as work"""

    @property
    def n_tokens(self) -> int:
        """The tokens that run, those of the noise included."""
        return sum(b.base.n_tokens for b in self.batches) + sum(b.n_tokens for b in self.sample)

    @property
    def prompts(self) -> list[int]:
        """The prompts that run, those of the noise once more."""
        return [i for b in (*(pair.base for pair in self.batches), *self.sample) for i in b.prompts]

    def cut(self, most: int) -> list[Part]:
        """Cut the batches into at most so many runs, in order; the noise is one more piece of work."""
        edges = np.linspace(0, len(self.batches), min(len(self.batches), most) + 1).astype(int).tolist()
        runs = [Part(self.batches[start:end], []) for start, end in pairwise(edges)]
        sampled = {prompt for batch in self.sample for prompt in batch.prompts}
        # The noise may run in another process than these batches, and needs what base makes of their prompts.
        again = [pair.base for pair in self.batches if not sampled.isdisjoint(pair.base.prompts)]
        return [*runs, Part([], self.sample, again)] if self.sample else runs


@dataclass(frozen=True)
class Job:
    """The work of a run; `advanced` is told the tokens of each batch when it is done."""

    pair: ModelPair
    plan: RunPlan
    advanced: Callable[[int], None]
    given: GivenStates | None = None
    """of a model that runs alone: the states of a recording, on which its blocks run too"""
    paired: Callable[[Iterator[StatePair]], Iterator[StatePair]] = iter
    """puts a recording's states into the pairs of a model that runs alone"""
    kept: KeptStates | None = None
    """base's rows from an earlier run against it"""

    @cached_property
    def whole(self) -> Part:
        """Return the whole of it as one part."""
        return Part(self.plan.batches(self.pair), self.plan.noise_batches(self.pair))

    def run_all(self) -> Iterator[StatePair]:
        """Yield every pair of states; prompts of the same ids run once."""
        return self.run(self.whole)

    def run(self, part: Part) -> Iterator[StatePair]:
        """Yield every pair of states of a part."""
        plan = self.plan
        noise = self.noise_plan(part)
        work = Work(
            part.batches,
            part.sample,
            noise,
            plan.position,
            plan.localize,
            part.again,
            self.given,
            kept=self.kept,
        )
        return self.paired(run(self.pair, work, self.advanced))

    def noise_plan(self, part: Part) -> NoisePlan:
        """Return how the noise of a part is measured."""
        plan, n_sampled = self.plan, sum(len(batch.members) for batch in part.sample)
        return NoisePlan(
            n_prompts=n_sampled,
            batch_tokens=plan.batch_tokens,
            position=plan.position,
            padding=self.pair.padding(plan.longest),
            seed=plan.seed,
            among_others=n_sampled < len(plan.repeats.distinct),
        )


def shared_parts(job: Job, folder: WorkFolder) -> list[Part]:
    """Return the parts of a run that is kept in a folder."""
    # Each shard of a streamed run reads all weights again.
    most = folder.most_shards // FEWER_IF_STREAMED if job.pair.streams else folder.most_shards
    return job.whole.cut(most)


def _measure_shared(job: Job, folder: WorkFolder, totals: Accumulation) -> list[Note]:
    """Run the work in parts, each kept in the folder, by however many processes."""
    parts = shared_parts(job, folder)
    shards = [Shard(i, part.prompts, part.n_tokens) for i, part in enumerate(parts)]

    def run_shard(shard: Shard) -> AccumulatorState:
        # Sums of its own: the folder keeps what one shard has seen, not what came before.
        return Accumulation(totals.facts, totals.plan).take(job.run(parts[shard.number])).state()

    n_before = run_shards(folder, shards, run_shard, job.advanced)
    for state in states(folder, shards):
        totals.add(state)
    return note_reused(n_before, len(shards), folder)


def note_reused(n_before: int, n_shards: int, folder: WorkFolder) -> list[Note]:
    """Return a note that so many shards were done before, if any were."""
    told = f"{n_before} of {n_shards} shards were already in {folder.path}"
    return [Note("shards-reused", told)] if n_before else []
