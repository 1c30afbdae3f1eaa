"""A run of activation_diff on stand-ins for its models, of as many batches as there is time for."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import psutil

from lazarus.activation.accumulation import Accumulation
from lazarus.activation.measure import Job, Part
from lazarus.activation.prepare import Given, Prepared, learn_models, read_asked
from lazarus.activation.run import conclude_run
from lazarus.batches import BatchPair
from lazarus.engine import KEPT_SHARE, ModelPair, Runner
from lazarus.estimating import Sampled, Size, extrapolated, reset_peak, spread_out
from lazarus.loading import Model, load_stand_ins
from lazarus.models import Clock, StandInPager, free_bytes, give_back
from lazarus.notes import Notes

S = TypeVar("S")
"""what takes pairs of states in"""
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
    n_run: int = 0
    """batches that ran"""
    growth: int = 0
    """bytes that what is kept of the batches that did not run would take"""


class Trial(ABC, Generic[S]):
    """A run on stand-ins. Making it reads the prompts and learns how the models behave, as a run does.

    A command says what it does with pairs of states: `begin` makes what takes them in, `take` runs a part of
    the work into that, `conclude` makes the result of it.
    """

    def __init__(self, given: Given, models: tuple[Model, ...], clock: Clock) -> None:
        self.given, self.clock = given, clock
        self.rss = psutil.Process().memory_info().rss
        """what the process held before"""
        # What is inside of blocks is seen only where they run.
        whole = given.options.sites == "all"
        self.standing = load_stand_ins(models, given.options, given.work, clock, whole=whole)
        give_back()
        self.knows_peak = reset_peak(given.device)
        """whether a peak of memory is that of the trial, and not one that the process had before"""
        started = clock.now()
        notes = Notes(given.prompts.notes)
        reading = read_asked(given, self.standing.models, notes)
        self.prepared = self.settled(learn_models(given, self.standing.models, reading, notes))
        self.found = Measured(clock.now() - started)
        self.work = self.job(lambda _: None).whole
        sides = [
            [each.base] if self.pair.is_alone else [each.base, each.finetuned] for each in self.work.batches
        ]
        self.sizes = [Size(sum(batch.n_padded for batch in batches)) for batches in sides]
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

    @property
    def bytes_written(self) -> int:
        """Return what the run writes."""
        return 0

    def settled(self, prepared: Prepared) -> Prepared:
        """Return what is run, with what the command itself decides."""
        return prepared

    @abstractmethod
    def begin(self) -> S:
        """Return what takes pairs of states in."""

    @abstractmethod
    def take(self, into: S, part: Part, advanced: Callable[[int], None]) -> None:
        """Run a part of the work; `advanced` is told of each batch that is done."""

    @abstractmethod
    def kept_bytes(self, into: S) -> int:
        """Return the memory of what was taken in, as far as it grows with the batches."""

    @abstractmethod
    def conclude(self, into: S) -> None:
        """Make the result."""

    def run(self) -> None:
        """Run some batches, the noise and the conclusion."""
        seen = self.begin()
        before = self.bytes_read
        sampled = self._streamed(seen) if self.pair.streams else self._resident(seen)
        self.found.passes, self.found.n_run = sampled.seconds, sampled.n_run
        if not self.pair.streams:  # where a pass cannot go on after a block, each batch reads all of them
            self.run_bytes = (self.bytes_read - before) * len(self.sizes) // sampled.n_run
        if self.work.sample:
            self.found.noise = self._noise()
        self.found.growth = round((self.times_more - 1) * self.kept_bytes(seen))
        started, before = self.clock.now(), self.bytes_read
        self.conclude(seen)
        self.found.conclusion = self.times_more * (self.clock.now() - started)
        self.learnt_bytes += self.bytes_read - before

    @property
    def times_more(self) -> float:
        """Return the number of all batches over that of those that ran."""
        return len(self.sizes) / self.found.n_run

    def again(self) -> float:
        """Run the batches that ran once more, in memory, and return the time of all of them."""
        self.order = self.order[: self.found.n_run]
        return self._resident(self.begin()).seconds

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
        alone = self.pair.is_alone
        return sum(
            ours * each.base.n_padded + (0 if alone else theirs * each.finetuned.n_padded) for each in chosen
        )

    def time_base(self) -> None:
        """Measure passes of base alone, on the largest batch, and tell what all of them take."""
        batches = [each.base for each in self.work.batches]
        largest = max(batches, key=lambda batch: batch.n_padded)
        runner = Runner(self.pair.base, self.pair.base_conventions)
        runner.begin(largest, "last")
        started = self.clock.now()
        runner.run(largest, "last")
        seconds = self.clock.now() - started
        costs = [Size(batch.n_padded).cost for batch in batches]
        self.found.base_passes = seconds * sum(costs) / Size(largest.n_padded).cost

    def _resident(self, seen: S) -> Sampled:
        """Run batches until the time is up."""
        ends, until = [self.clock.now()], time.perf_counter() + BUDGET_SECONDS

        def advanced(_: int) -> None:
            ends.append(self.clock.now())
            if time.perf_counter() > until:
                raise _EnoughError

        with suppress(_EnoughError):
            self.take(seen, self._part(self.order), advanced)
        taken = [end - start for start, end in pairwise(ends)]
        return extrapolated(self.sizes, dict(zip(self.order, taken, strict=False)))

    def _streamed(self, seen: S) -> Sampled:
        """Run one batch and then a few, block by block: what is read once, and what each takes."""
        few, alone = self.order[:N_STREAMED], self.order[:2][-1:]
        once, before = self._seconds(self.begin(), self._part(alone)), self.bytes_read
        several = self._seconds(seen, self._part(few))
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

    def _part(self, indices: Sequence[int]) -> Part:
        """Return these batches, without noise."""
        return Part([self.work.batches[i] for i in indices], [])

    def _seconds(self, into: S, part: Part) -> float:
        """Run a part of the work, and return its time."""
        started = self.clock.now()
        self.take(into, part, lambda _: None)
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
            without, with_it = (self._seconds(self.begin(), Part(pairs, noise)) for noise in ([], sample))
            return max(0.0, with_it - without)
        ends = [self.clock.now()]
        self.take(self.begin(), Part(pairs, sample), lambda _: ends.append(self.clock.now()))
        # Each batch of both models is followed by its noise.
        return sum(end - start for start, end in list(pairwise(ends))[1::2])


class DiffTrial(Trial[Accumulation]):
    """A run of activation_diff on stand-ins."""

    def begin(self) -> Accumulation:
        """Return the sums of a comparison."""
        return Accumulation(self.prepared.facts, self.prepared.plan)

    def take(self, into: Accumulation, part: Part, advanced: Callable[[int], None]) -> None:
        """Run a part of the work, and add it up."""
        into.take(self.job(advanced).run(part))

    def kept_bytes(self, into: Accumulation) -> int:
        """Return the size of the sums, and of the rows that are kept."""
        return sum(array.nbytes for array in into.state().values())

    def conclude(self, into: Accumulation) -> None:
        """Make the result, but for an attribution."""
        conclude_run(self.prepared, into, None, (Notes(), Notes()))
