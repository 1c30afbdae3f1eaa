"""Make the record of weight-diff from what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import nn

from lazarus import provenance
from lazarus.errors import NoDataError
from lazarus.models import ABSURD, Beside, ModelReference, find_beside
from lazarus.models.files import ReadFiles
from lazarus.notes import Notes
from lazarus.options import WeightOptions
from lazarus.results import (
    SCHEMA_VERSION,
    CheckpointInfo,
    CopiedLayers,
    NotCompared,
    Quantisation,
    Spectrum,
    TensorRecord,
    WeightDiffRecord,
    WeightLayerRecord,
    WeightSettings,
    WeightSummary,
    WeightVerdict,
    differing,
    finite_or_none,
    note_outside,
)
from lazarus.tokens import listed
from lazarus.weights.checkpoints import Checkpoint
from lazarus.weights.numbers import Numbers
from lazarus.weights.pairs import Matched, Row, is_table
from lazarus.weights.rounding import Rounded, holds, note_merge

N_MOST_CHANGED = 5


@dataclass(frozen=True)
class Measured:
    """The measures of one pair."""

    numbers: Numbers
    spectrum: Spectrum | None
    rounded: Rounded | None = None
    """None where neither can be the other's rounding"""
    quantisation: Quantisation | None = None
    """None where both are quantised, or neither"""


@dataclass(frozen=True)
class NamedCheckpoint:
    """One of the two: what the user named, its checkpoint, and its adapter if it has one."""

    reference: ModelReference
    checkpoint: Checkpoint
    adapter: str | None
    files: ReadFiles
    """what both were read from"""


def assemble(
    sides: tuple[NamedCheckpoint, NamedCheckpoint],
    matched: Matched,
    measured: Sequence[Measured],
    options: WeightOptions,
    notes: Notes,
) -> WeightDiffRecord:
    """Return the whole record of a run; `notes` are those on what came before.

    Raises:
        NoDataError: the two have no tensor in common.
    """
    base, finetuned = sides
    if not matched.rows:
        raise NoDataError(
            f"{base.reference.name} and {finetuned.reference.name} have no tensor in common, by component "
            f"and shape: they are {base.checkpoint.structure.architecture} and "
            f"{finetuned.checkpoint.structure.architecture}. Compare two models of one architecture."
        )
    if all(math.isnan(each.numbers.change_norm) for each in measured):
        raise NoDataError(
            f"{base.reference.name} and {finetuned.reference.name}: no tensor has a change that is a number: "
            "in every one of them there is NaN or infinity. Fetch or train that model again."
        )
    rows = [_row(row, each, options.threshold) for row, each in zip(matched.rows, measured, strict=True)]
    ours, theirs = find_beside(*map(_beside, (base.checkpoint, finetuned.checkpoint)))
    note_outside(ours, theirs, notes)
    _note_limits(matched, rows, notes, with_spectrum=options.spectrum)
    _note_by_number(matched, rows, notes)
    if base.checkpoint.source.place != finetuned.checkpoint.source.place:  # else nothing was merged
        note_merge([each.rounded for each in measured if each.rounded is not None], notes)
    return WeightDiffRecord(
        schema_version=SCHEMA_VERSION,
        command="weight-diff",
        tool=provenance.tool(),
        created=provenance.now(),
        base=_info(base, ours, notes),
        finetuned=_info(finetuned, theirs, notes),
        settings=WeightSettings(**asdict(options)),
        environment=provenance.environment(torch.device("cpu")),
        layers=_layers(rows, measured),
        results=rows,
        unmatched=list(matched.unmatched),
        summary=_summary(sides, rows, matched, measured, differing(ours, theirs)),
        notes=notes.texts,
        note_codes=notes.codes,
        copied_layers=[CopiedLayers(**asdict(run)) for run in matched.copies],
    )


def _beside(checkpoint: Checkpoint) -> Beside:
    opened = checkpoint.structure.opened
    untaken = {**opened.untaken, **_other_vocabulary(checkpoint)}
    return Beside(checkpoint.source, opened.config, checkpoint.unread, untaken)


def _other_vocabulary(checkpoint: Checkpoint) -> dict[str, int]:
    """The configured size of the vocabulary, where the embedding has another number of rows."""
    model = checkpoint.structure.model
    if model is None:
        return {}
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        return {}
    path = next(name for name, module in model.named_modules() if module is table)
    stored = next((e.view.shape[0] for e in checkpoint.entries.values() if e.path == f"{path}.weight"), None)
    rows = table.num_embeddings
    return {} if stored in (None, rows) else {f"vocab_size = {rows} beside {stored} rows": rows}


