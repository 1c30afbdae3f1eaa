"""One member against base, and against the member before it: the numbers of activation-diff."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lazarus.activation import Accumulation, Observer, Plan, conclude
from lazarus.activation.measure import Job
from lazarus.activation.prepare import Given, Prepared, prepare
from lazarus.activation.recorded import compare_recorded
from lazarus.activation.repeats import Repeats
from lazarus.activation.run import concluded
from lazarus.engine import KeptStates, SpillBuffer
from lazarus.errors import NoDataError
from lazarus.facts import ModelFacts, PairFacts, Site
from lazarus.loading import BaseKeeper
from lazarus.models import free_bytes, give_back
from lazarus.recorded import Side
from lazarus.recordings import Recording
from lazarus.result_classes import ActivationDiff
from lazarus.sites import StatePair
from lazarus.trajectory.rows import KeptRows, RowWriter, pairs_of, tapped

BASE_SHARE = 16
"""Base's rows may take one part in so many of the free memory; the others wait in files."""
BASE_FILE = "base.safetensors"


@dataclass
class Noise:
    """The noise of base, measured once: its trials, and how far it moves a margin."""

    trials: list[Any] = field(default_factory=list)
    margin: float = float("nan")


@dataclass(frozen=True)
class Compared:
    """A member that was compared with base, and its rows."""

    diff: ActivationDiff
    rows: KeptRows


