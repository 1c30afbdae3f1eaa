"""weight_diff: two checkpoints from disk, compared tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Literal, Protocol, Unpack, runtime_checkable

import torch

from lazarus.blame import one_line
from lazarus.errors import UsageError, WeightsError
from lazarus.models import ModelReference, Source, parse_model
from lazarus.models.adapter_files import files_of_adapter
from lazarus.models.reference import adapter_base
from lazarus.models.underneath import adapter_of, note_base, source_under
from lazarus.notes import Notes
from lazarus.options import WeightArguments, WeightOptions
from lazarus.result_classes import WeightDiff
from lazarus.weights.adapters import put_adapter
from lazarus.weights.checkpoints import Checkpoint, read_checkpoint
from lazarus.weights.numbers import Pair, base_norm, measure
from lazarus.weights.pairs import Row, match
from lazarus.weights.parallel import measure_all, run_all, stoppable
from lazarus.weights.quantisation import QuantisationError
from lazarus.weights.record import Measured, NamedCheckpoint, assemble
from lazarus.weights.rounding import candidates, check
from lazarus.weights.spectrum import spectrum
from lazarus.weights.vocabulary import read_vocabulary

Role = Literal["base", "finetuned"]


@runtime_checkable
class Observer(Protocol):
    """An object that is told how far a run has come."""

    def loading(self, role: Role, name: str) -> None:
        """A checkpoint is about to be opened."""

    def detected(self, families: tuple[str, str], n_layers: int) -> None:
        """Both are open: what they are, and how many layers are compared."""

    def running(self, n_elements: int) -> None:
        """The tensors begin: so many elements in all."""

    def advanced(self, n_elements: int) -> None:
        """Count so many more elements as compared."""


class _Silence:
    def loading(self, role: Role, name: str) -> None: ...
    def detected(self, families: tuple[str, str], n_layers: int) -> None: ...
    def running(self, n_elements: int) -> None: ...
    def advanced(self, n_elements: int) -> None: ...


def weight_diff(
    base: str | Path,
    finetuned: str | Path,
    *,
    observer: Observer | None = None,
    **options: Unpack[WeightArguments],
) -> WeightDiff:
    """Compare the weights of two models, tensor by tensor, without building the models.

    Args:
        base: a Hub id, a folder, a `.gguf` file, or MODEL+ADAPTER.
        finetuned: the same; an adapter alone is taken on top of `base`.
        observer: is told how far the run has come.
        options: the command line's options, with underscores: `spectrum=True`, `threshold=0.05`.

    Returns:
        For each tensor, by layer and component, the relative change ‖f − b‖ / ‖b‖ (Frobenius norms, 0 to ∞),
        the cosine similarity, the largest change of a number and the share of changed ones; with `spectrum`,
        the singular values of f − b. Whatever has no counterpart, and notes on what was assumed.

    Raises:
        UsageError: an option is wrong, or a model is no name.
        ModelError: a checkpoint cannot be read.
    """
    chosen = WeightOptions.make(**options)
    watcher = observer or _Silence()
    notes = Notes()
    sides = _open_pair(_reference(base), _reference(finetuned), chosen, watcher, notes)
    ours, theirs = (side.checkpoint for side in sides)
    n_layers = max(ours.structure.n_layers, theirs.structure.n_layers)
    watcher.detected((ours.structure.family, theirs.structure.family), n_layers)
    vocabulary = read_vocabulary(
        _tokenizers(sides[0]), _tokenizers(sides[1]), trust_remote_code=chosen.trust_remote_code
    )
    try:
        matched = match(ours, theirs, vocabulary, notes)
        measured = _measure(matched.rows, chosen, watcher)
    except OSError as error:
        raise WeightsError(
            f"{base} and {finetuned}: a file could not be read on the way: {one_line(error)}. It was moved "
            "or written to since the run began: run again when nothing writes there."
        ) from error
    return WeightDiff(assemble(sides, matched, measured, chosen, notes))


def _reference(model: object) -> ModelReference:
    if not isinstance(model, str | Path):
        raise UsageError(
            f"weight_diff reads checkpoints from disk, and {type(model).__name__} is none. Name a folder or "
            "a Hub id; save a model that is in memory with save_pretrained first."
        )
    return parse_model(str(model))


def _open_pair(
    base: ModelReference,
    finetuned: ModelReference,
    options: WeightOptions,
    watcher: Observer,
    notes: Notes,
) -> tuple[NamedCheckpoint, NamedCheckpoint]:
    """Return both checkpoints; where both names stand on one, it is opened once."""
    # Both are opened before an adapter is looked at, and what is noted of base comes first all the same.
    of_finetuned = Notes()
    watcher.loading("base", base.name)
    source = base.model or adapter_base(adapter_of(base))
    ours = read_checkpoint(source, options, notes)
    watcher.loading("finetuned", finetuned.name)
    their_source = source_under(finetuned, base)
    is_same = their_source.place == source.place
    theirs = ours if is_same else read_checkpoint(their_source, options, of_finetuned)
    sides = _side(base, ours, notes), _side(finetuned, theirs, of_finetuned)
    notes.extend(of_finetuned)
    return sides


def _side(reference: ModelReference, checkpoint: Checkpoint, notes: Notes) -> NamedCheckpoint:
    """Return one of the two, with its adapters if there are any."""
    names, on_bases = [], Notes()
    changed, files = checkpoint, checkpoint.structure.opened.files
    for adapter in reference.adapters:
        files = files.joined(files_of_adapter(adapter))
        changed, told = put_adapter(changed, adapter, notes)
        names.append(told)
        note_base(adapter, checkpoint.source, on_bases)
    notes.extend(on_bases)
    if files.hashed:
        files.start_hashing()
    return NamedCheckpoint(reference, changed, " + ".join(names) or None, files)


def _tokenizers(side: NamedCheckpoint) -> list[Source]:
    """Return where its tokenizer may be: beside an adapter, or beside the weights."""
    adapters = side.reference.adapters
    # The adapter on top comes first: its training may have added tokens.
    return [*reversed(adapters), side.checkpoint.source]


def _measure(rows: Sequence[Row], options: WeightOptions, watcher: Observer) -> list[Measured]:
    """Return the measures of every pair and, where it is asked for, the spectrum of each changed matrix."""

    def measure_one(pair: Pair, error: QuantisationError | None, stop: Event) -> Measured:
        pair = stoppable(pair, stop)
        numbers = measure(pair) if error is None else measure(pair, error.n_elements, error.add)
        is_matrix = min(pair.matrix) > 1
        has_spectrum = options.spectrum and is_matrix and numbers.n_changed
        found = spectrum(pair, options.seed, pair.finetuned_dtype) if has_spectrum else None
        return Measured(numbers, found, quantisation=error.told() if error is not None else None)

    pairs = [row.pair for row in rows]
    sizes, n_threads = [math.prod(pair.matrix) for pair in pairs], torch.get_num_threads()
    watcher.running(sum(sizes))
    tasks = [partial(measure_one, pair, QuantisationError.of(pair)) for pair in pairs]
    measured = run_all(tasks, sizes, n_threads, lambda i: watcher.advanced(sizes[i]))
    if any(each.numbers.n_changed for each in measured):
        _add_norms(pairs, measured, n_threads)
        _add_rounding(pairs, measured, n_threads)
    return measured


def _add_norms(pairs: Sequence[Pair], measured: list[Measured], n_threads: int) -> None:
    """Add the norms of tensors that did not change: a layer's change is relative to all that is in it."""
    lacking = [i for i, each in enumerate(measured) if each.numbers.base_norm is None]
    norms = measure_all([pairs[i] for i in lacking], base_norm, n_threads)
    for i, norm in zip(lacking, norms, strict=True):
        measured[i] = replace(measured[i], numbers=replace(measured[i].numbers, base_norm=norm))


def _add_rounding(pairs: Sequence[Pair], measured: list[Measured], n_threads: int) -> None:
    """Find out which of those that changed differ by rounding alone."""
    changed = [i for i, each in enumerate(measured) if each.numbers.n_changed]
    ways = [(i, candidate) for i in changed for candidate in candidates(pairs[i])]
    sizes = [math.prod(pairs[i].matrix) for i, _ in ways]
    found = run_all([partial(check, candidate) for _, candidate in ways], sizes, n_threads)
    for (i, _), rounded in zip(ways, found, strict=True):
        before = measured[i].rounded
        # Two ways may have been tried, one for each side; the one that holds is kept.
        if before is None or (rounded.holds and not before.holds):
            measured[i] = replace(measured[i], rounded=rounded)