def _row(row: Row, measured: Measured, threshold: float) -> TensorRecord:
    numbers, rounded = measured.numbers, measured.rounded
    relative = finite_or_none(numbers.relative_change)
    return TensorRecord(
        layer=row.place.layer,
        component=row.place.component,
        name=row.base.key,
        shape=list(row.pair.shape),
        base_dtype=row.base.view.dtype,
        finetuned_dtype=row.finetuned.view.dtype,
        relative_change=relative,
        flagged=relative is not None and relative > threshold,
        cosine_similarity=finite_or_none(numbers.cosine_similarity),
        max_abs_change=finite_or_none(numbers.max_abs_change),
        share_changed=numbers.share_changed,
        n_changed=numbers.n_changed,
        base_norm=None if numbers.base_norm is None else finite_or_none(numbers.base_norm),
        change_norm=finite_or_none(numbers.change_norm),
        spectrum=measured.spectrum,
        rounding=rounded.holds if rounded is not None and rounded.result != "unknown" else None,
        merged_share=rounded.share if rounded is not None else None,
        quantisation=measured.quantisation,
    )


def _layers(rows: Sequence[TensorRecord], measured: Sequence[Measured]) -> list[WeightLayerRecord]:
    """Return each block: the root of the sum of squared changes, over that of squared norms."""
    found = []
    for layer in sorted({row.layer for row in rows if row.layer is not None}):
        inside = [each.numbers for row, each in zip(rows, measured, strict=True) if row.layer == layer]
        found.append(
            WeightLayerRecord(
                layer=layer,
                relative_change=_together(inside),
                n_tensors=len(inside),
                n_changed_tensors=sum(numbers.n_changed > 0 for numbers in inside),
            )
        )
    return found


def _together(numbers: Sequence[Numbers]) -> float | None:
    """The relative change of several tensors as one: 0 where none has changed."""
    if not any(each.n_changed for each in numbers):
        return 0.0
    change = math.hypot(*(each.change_norm for each in numbers))
    base = math.hypot(*(math.nan if each.base_norm is None else each.base_norm for each in numbers))
    return finite_or_none(change / base) if base else None


def _summary(
    sides: tuple[NamedCheckpoint, NamedCheckpoint],
    rows: Sequence[TensorRecord],
    matched: Matched,
    measured: Sequence[Measured],
    others: Sequence[NotCompared],
) -> WeightSummary:
    changes = {i: row.relative_change for i, row in enumerate(rows) if row.relative_change}
    ranked = sorted(changes, key=changes.__getitem__, reverse=True)
    changed = [row for row in rows if row.n_changed]
    spectra = [row.spectrum for row in rows if row.spectrum is not None]
    ranks = [spectrum.adapter_rank for spectrum in spectra if spectrum.adapter_rank is not None]
    verdict, causes = _verdict(sides, matched, measured)
    has_spectrum = bool(spectra)
    return WeightSummary(
        verdict=verdict,
        causes=causes if verdict != "identical" or not others else [],
        relative_change=_together([each.numbers for each in measured]),
        n_tensors=len(rows),
        n_changed_tensors=len(changed),
        n_flagged_tensors=sum(row.flagged for row in rows),
        n_unmatched=len(matched.unmatched),
        most_changed=ranked[:N_MOST_CHANGED],
        first_changed_layer=min((row.layer for row in changed if row.layer is not None), default=None),
        n_moved_tokens=matched.n_moved,
        n_matrices=len(spectra) if has_spectrum else None,
        n_low_rank=len(ranks) if has_spectrum else None,
        adapter_rank=max(ranks) if ranks and len(ranks) == len(spectra) else None,
    )


def _verdict(
    sides: tuple[NamedCheckpoint, NamedCheckpoint], matched: Matched, measured: Sequence[Measured]
) -> tuple[WeightVerdict, list[str]]:
    """Return the verdict on all tensors, and what may explain it."""
    changed = [each.rounded for each in measured if each.numbers.n_changed]
    # Whatever was compared, a tensor on one side alone and a token with another id are changes.
    if matched.unmatched or matched.n_moved:
        return "changed", []
    if not changed:
        return "identical", _causes(sides)
    found = [each for each in changed if each is not None and each.holds]
    # Rounding explains all that changed, and in one direction, or it explains nothing.
    roles = {each.stored for each in found}
    if len(found) < len(changed) or len(roles) > 1:
        return "changed", []
    base, finetuned = sides
    stored, source = ("fine-tuned", base) if "finetuned" in roles else ("base", finetuned)
    other = "base" if source is base else "fine-tuned"
    adapter = f" with the adapter {source.adapter}, merged" if any(each.has_update for each in found) else ""
    dtypes = " and ".join(sorted({each.dtype for each in found}))
    return "rounding", [f"{stored} is {other}{adapter} {'and ' if adapter else ''}rounded to {dtypes}"]