class Pairwise:
    """Compares members with base one after another: base is loaded once, and runs once."""

    def __init__(self, base: Side, watcher: Observer, folder: Path) -> None:
        """Take base, and the folder that rows go to."""
        self._base, self._watcher, self._folder = base, watcher, folder
        self._load = BaseKeeper()
        self._stack = ExitStack()
        self._kept: KeptStates | None = None
        self._noise = Noise()
        self.base_rows = KeptRows(folder / BASE_FILE)
        self._has_base_rows = False
        """whether these are all there, and of this run: a folder may hold those of another one"""

    def __enter__(self) -> Pairwise:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def rows_of(self, number: int) -> KeptRows:
        """Return where the rows of a member are, or go to."""
        return KeptRows(self._folder / f"{number:05d}.safetensors")

    def prepare(self, given: Given, member: Side) -> Prepared | None:
        """Load a member; None where it or base is a recording.

        Raises:
            LazarusError: as `activation_diff`.
        """
        if isinstance(self._base, Recording) or isinstance(member, Recording):
            return None
        give_back()  # what the member before this one took
        return prepare(given, self._base, member, self._watcher, self._load)

    def compare(self, given: Given, member: Side, prepared: Prepared | None, number: int) -> Compared:
        """Compare a member with base; `prepared` is what `prepare` gave of it.

        Raises:
            LazarusError: as `activation_diff`.
        """
        rows = self.rows_of(number)
        with self._writers(rows) as (base, finetuned):
            if prepared is None:

                def tap(pairs: Iterator[StatePair]) -> Iterator[StatePair]:
                    return tapped(pairs, base, finetuned)

                diff = compare_recorded(replace(given, tap=tap), self._base, member, self._watcher)
            else:
                with given.running():
                    diff = self._compare_live(prepared, base, finetuned)
        if base is not None:
            self.base_rows = KeptRows(self.base_rows.path)
            # A recording may lack sites: then a later member tells base's rows there.
            everywhere: list[Site] = ["embedding", *range(diff.record.base.n_layers)]
            self._has_base_rows = all(map(self.base_rows.has, everywhere))
        return Compared(diff, rows)

    def done(self, diff: ActivationDiff, number: int) -> Compared:
        """Return a member that an earlier part of this run has compared."""
        self._has_base_rows = True
        return Compared(diff, self.rows_of(number))

    def against(self, previous: Compared, own: Compared) -> ActivationDiff | None:
        """Compare a member with the one before it, by their rows; None where the shapes differ.

        What chance may move is taken to be the noise of base.
        """
        return step(previous, own, self._noise)

    def _compare_live(
        self, prepared: Prepared, base: RowWriter | None, finetuned: RowWriter
    ) -> ActivationDiff:
        run, seen = prepared.run, Accumulation(prepared.facts, prepared.plan)
        if self._kept is None:
            buffer = SpillBuffer(free_bytes(prepared.given.device) // BASE_SHARE)
            self._kept = KeptStates(self._stack.enter_context(buffer))
        # Another pair may need another kernel or other batches: then base runs once more.
        is_known = self._kept.under(condition(prepared))
        if is_known:
            run = replace(run, noise_floor=False)
        kept = self._kept if can_keep(prepared) else None
        job = Job(prepared.pair, run, self._watcher.advanced, kept=kept)
        self._watcher.running(job.whole.n_tokens)
        seen.take(spread(job.run_all(), run.repeats, base, finetuned))
        if is_known:
            seen.noise, seen.margin_noise = self._noise.trials, self._noise.margin
        else:
            self._noise = Noise(seen.noise, seen.margin_noise)
        return concluded(prepared, seen, self._watcher)

    @contextmanager
    def _writers(self, rows: KeptRows) -> Iterator[tuple[RowWriter | None, RowWriter]]:
        """Open the file of a member's rows, and of base's where there is none yet; whole or not at all."""
        base = None if self._has_base_rows else RowWriter(self.base_rows.path)
        finetuned = RowWriter(rows.path)
        writers = [finetuned] if base is None else [base, finetuned]
        with ExitStack() as undo:
            for writer in writers:
                undo.callback(writer.discard)
            yield base, finetuned
            for writer in writers:
                writer.close()
            undo.pop_all()


def step(previous: Compared, own: Compared, noise: Noise) -> ActivationDiff | None:
    """Compare a member with the one before it, by their rows; None where the shapes differ."""
    ours, theirs = previous.diff.record, own.diff.record
    facts = PairFacts(_facts(previous.diff), _facts(own.diff))
    if not facts.same_shape:
        return None
    seen = Accumulation(facts, Plan(theirs.prompts, theirs.settings))
    has_logits = all(r.output is not None and r.output.kind == "next_token" for r in (ours, theirs))
    seen.take(
        pair for pair in pairs_of(previous.rows, own.rows, facts.sites) if has_logits or pair.site != "logits"
    )
    # Of two types of the run, one member's rounding is not that of the trials.
    if theirs.settings.noise_floor and ours.finetuned.run_dtype == theirs.finetuned.run_dtype:
        seen.noise, seen.margin_noise = noise.trials, noise.margin
    try:
        return conclude(seen)
    except NoDataError:
        return None


def spread(
    pairs: Iterator[StatePair], repeats: Repeats, base: RowWriter | None, finetuned: RowWriter
) -> Iterator[StatePair]:
    """Let pairs pass, and take the rows of every prompt, also of those that run once for several."""
    for pair in pairs:
        for each in repeats.spread(pair) if pair.trial is None else ():
            list(tapped(iter([each]), base, finetuned))
        yield pair


def _facts(diff: ActivationDiff) -> ModelFacts:
    """Return the facts of a member, as its comparison with base tells them."""
    has_final_norm = any(site.name == "final_norm" for site in diff.sites)
    return ModelFacts(diff.record.finetuned, has_final_norm=has_final_norm)


def can_keep(prepared: Prepared) -> bool:
    """Return whether base's rows stand in for base, so that it does not run with another member."""
    return not prepared.run.localize and not prepared.pair.streams


def condition(prepared: Prepared) -> object:
    """Return what must be the same for base's rows and noise to be the same."""
    pair, run = prepared.pair, prepared.run
    attention = getattr(pair.base.model.config, "_attn_implementation", None)
    padding = pair.padding(run.longest)
    # By the final norm and the head as well: the noise is measured at the sites that both have.
    sites = (tuple(map(str, prepared.facts.sites)), pair.shares_vocabulary, pair.scored is not None)
    return (
        attention,
        pair.base.run_dtype,
        run.position,
        run.n_prefix,
        run.batch_tokens,
        padding,
        run.noise_floor,
        sites,
        pair.streams,
        run.localize,
    )
