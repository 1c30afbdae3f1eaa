"""Pairs the tensors of two checkpoints; what has no counterpart is reported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from lazarus.names.components import Place
from lazarus.notes import Note, Notes
from lazarus.results import UnmatchedTensor
from lazarus.tokens import listed
from lazarus.weights.checkpoints import Checkpoint, Entry
from lazarus.weights.copies import Run, find_copies, note_depths
from lazarus.weights.numbers import Pair, UpdatePair, ViewPair
from lazarus.weights.views import AddedView, PickedRows, View
from lazarus.weights.vocabulary import Alignment, Vocabulary

MOST_NAMED = 5
"""how many tensors a note names"""


@dataclass(frozen=True)
class Row:
    """A component that both have, and its two tensors."""

    place: Place
    base: Entry
    finetuned: Entry
    pair: Pair


@dataclass(frozen=True)
class Matched:
    """All rows in base's order, and what has no counterpart of its shape.

    A table of which only a part of the rows have a counterpart is in both: that part was compared.
    """

    rows: Sequence[Row]
    unmatched: Sequence[UnmatchedTensor]
    copies: Sequence[Run] = ()
    """where the depths differ: layers of fine-tuned that are copies of base's"""
    n_moved: int = 0
    """tokens that have another id in fine-tuned"""
    by_number: str | None = None
    """why the rows of tables were matched by their index and not by token, where that is so"""


def match(base: Checkpoint, finetuned: Checkpoint, vocabulary: Vocabulary, notes: Notes) -> Matched:
    """Pair the two checkpoints' components by their places, and the rows of their vocabularies by token.

    Raises:
        OSError: a file is missing or too short.
    """
    rows, unmatched, tables = [], [], []
    for place in _places(base, finetuned):
        ours, theirs = base.find(place), finetuned.find(place)
        if ours is None or theirs is None:
            unmatched.append(_unmatched(place, ours, theirs))
        elif _is_table(place, ours, theirs) and (table := _table(place, ours, theirs, vocabulary)):
            tables.append(table)
            rows += [Row(place, ours, theirs, table.pair)] if table.pair is not None else []
        elif ours.view.shape == theirs.view.shape:
            rows.append(Row(place, ours, theirs, _pair(ours.view, theirs.view)))
        else:
            unmatched.append(_unmatched(place, ours, theirs))
    parted = [table.unmatched for table in tables if table.unmatched is not None]
    copies: Sequence[Run] = ()
    if base.structure.n_layers != finetuned.structure.n_layers:
        copies = find_copies(base, finetuned)
        note_depths(base, finetuned, copies, notes)
    _note_tied(base, finetuned, notes)
    notes.extend(table.note for table in tables)
    _note_unmatched(unmatched, notes)
    n_moved = max((table.n_moved for table in tables), default=0)
    return Matched(rows, [*parted, *unmatched], copies, n_moved, vocabulary.unknown)


def _places(base: Checkpoint, finetuned: Checkpoint) -> Iterator[Place]:
    """Every place at which one of the two has a tensor of its own: base's in order, then the others.

    After them those that one has by a tie, and the other not at all.
    """
    yield from dict.fromkeys([*base.entries, *finetuned.entries])
    for one, other in ((base, finetuned), (finetuned, base)):
        yield from (place for place in one.tied if other.find(place) is None)


def _pair(base: View, finetuned: View) -> Pair:
    """Return the pair of two views; an update on the very same tensor is the change by itself."""
    if isinstance(finetuned, AddedView) and finetuned.view == base:
        return UpdatePair(base, finetuned.update)
    return ViewPair(base, finetuned)


@dataclass(frozen=True)
class _Table:
    """A vocabulary's tensor, of which not every row is compared with the row of its number."""

    pair: Pair | None
    """None where no row of the one is a row of the other"""
    unmatched: UnmatchedTensor | None
    note: Note
    n_moved: int


def is_table(place: Place) -> bool:
    """Return whether a component has a row for each token."""
    return place.layer is None and place.component.partition(".")[0] in ("embed", "lm_head")


def _is_table(place: Place, base: Entry, finetuned: Entry) -> bool:
    """Return whether two tensors are a vocabulary's and may be compared in a part of their rows."""
    ours, theirs = base.view.shape, finetuned.view.shape
    has_rows = all(shape and shape[0] for shape in (ours, theirs))
    return is_table(place) and has_rows and ours[1:] == theirs[1:]