def _causes(sides: tuple[NamedCheckpoint, NamedCheckpoint]) -> list[str]:
    """Return why nothing changed, as far as it can be known."""
    base, finetuned = sides
    adapters = [side.adapter for side in sides if side.adapter is not None]
    if base.checkpoint.source.place == finetuned.checkpoint.source.place:
        if base.adapter == finetuned.adapter:
            return ["both names are the same files"]
        if len(adapters) == 1:
            return [f"the adapter {adapters[0]} adds nothing: its products are exactly 0"]
        return ["both adapters make the same of the same model"]
    return ["both checkpoints hold the same weights, bit for bit: one is a copy of the other"]


def _note_limits(
    matched: Matched, rows: Sequence[TensorRecord], notes: Notes, *, with_spectrum: bool
) -> None:
    """Note what a reader must know of the numbers."""
    changed = [row for row in rows if row.n_changed]
    undefined = [row for row in rows if row.relative_change is None]
    matrices = [row for row, pair in zip(rows, matched.rows, strict=True) if min(pair.pair.matrix) > 1]
    kinds = {
        "tensors that hold NaN or infinity, so that their change is no number": [
            row for row in undefined if row.max_abs_change is None
        ],
        "tensors that are all zero in base, so that no change is relative": [
            row for row in undefined if row.base_norm == 0
        ],
        "tensors whose change or norm in base is too large for float64, so that none is relative": [
            row for row in undefined if row.max_abs_change is not None and row.base_norm != 0
        ],
        "tensors with the same bits whose norm is not finite, so that no change of all, or of their layer, "
        "is relative": [row for row in rows if changed and not row.n_changed and row.base_norm is None],
    }
    for said, found in kinds.items():
        if found:
            notes.add("undefined-change", f"{said}: {_counted(found)}")
    for model, found in zip(("base", "fine-tuned"), _absurd(rows), strict=True):
        if found:
            notes.add(
                "absurd-weights",
                f"{model}: tensors with a norm above 2⁴⁰, as a flipped bit of the file makes it: "
                f"{_counted(found)}; hold the file against its source",
            )
    if lacking := [row for row in matrices if with_spectrum and row.max_abs_change and row.spectrum is None]:
        said = "changed matrices without a spectrum, because squares of their change leave float64's range"
        notes.add("missing-spectrum", f"{said}: {_counted(lacking)}")
    types = {(row.base_dtype, row.finetuned_dtype) for row in changed if not row.rounding}
    narrowed = [f"{ours} to {theirs}" for ours, theirs in sorted(types) if not holds(theirs, ours)]
    if narrowed:
        notes.add(
            "stored-types",
            f"base and fine-tuned are stored in different types ({', '.join(narrowed)}): a part of the "
            "change may be the rounding from one to the other",
        )


def _absurd(rows: Sequence[TensorRecord]) -> tuple[list[TensorRecord], list[TensorRecord]]:
    """Return the tensors of each side whose norm no training makes, as far as the measures tell.

    A single element may stand for infinity, as that of a mask does.
    """
    ours: list[TensorRecord] = []
    theirs: list[TensorRecord] = []
    for row in rows:
        if math.prod(row.shape) > 1:
            in_base, in_change = (row.base_norm or 0) > ABSURD, (row.max_abs_change or 0) > ABSURD
            if in_base:
                ours.append(row)
            # The same element is in both, or the change brought it.
            if in_base != in_change:
                theirs.append(row)
    return ours, theirs


def _counted(rows: Sequence[TensorRecord]) -> str:
    return f"{len(rows)}, {listed([row.name for row in rows], 5)}"


def _note_by_number(matched: Matched, rows: Sequence[TensorRecord], notes: Notes) -> None:
    """Note where tables differ whose rows could not be matched by token."""
    tables = [row for row, pair in zip(rows, matched.rows, strict=True) if is_table(pair.place)]
    parted = {each.component for each in matched.unmatched}
    differ = [row.component for row in tables if row.n_changed and row.component not in parted]
    if matched.by_number is not None and differ:
        told = f"rows of {listed(differ, 4)} were compared by their number and not by token"
        notes.add("rows-by-number", f"{told}: {matched.by_number}")


def _info(side: NamedCheckpoint, outside: Sequence[NotCompared], notes: Notes) -> CheckpointInfo:
    checkpoint, source = side.checkpoint, side.checkpoint.source
    kind: Literal["hub", "folder", "gguf", "adapter"] = "adapter" if side.adapter else source.kind
    return CheckpointInfo(
        id=side.reference.name,
        revision=source.revision,
        kind=kind,
        family=checkpoint.structure.family,
        architecture=checkpoint.structure.architecture,
        n_layers=checkpoint.structure.n_layers,
        n_tensors=checkpoint.n_tensors,
        n_parameters=checkpoint.n_parameters,
        stored_dtype=checkpoint.stored_dtype,
        adapter=side.adapter,
        not_compared=list(outside),
        files=side.files.told(notes),
    )
