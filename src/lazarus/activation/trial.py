"""A run of activation_diff on stand-ins for its models, of as many batches as there is time for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import psutil

from lazarus.activation.accumulation import Accumulation
from lazarus.activation.measure import Job, Part
from lazarus.activation.prepare import Given, learn_models, read_asked
from lazarus.activation.run import conclude_run
from lazarus.batches import BatchPair, TokenBatch
from lazarus.engine import KEPT_SHARE, ModelPair, Runner
from lazarus.estimating import Sampled, Size, extrapolated, reset_peak, spread_out
from lazarus.loading import Model, load_stand_ins
from lazarus.models import Clock, StandInPager, free_bytes, give_back
from lazarus.notes import Notes

BUDGET_SECONDS = 2.5
"""for how long batches are run"""
N_STREAMED = 3
"""batches that run block by block"""


class _EnoughError(Exception):
    """The time is up."""


@dataclass
class Measured:
    """The time of the parts of a run, in seconds."""

    learning: float
    passes: float = 0.0
    noise: float = 0.0
    conclusion: float = 0.0
    base_passes: float = 0.0
    """of base alone, over all prompts, without heads and metrics"""
    growth: int = 0
    """bytes that what is kept of the batches that did not run would take"""


class Trial:
    """A run on stand-ins. Making it reads the prompts and learns how the models behave, as a run does."""

    def __init__(self, given: Given, models: tuple[Model, Model], clock: Clock) -> None:
        self.given, self.clock = given, clock
        self.rss = psutil.Process().memory_info().rss
        """what the process held before"""
        # What is inside of blocks is seen only where they run.
        whole = given.options.sites == "all"
        self.standing = load_stand_ins(models, given.options, given.device, clock, whole=whole)
        give_back()
        reset_peak()
        started = clock.now()
        notes = Notes(given.prompts.notes)
        reading = read_asked(given, self.standing.models, notes)
        self.prepared = learn_models(given, self.standing.models, reading, notes)
        self.found = Measured(clock.now() - started)
        self.work = self.job(lambda _: None).whole
        self.sizes = [Size(padded(each.base) + padded(each.finetuned)) for each in self.work.batches]
        self.order = spread_out(self.sizes)
        """that in which batches run here"""
        self.learnt_bytes, self.run_bytes = self.bytes_read, 0
        """what is read of the files beside the batches and by them, where blocks are read one by one"""

    @property
    def pair(self) -> ModelPair:
        """Return the two stand-ins, as far as they are known."""
        return self.prepared.pair

    def job(self, advanced: Callable[[int], None]) -> Job:
        """Return the work of the run."""
        return Job(self.pair, self.prepared.run, advanced)

    @property
    def bytes_read(self) -> int:
        """Return what would have been read by now, block by block."""
        pagers = [model.pager for model in self.standing.models]
        return sum(pager.n_bytes for pager in pagers if isinstance(pager, StandInPager))

    def run(self) -> None:
        """Run some batches, the noise and the conclusion."""
        seen = Accumulation(self.prepared.facts, self.prepared.plan)
        before = self.bytes_read
        sampled = self._streamed(seen) if self.pair.streams else self._resident(seen)
        self.found.passes = sampled.seconds
        if not self.pair.streams:  # where a pass cannot go on after a block, each batch reads all of them
            self.run_bytes = (self.bytes_read - before) * len(self.sizes) // sampled.n_run
        if self.work.sample:
            self.found.noise = self._noise()
        left = len(self.sizes) / sampled.n_run - 1
        self.found.growth = round(left * sum(array.nbytes for array in seen.state().values()))
        started, before = self.clock.now(), self.bytes_read
        conclude_run(self.prepared, seen, None, (Notes(), Notes()))
        self.found.conclusion = (1 + left) * (self.clock.now() - started)
        self.learnt_bytes += self.bytes_read - before

    @property
    def waiting_bytes(self) -> int:
        """Return what the states that wait between two blocks take beyond those of the batches that ran."""
        whole, ran = (self._state_bytes(chosen) for chosen in (self.order, self.order[:N_STREAMED]))
        return max(0, min(whole, free_bytes(self.given.device) // KEPT_SHARE) - ran)

    def _state_bytes(self, indices: Sequence[int]) -> int:
        """Return what one hidden state of every token takes, of these batches and both models."""
        models = self.pair.base, self.pair.finetuned
        ours, theirs = (w * m.model.dtype.itemsize for w, m in zip(self.pair.widths, models, strict=True))
        chosen = [self.work.batches[i] for i in indices]
        return sum(ours * padded(each.base) + theirs * padded(each.finetuned) for each in chosen)

    def time_base(self) -> None:
        """Measure passes of base alone, on the largest batch, and tell what all of them take."""
        batches = [each.base for each in self.work.batches]
        largest = max(batches, key=padded)
        runner = Runner(self.pair.base, self.pair.base_conventions)
        runner.begin(largest, "last")
        started = self.clock.now()
        runner.run(largest, "last")
        seconds = self.clock.now() - started
        costs = [Size(padded(batch)).cost for batch in batches]
        self.found.base_passes = seconds * sum(costs) / Size(padded(largest)).cost

    def _resident(self, seen: Accumulation) -> Sampled:
        """Run batches until the time is up."""
        ends, until = [self.clock.now()], time.perf_counter() + BUDGET_SECONDS

        def advanced(_: int) -> None:
            ends.append(self.clock.now())
            if time.perf_counter() > until:
                raise _EnoughError

        chosen = [self.work.batches[i] for i in self.order]
        with suppress(_EnoughError):
            seen.take(self.job(advanced).run(Part(chosen, [])))
        taken = [end - start for start, end in pairwise(ends)]
        return extrapolated(self.sizes, dict(zip(self.order, taken, strict=False)))

    def _streamed(self, seen: Accumulation) -> Sampled:
        """Run one batch and then a few, block by block: what is read once, and what each takes."""
        few, alone = self.order[:N_STREAMED], self.order[:2][-1:]
        scratch = Accumulation(self.prepared.facts, self.prepared.plan)
        once, before = self._stream(scratch, alone), self.bytes_read
        several = self._stream(seen, few)
        self.run_bytes = self.bytes_read - before
        costs = [sum(self.sizes[i].cost for i in indices) for indices in (alone, few, self.order)]
        if costs[1] == costs[0]:
            return Sampled(max(several, self._reading()), len(few))
        rate = max(0.0, (several - once) / (costs[1] - costs[0]))
        return Sampled(max(several + rate * (costs[2] - costs[1]), self._reading()), len(few))

    def _reading(self) -> float:
        """Return what reading all blocks takes, which goes on while others compute."""
        pagers = [model.pager for model in self.standing.models]
        found = [pager for pager in pagers if isinstance(pager, StandInPager)]
        return sum(pager.reading_seconds(i) for pager in found for i in range(pager.n_blocks))

    def _stream(self, seen: Accumulation, indices: Sequence[int]) -> float:
        started = self.clock.now()
        seen.take(self.job(lambda _: None).run(Part([self.work.batches[i] for i in indices], [])))
        return self.clock.now() - started

    def _noise(self) -> float:
        """Return the time of the noise: of its prompts with it, less that without."""
        prepared, sample = self.prepared, self.work.sample
        reading = prepared.reading
        pairs = (
            BatchPair.same(sample)
            if self.pair.align == "ids"
            else BatchPair.of(sample, reading.finetuned, reading.pad_ids[1])
        )
        if self.pair.streams:
            without, with_it = (self._seconds(Part(pairs, noise)) for noise in ([], sample))
            return max(0.0, with_it - without)
        ends = [self.clock.now()]
        self._take(Part(pairs, sample), lambda _: ends.append(self.clock.now()))
        # Each batch of both models is followed by its noise.
        return sum(end - start for start, end in list(pairwise(ends))[1::2])

    def _seconds(self, part: Part) -> float:
        started = self.clock.now()
        self._take(part, lambda _: None)
        return self.clock.now() - started

    def _take(self, part: Part, advanced: Callable[[int], None]) -> None:
        Accumulation(self.prepared.facts, self.prepared.plan).take(self.job(advanced).run(part))


def padded(batch: TokenBatch) -> int:
    """Return how many tokens of a batch run, padding included."""
    return len(batch.members) * batch.padded_length
