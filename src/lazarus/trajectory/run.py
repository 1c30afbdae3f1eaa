"""series: many models against one base, which is loaded and run once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Unpack, runtime_checkable

import msgspec
import numpy as np

from lazarus.activation import Prompts
from lazarus.activation.prepare import Prepared, take_up
from lazarus.activation.run import given_for
from lazarus.errors import PromptsError, UsageError
from lazarus.foreign import user_path
from lazarus.loading import Model, Role
from lazarus.messages import option
from lazarus.notes import Notes, notes_of
from lazarus.options import SeriesArguments, SeriesOptions
from lazarus.prompts import EXAMPLE, Prompt, PromptList, make_prompts
from lazarus.provenance import now, tool
from lazarus.ranks import Rank, find_rank
from lazarus.recorded import Side, opened
from lazarus.recordings import Recording
from lazarus.result_classes import ActivationDiff, Series
from lazarus.results import (
    SCHEMA_VERSION,
    Predecessor,
    SeriesMember,
    SeriesRecord,
    finite_or_none,
    steps_of,
)
from lazarus.scratch import ScratchFolder
from lazarus.shards import WorkFolder
from lazarus.trajectory.distances import Distances, Floats, turns
from lazarus.trajectory.findings import Seen, find
from lazarus.trajectory.members import expand, listed
from lazarus.trajectory.pairwise import Compared, Pairwise
from lazarus.trajectory.rows import add_distances


@runtime_checkable
class SeriesObserver(Protocol):
    """An object that is told how far a series has come."""

    def loading(self, role: Role, name: str) -> None:
        """A model is about to be loaded: base once, and each member."""

    def testing(self, n_members: int, prompts: Sequence[Prompt]) -> None:
        """Base is there, and these are the prompts."""

    def running(self, n_members: int) -> None:
        """So many members are to be compared."""

    def advanced(self, n_members: int) -> None:
        """Count so many more members as compared."""


class _Silence:
    def loading(self, role: Role, name: str) -> None: ...
    def testing(self, n_members: int, prompts: Sequence[Prompt]) -> None: ...
    def running(self, n_members: int) -> None: ...
    def advanced(self, n_members: int) -> None: ...


class _PairObserver:
    """Tells the observer of a series what the pairs in it tell: base, and the prompts, once."""

    def __init__(self, watcher: SeriesObserver, n_members: int) -> None:
        self._watcher, self._n_members = watcher, n_members
        self._has_base = self._has_prompts = False

    def loading(self, role: Role, name: str) -> None:
        if role == "finetuned" or not self._has_base:
            self._watcher.loading(role, name)
        self._has_base = self._has_base or role == "base"

    def testing(self, prompts: Sequence[Prompt]) -> None:
        if not self._has_prompts:
            self._watcher.testing(self._n_members, prompts)
            self._watcher.running(self._n_members)
        self._has_prompts = True

    def running(self, n_tokens: int) -> None: ...
    def advanced(self, n_tokens: int) -> None: ...


def series(
    base: Model,
    members: Model | Sequence[Model] | Mapping[str, Model],
    prompts: Prompts | None = None,
    *,
    tokenizer: Any | None = None,
    observer: SeriesObserver | None = None,
    **options: Unpack[SeriesArguments],
) -> Series:
    """Compare many models with one base, and each with the one before it.

    Args:
        base: as for `activation_diff`.
        members: the models in their order, each as for `activation_diff`. A text may be a glob
            (`run/checkpoint-*`, in natural order) or hold alternatives (`org/model@{step1000,step2000}`).
            A mapping says what each is called, as models in memory have no names.
        prompts: as for `activation_diff`.
        tokenizer: the tokenizer of models in memory, or a folder or Hub id that holds it.
        observer: is told how far the series has come.
        options: the command line's options, with underscores: `position="last"`, `work_dir="done"`.

    Returns:
        Each member against base, with the numbers of `activation_diff` bit for bit, and against the member
        before it; the distance of any two; and findings: copies, members out of order, a change of training.

    Raises:
        UsageError: an option or the prompts are wrong, a glob matches nothing, or the folder of `work_dir`
            belongs to another run.
        LazarusError: as `activation_diff`.
    """
    chosen = SeriesOptions.make(**options)
    if find_rank().world > 1:
        raise UsageError(
            "a series runs in one process. Unset RANK, WORLD_SIZE, SLURM_PROCID and SLURM_NTASKS, or compare "
            "the members one by one with activation-diff."
        )
    names = list(members) if isinstance(members, Mapping) else None
    models = list(members.values()) if isinstance(members, Mapping) else expand(listed(members))
    sides = opened(base), [opened(member) for member in models]
    found = given_prompts(
        prompts, chosen, has_recording=any(isinstance(s, Recording) for s in (sides[0], *sides[1]))
    )
    watcher = _PairObserver(observer or _Silence(), len(sides[1]))
    with _folder(chosen) as folder, Pairwise(sides[0], watcher, folder) as pairwise:
        run = _Run(chosen, pairwise, folder, tokenizer)
        for number, member in enumerate(sides[1]):
            run.take(number, sides[0], member, found)
            (observer or _Silence()).advanced(1)
        return run.conclude(names)


class _Run:
    """One run over all members."""

    def __init__(
        self, options: SeriesOptions, pairwise: Pairwise, folder: Path, tokenizer: Any | None
    ) -> None:
        self._options, self._pairwise, self._folder = options, pairwise, folder
        self._tokenizer = tokenizer
        self._sides: list[Side] = []
        self._compared: list[Compared] = []
        self._previous: list[ActivationDiff | None] = []

    def take(self, number: int, base: Side, member: Side, prompts: PromptList | None) -> None:
        """Compare the next member with base, and with the one before it; or read what is done already."""
        chosen = self._options
        self._sides.append(member)
        given = given_for((_named(base), _named(member)), prompts, self._tokenizer, Rank(), chosen.of_pair())
        prepared = self._pairwise.prepare(given, member)
        saved = self._folder / f"{number:05d}.json"
        step = saved.with_suffix(".previous.json")
        if chosen.work_dir is not None and prepared is not None:
            self._take_up(number, prepared)
            if saved.exists():
                self._compared.append(self._pairwise.done(ActivationDiff.load(saved), number))
                self._previous.append(ActivationDiff.load(step) if step.exists() else None)
                return
        # What is there is of an earlier run, or of a part of this one; of a recording nothing is kept.
        for file in (saved, step):
            file.unlink(missing_ok=True)
        own = self._pairwise.compare(given, member, prepared, number)
        before = self._compared[-1] if self._compared else None
        against = self._pairwise.against(before, own) if before else None
        if chosen.work_dir is not None and prepared is not None:
            if against is not None:
                against.save(step)
            own.diff.save(saved)
        self._compared.append(own)
        self._previous.append(against)

    def _take_up(self, number: int, prepared: Prepared) -> None:
        """Take up what is done of a live member.

        Raises:
            UsageError: the folder belongs to another run.
        """
        work = WorkFolder.open(str(self._folder / f"{number:05d}"), Rank())
        held = replace(prepared, given=replace(prepared.given, folder=work))
        # Its step is from the member before it, which may have no folder of its own.
        before = self._sides[number - 1] if number else None
        recorded = {"recording before it": before.digest()} if isinstance(before, Recording) else {}
        take_up(held, prepared.run, {"noise": str(not self._options.no_noise_floor)} | recorded)

    def conclude(self, names: Sequence[str] | None = None) -> Series:
        """Return the result; `names` are what the members are called, where not by what they were named."""
        if names is not None:
            self._compared = [_called(each, name) for each, name in zip(self._compared, names, strict=True)]
        diffs = [each.diff for each in self._compared]
        first = diffs[0].record
        distances = self._distances()
        members = self._members(distances)
        seen = Seen(first.base.id, members, distances, self._sizes())
        notes = _notes(diffs, members)
        settings = {"fail_above": self._options.fail_above, "work_dir": self._options.work_dir}
        relative = distances.relative()[1:, 1:]
        return Series(
            SeriesRecord(
                schema_version=SCHEMA_VERSION,
                command="series",
                tool=tool(),
                created=now(),
                base=first.base,
                settings=msgspec.structs.replace(first.settings, **settings),
                environment=first.environment,
                prompts=first.prompts,
                members=members,
                distances=[[finite_or_none(value) for value in row] for row in relative],
                findings=find(seen),
                notes=notes.texts,
                note_codes=notes.codes,
            )
        )

    def _distances(self) -> Distances:
        sites = ["embedding", *range(self._compared[0].diff.record.base.n_layers), "final_norm"]
        has_norm = any(site.name == "final_norm" for site in self._compared[0].diff.sites)
        found = Distances.empty(sites if has_norm else sites[:-1], len(self._compared) + 1)
        kept = [self._pairwise.base_rows, *(each.rows for each in self._compared)]
        for place in range(1, len(kept)):
            add_distances(found, kept[: place + 1])
        return found

    def _members(self, distances: Distances) -> list[SeriesMember]:
        records = [each.diff.record for each in self._compared]
        steps = steps_of([record.finetuned.id for record in records])
        relative = distances.relative()
        cosines = [float("nan"), *turns(relative**2)]
        return [
            SeriesMember(
                model=record.finetuned,
                step=steps[i],
                summary=record.summary,
                layers=record.layers,
                sites=record.sites,
                output=record.output,
                distance=finite_or_none(relative[0, i + 1]),
                turn=finite_or_none(cosines[i]),
                previous=_predecessor(self._previous[i], float(relative[i, i + 1])),
            )
            for i, record in enumerate(records)
        ]

    def _sizes(self) -> Floats | None:
        """Return ‖step‖ / ‖state‖ of the step to each member, [members, prompts, blocks]."""
        steps = [self._compared[0].diff, *self._previous[1:]]
        found = [None if step is None else step.results.column("relative_l2") for step in steps]
        known = [sizes for sizes in found if sizes is not None]
        if len(known) < len(found) or len({sizes.shape for sizes in known}) > 1:
            return None
        return np.stack(known)


def _called(compared: Compared, name: str) -> Compared:
    """Return a member under another name."""
    record = compared.diff.record
    model = msgspec.structs.replace(record.finetuned, id=name)
    return replace(compared, diff=ActivationDiff(msgspec.structs.replace(record, finetuned=model)))


def _named(side: Side) -> Model:
    """Return what a side was named by: a recording by its folder."""
    return side.path if isinstance(side, Recording) else side


def given_prompts(
    prompts: Prompts | None, chosen: SeriesOptions, *, has_recording: bool
) -> PromptList | None:
    """Return the prompts; None for those of a recording.

    Raises:
        PromptsError: there are none.
    """
    if prompts is not None:
        return make_prompts(prompts, no_split=chosen.no_split, responses=chosen.position == "response")
    if not has_recording:
        raise PromptsError(f"No prompt: no model is a recording, which would bring its own. {EXAMPLE}")
    return None


@contextmanager
def _folder(chosen: SeriesOptions) -> Iterator[Path]:
    """Make the folder that rows go to: that of `work_dir`, or one for the time of the run.

    Raises:
        UsageError: it cannot be written.
    """
    if chosen.work_dir is None:
        with ScratchFolder() as folder:
            yield folder.path
        return
    path = user_path(chosen.work_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{option('work_dir', path)}: cannot be written: {reason}. Choose another folder.",
            option="work_dir",
        ) from error
    yield path


def _predecessor(diff: ActivationDiff | None, distance: float) -> Predecessor | None:
    if diff is None:
        return None
    summary, output = diff.summary, diff.record.output
    return Predecessor(
        divergence=summary.max_divergence,
        layer=summary.most_divergent_layer,
        kl=None if output is None else output.kl_base_finetuned,
        verdict=summary.verdict,
        distance=finite_or_none(distance),
    )


def _notes(diffs: Sequence[ActivationDiff], members: Sequence[SeriesMember]) -> Notes:
    """Return the notes of all members; one that not all have says whose it is."""
    counts = Counter(note for diff in diffs for note in {*diff.notes})
    notes = Notes()
    for diff in diffs:
        name = diff.record.finetuned.id
        for note in notes_of(diff.note_codes, diff.notes):
            is_common = counts[note.text] == len(diffs) or name in note.text
            notes.extend([note if is_common else replace(note, text=f"{name}: {note.text}")])
    dtypes = sorted({member.model.run_dtype for member in members})
    if len(dtypes) > 1:
        notes.add(
            "run-dtypes",
            f"the members ran in {' and '.join(dtypes)}: part of the distances between them is the rounding "
            "of the narrower type",
        )
    steps = [member.step for member in members if member.step is not None]
    if steps != sorted(steps):
        notes.add(
            "steps-not-in-order",
            "the steps in the members' names do not ascend: the order in which they were given was taken",
        )
    return notes
