"""A run of series on stand-ins: one member beside base, in full, and what a member like it adds alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from lazarus.activation.accumulation import Accumulation
from lazarus.activation.flops import flops_beside, flops_of_run
from lazarus.activation.measure import Job, Part
from lazarus.activation.prepare import Given
from lazarus.activation.run import conclude_run
from lazarus.activation.trial import Trial
from lazarus.engine import KeptStates, RowPicker, SpillBuffer
from lazarus.loading import Model
from lazarus.models import Clock, free_bytes
from lazarus.notes import Notes
from lazarus.trajectory.distances import Distances
from lazarus.trajectory.pairwise import BASE_SHARE, Compared, Noise, can_keep, condition, spread, step
from lazarus.trajectory.rows import MOST_LOGITS_BYTES, KeptRows, RowWriter, add_distances


@dataclass
class Taken:
    """The sums that a member and base gave, and their rows in files."""

    seen: Accumulation
    base: RowWriter
    finetuned: RowWriter
    files: tuple[KeptRows, KeptRows]


@dataclass(frozen=True)
class Added:
    """The seconds and operations that a member adds to a series under way, beside its loading."""

    passes: float
    flops: int
    step: float
    """its comparison with the member before it"""
    distance: float
    """that of two models"""


class SeriesTrial(Trial[Taken]):
    """A run of base and a member on stand-ins; the rows of both go to files."""

    def __init__(self, given: Given, models: tuple[Model, Model], clock: Clock, folder: Path) -> None:
        self._folder, self._numbers = folder, count()
        self._begun: list[Taken] = []
        self._kept: KeptStates | None = None
        self.base_bytes = self.member_bytes = 0
        """of all rows of base and of the member, as they are written"""
        self.logits_bytes = 0
        """of those of the member, its logits"""
        super().__init__(given, models, clock)

    @property
    def keeps(self) -> bool:
        """Return whether base runs once for all members."""
        return can_keep(self.prepared)

    @property
    def condition(self) -> object:
        """Return what must be the same for base not to run once more."""
        return condition(self.prepared)

    def job(self, advanced: Callable[[int], None]) -> Job:
        """Return the work of the run, in which base's rows are kept."""
        return Job(self.pair, self.prepared.run, advanced, kept=self._kept)

    def begin(self) -> Taken:
        """Return sums, and files for rows."""
        one, other = (self._folder / f"{next(self._numbers)}.safetensors" for _ in range(2))
        seen = Accumulation(self.prepared.facts, self.prepared.plan)
        taken = Taken(seen, RowWriter(one), RowWriter(other), (KeptRows(one), KeptRows(other)))
        self._begun.append(taken)
        return taken

    def take(self, into: Taken, part: Part, advanced: Callable[[int], None]) -> None:
        """Run a part of the work, add it up, and write its rows."""
        # Only the second run of a batch is without base: then a member is alone.
        base = None if self.found.n_run else into.base
        pairs = self.job(advanced).run(part)
        into.seen.take(spread(pairs, self.prepared.run.repeats, base, into.finetuned))

    def kept_bytes(self, into: Taken) -> int:
        """Return the size of the sums, and of base's rows, as far as they wait in memory."""
        sums = sum(array.nbytes for array in into.seen.state().values())
        room = free_bytes(self.given.device) // BASE_SHARE
        return sums + (min(into.base.n_bytes, room) if self.keeps else 0)

    def conclude(self, into: Taken) -> None:
        """Make the result, and close the files."""
        self._diff = conclude_run(self.prepared, into.seen, None, (Notes(), Notes()))
        self._taken = into

    def run(self) -> None:
        """Run some batches with base, then these without it, and what is made of their rows."""
        with SpillBuffer(free_bytes(self.given.device) // BASE_SHARE) as buffer:
            self._kept = KeptStates(buffer) if self.keeps else None
            try:
                super().run()
                self.added = self._add()
            finally:
                for taken in self._begun:
                    taken.base.discard()
                    taken.finetuned.discard()

    def _add(self) -> Added:
        """Measure what a member adds."""
        taken, found, times = self._taken, self.found, self.times_more
        started = self.clock.now()
        taken.base.close()
        taken.finetuned.close()
        found.conclusion += (self.clock.now() - started) / 2
        base, member = taken.files
        self._count(base, member)
        started = self.clock.now()
        compared = Compared(self._diff, member)
        step(compared, compared, Noise())
        stepped = self.clock.now()
        add_distances(Distances.empty(self.prepared.facts.sites, 2), [base, member])
        ended = self.clock.now()
        without_noise = Part(self.work.batches, [])
        job = self.job(lambda _: None)
        if self._kept is not None:
            passes, flops = self.again(), flops_beside(job, without_noise, self.clock)
        else:
            passes, flops = found.passes, flops_of_run(job, without_noise, self.clock)
        return Added(passes, flops, times * (stepped - started), times * (ended - stepped))

    def _count(self, base: KeptRows, member: KeptRows) -> None:
        """Count what all rows take in files, by those that were written."""
        run = self.prepared.run
        owners = [
            p for each in self.work.batches for p in RowPicker.of(each.base, run.position).prompts.tolist()
        ]
        n_all = sum(1 + len(run.repeats.others.get(prompt, ())) for prompt in owners)
        ours, theirs = base.sizes(), member.sizes()
        n_written = member.n_rows
        self.base_bytes = sum(ours.values()) * n_all // n_written
        logits = theirs.pop("logits", 0) * n_all // n_written
        self.logits_bytes = min(logits, MOST_LOGITS_BYTES)
        self.member_bytes = sum(theirs.values()) * n_all // n_written + self.logits_bytes