def _table(place: Place, base: Entry, finetuned: Entry, vocabulary: Vocabulary) -> _Table | None:
    """Pair the rows of two tables; None where every row belongs to the one of its number."""
    n_base, n_finetuned = base.view.shape[0], finetuned.view.shape[0]
    if vocabulary.differs:
        rows = vocabulary.align(n_base, n_finetuned)
    else:
        both = np.arange(min(n_base, n_finetuned))
        rows = Alignment(both, both, range(len(both), n_base), range(len(both), n_finetuned))
    is_all = not rows.base_alone and not rows.finetuned_alone
    if is_all and not rows.n_moved:
        return None
    counts = len(rows.base_alone), len(rows.finetuned_alone)
    unmatched = None if is_all else replace(_unmatched(place, base, finetuned), rows_alone=counts)
    picked = PickedRows(base.view, rows.base), PickedRows(finetuned.view, rows.finetuned)
    pair = ViewPair(*picked) if len(rows.base) else None
    note = Note("vocabularies-differ", _told_of_table(place, (n_base, n_finetuned), vocabulary, rows))
    return _Table(pair, unmatched, note, rows.n_moved)


def _told_of_table(place: Place, n_rows: tuple[int, int], vocabulary: Vocabulary, rows: Alignment) -> str:
    (n_base, n_finetuned), n_both = n_rows, len(rows.base)
    if not vocabulary.differs:
        return (
            f"{place.component} has {n_base} rows in base and {n_finetuned} in fine-tuned: the first "
            f"{n_both}, which both have, were compared"
            + (f" by their number and not by token: {vocabulary.unknown}" if vocabulary.unknown else "")
        )
    said = f"{place.component} was compared by token in {n_both} rows"
    if not n_both:
        said = f"{place.component} was not compared: no token is in both vocabularies"
    if rows.n_moved:
        said += f", of which {rows.n_moved} are at another id in fine-tuned"
    ours, theirs = len(rows.base_alone), len(rows.finetuned_alone)
    if ours or theirs:
        names = vocabulary.named(rows)
        said += f"; {ours} rows are only in base and {theirs} only in fine-tuned"
        said += f": {names}" if names else ""
    return said


def _unmatched(place: Place, base: Entry | None, finetuned: Entry | None) -> UnmatchedTensor:
    one = base or finetuned
    assert one is not None
    return UnmatchedTensor(
        layer=place.layer,
        component=place.component,
        # a tensor that is tied has no key of its own
        name=one.key if one.place == place else place.component,
        base_shape=None if base is None else list(base.view.shape),
        finetuned_shape=None if finetuned is None else list(finetuned.view.shape),
    )


def _note_tied(base: Checkpoint, finetuned: Checkpoint, notes: Notes) -> None:
    """Note which components use another's tensor, in both or in one of the two."""
    for place in dict.fromkeys([*base.tied, *finetuned.tied]):
        ours, theirs = base.tied.get(place), finetuned.tied.get(place)
        owner = ours or theirs
        assert owner is not None
        if ours == theirs:
            told = f"{place.component} is tied to {owner.component} in both: one tensor, compared once"
            notes.add("tied-tensors", told)
        elif place in base.entries or place in finetuned.entries:
            tying, other = ("base", "fine-tuned") if ours is not None else ("fine-tuned", "base")
            notes.add(
                "tied-tensors",
                f"{place.component} is tied to {owner.component} in {tying} and a tensor of its own in "
                f"{other}: it was compared with that {owner.component}",
            )


def _note_unmatched(unmatched: Sequence[UnmatchedTensor], notes: Notes) -> None:
    kinds = {
        "only base has": [t.name for t in unmatched if t.finetuned_shape is None],
        "only fine-tuned has": [t.name for t in unmatched if t.base_shape is None],
    }
    for who, names in kinds.items():
        if names:
            notes.add("unmatched-tensors", f"not compared, because {who} them: {_named(names)}")
    for t in unmatched:
        if t.base_shape is not None and t.finetuned_shape is not None:
            notes.add(
                "unmatched-tensors",
                f"{t.name} was not compared: its shape is {t.base_shape} in base and {t.finetuned_shape} in "
                "fine-tuned",
                layers=[] if t.layer is None else [t.layer],
            )


def _named(names: Sequence[str]) -> str:
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"{count}, {listed(names, MOST_NAMED)}"
