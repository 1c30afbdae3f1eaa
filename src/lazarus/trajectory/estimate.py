"""Estimates of series: that of a pair for each kind of member, and what the others add."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import msgspec

from lazarus.activation import Prompts
from lazarus.activation.estimate import estimated
from lazarus.activation.prepare import Given
from lazarus.activation.run import given_for
from lazarus.errors import UsageError
from lazarus.loading import Model, kind_beside
from lazarus.messages import option
from lazarus.models import Clock, StandIn
from lazarus.options import SeriesArguments, SeriesOptions
from lazarus.ranks import Rank
from lazarus.recorded import opened
from lazarus.recordings import Recording
from lazarus.results import Estimate, EstimatedPart
from lazarus.scratch import ScratchFolder
from lazarus.trajectory.members import expand, listed
from lazarus.trajectory.rows import MOST_LOGITS_BYTES
from lazarus.trajectory.run import given_prompts
from lazarus.trajectory.trial import Added, SeriesTrial


@dataclass(frozen=True)
class _Kind:
    """A member in full, beside base, and what one like it takes that comes later."""

    full: Estimate
    added: Added
    condition: object
    streams: bool
    keeps_base: bool
    """whether base stays in memory for the next member"""
    loading: tuple[float, float]
    """that of base and of the member, in seconds"""
    base_bytes: int
    """those of base's files"""
    rows: tuple[int, int]
    """bytes of those of base and of the member"""
    logits_bytes: int

    def seconds(self, part: str) -> float:
        """Return the time of a part of the estimate in full."""
        return sum(each.seconds for each in self.full.parts if each.name == part)


def estimate_series(
    base: Model,
    members: Model | Sequence[Model] | Mapping[str, Model],
    prompts: Prompts | None,
    *,
    tokenizer: Any | None = None,
    start_seconds: float = 0.0,
    **options: Unpack[SeriesArguments],
) -> Estimate:
    """Estimate what `series` would take on this machine; no weights are loaded.

    Members that differ in their weights alone are measured once.

    Args:
        base: as for `series`, and so are `members`, `prompts`, `tokenizer` and `options`; no model in memory.
        start_seconds: as for `estimate_run`.

    Raises:
        UsageError: a model is in memory or a recording, or as for `series`.
        LazarusError: as `estimate_run`.
    """
    chosen = SeriesOptions.make(**options)
    models = list(members.values()) if isinstance(members, Mapping) else expand(listed(members))
    if any(isinstance(opened(model), Recording) for model in (base, *models)):
        raise UsageError(
            "an estimate is of models that run, and one of these is a recording: its states are read. Leave "
            "the recordings out."
        )
    found = given_prompts(prompts, chosen, has_recording=False)
    kinds: dict[Hashable, _Kind] = {}
    each, sizes = list[_Kind](), list[int]()
    for member in models:
        given = given_for((base, member), found, tokenizer, Rank(), chosen.of_pair())
        kind, n_bytes = kind_beside(base, member, given.options, given.device)
        if kind not in kinds:
            kinds[kind] = _measured(given, base, member)
        each.append(kinds[kind])
        sizes.append(n_bytes)
    parts = [EstimatedPart(name="start", seconds=start_seconds)] if start_seconds else []
    parts += [
        EstimatedPart(name=name, seconds=seconds) for name, seconds in _seconds(each).items() if seconds
    ]
    first = each[0].full
    return msgspec.structs.replace(
        first,
        finetuned=None,
        members=[str(member) for member in models],
        bytes_read=_bytes_read(each, sizes),
        bytes_written=each[0].rows[0] + sum(kind.rows[1] for kind in each),
        rows_read=_rows_read(each),
        peak_bytes=max(kind.full.peak_bytes for kind in each),
        device_bytes=None
        if first.device_bytes is None
        else max(kind.full.device_bytes or 0 for kind in each),
        flops=sum(kind.full.flops if is_new else kind.added.flops for kind, is_new in _in_turn(each)),
        seconds=sum(part.seconds for part in parts),
        parts=parts,
        remarks=list(_remarks(each, chosen)),
    )


def _measured(given: Given, base: Model, member: Model) -> _Kind:
    """Run a pair of stand-ins. They are gone when it returns: no two pairs are in memory."""
    with given.running(), ScratchFolder() as folder:
        trial = SeriesTrial(given, (base, member), Clock(given.device), folder.path)
        full = estimated("series", trial, given.options, 0.0)
    ours, theirs = trial.standing.each
    streams = trial.standing.streams
    return _Kind(
        full=full,
        added=trial.added,
        condition=trial.condition,
        streams=streams,
        keeps_base=not streams and not ours.adapter_bytes,
        loading=(_loading(ours, streams=streams), _loading(theirs, streams=streams)),
        base_bytes=ours.size.files + ours.adapter_bytes,
        rows=(trial.base_bytes, trial.member_bytes),
        logits_bytes=trial.logits_bytes,
    )


def _loading(model: StandIn, *, streams: bool) -> float:
    return model.opening_seconds if streams else model.loading_seconds


def _in_turn(each: Sequence[_Kind]) -> Iterator[tuple[_Kind, bool]]:
    """Yield the kinds of the members, and whether base runs with each, and its noise."""
    before = None
    for kind in each:
        yield kind, before is None or before.condition != kind.condition
        before = kind


def _seconds(each: Sequence[_Kind]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for place, (kind, is_new) in enumerate(_in_turn(each)):
        loads_base = place == 0 or not kind.keeps_base
        found["loading"] += kind.loading[1] + (kind.loading[0] if loads_base else 0.0)
        found["prompts and probes"] += kind.seconds("prompts and probes")
        found["passes and metrics"] += kind.seconds("passes and metrics") if is_new else kind.added.passes
        found["noise"] += kind.seconds("noise") if is_new else 0.0
        found["results"] += kind.seconds("result")
        found["steps"] += kind.added.step if place else 0.0
        # To base, and to each member before it.
        found["distances"] += (place + 1) * kind.added.distance
    return found


def _bytes_read(each: Sequence[_Kind], sizes: Sequence[int]) -> int:
    """Return what is read of files of weights: base's once where it stays in memory."""
    total = 0
    for place, (kind, size) in enumerate(zip(each, sizes, strict=True)):
        loads_base = place == 0 or not kind.keeps_base
        total += kind.full.bytes_read if kind.streams else size + (kind.base_bytes if loads_base else 0)
    return total


def _rows_read(each: Sequence[_Kind]) -> int:
    """Return the bytes of rows that are read: for each step two members', for each distance two models'."""
    last, total = len(each) - 1, len(each) * each[0].rows[0]
    for place, kind in enumerate(each):
        n_steps = (place > 0) + (place < last)
        # With each later member, and once for all distances to the models before it.
        n_distances = 1 + last - place
        total += n_steps * kind.rows[1] + n_distances * (kind.rows[1] - kind.logits_bytes)
    return total


def _remarks(each: Sequence[_Kind], chosen: SeriesOptions) -> Iterator[str]:
    yield from dict.fromkeys(remark for kind in each for remark in kind.full.remarks)
    if len(each) > 1:
        yield "the memory is that of one pair: what the allocator keeps of members before it comes on top"
    if chosen.work_dir is not None:
        yield f"{option('work_dir')} is in it as a run that begins anew"
    if any(kind.logits_bytes >= MOST_LOGITS_BYTES for kind in each):
        yield "logits are more than are kept: KL from the member before will not be known"
