"""Which tensor of one checkpoint belongs to which of the other; what has no counterpart is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor

from lazarus.results import UnmatchedTensor
from lazarus.tokens import listed
from lazarus.weights.checkpoints import Checkpoint, Entry
from lazarus.weights.components import Place
from lazarus.weights.numbers import Pair, UpdatePair, ViewPair
from lazarus.weights.views import AddedView, Rows, View, open_rows

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
    """All rows in base's order, what has no counterpart of its shape, and notes on it.

    A resized vocabulary is in both: its first rows were compared.
    """

    rows: Sequence[Row]
    unmatched: Sequence[UnmatchedTensor]
    notes: Sequence[str]


@dataclass(frozen=True, eq=False)
class FirstRows:
    """The first rows of a view: what two vocabularies of different size have in common."""

    view: View
    n_rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the view, cut."""
        return self.n_rows, *self.view.shape[1:]

    @property
    def dtype(self) -> str:
        """That of the view."""
        return self.view.dtype

    @property
    def matrix(self) -> tuple[int, int]:
        """That of the view, cut."""
        return self.view.matrix[0] // self.view.shape[0] * self.n_rows, self.view.matrix[1]

    def read(self, start: int, stop: int, /) -> Shaped[Tensor, "rows columns"]:
        """Rows start to stop."""
        return self.view.read(start, stop)

    def rows(self) -> AbstractContextManager[Rows]:
        """The rows of the view, opened."""
        return open_rows(self.view)


def match(base: Checkpoint, finetuned: Checkpoint) -> Matched:
    """Pair the two checkpoints' components by their places."""
    rows, unmatched, resized = [], [], []
    for place in _places(base, finetuned):
        ours, theirs = base.find(place), finetuned.find(place)
        if ours is None or theirs is None:
            unmatched.append(_unmatched(place, ours, theirs))
        elif ours.view.shape == theirs.view.shape:
            rows.append(Row(place, ours, theirs, _pair(ours.view, theirs.view)))
        elif _is_resized(place, ours, theirs):
            n_rows = min(ours.view.shape[0], theirs.view.shape[0])
            views = (FirstRows(ours.view, n_rows), FirstRows(theirs.view, n_rows))
            rows.append(Row(place, ours, theirs, ViewPair(*views)))
            resized.append(_unmatched(place, ours, theirs))
        else:
            unmatched.append(_unmatched(place, ours, theirs))
    notes = [*_tied_notes(base, finetuned), *_resized_notes(resized), *_unmatched_notes(unmatched)]
    return Matched(rows, [*resized, *unmatched], notes)


def _places(base: Checkpoint, finetuned: Checkpoint) -> Iterator[Place]:
    """Every place at which one of the two has a tensor of its own: base's in order, then the others.

    After them those that one has by a tie, and the other not at all.
    """
    yield from dict.fromkeys([*base.entries, *finetuned.entries])
    for one, other in ((base, finetuned), (finetuned, base)):
        yield from (place for place in one.tied if other.find(place) is None)


def _pair(base: View, finetuned: View) -> Pair:
    """An update on the very same tensor is what has changed, and need not be subtracted out again."""
    if isinstance(finetuned, AddedView) and finetuned.view == base:
        return UpdatePair(base, finetuned.update)
    return ViewPair(base, finetuned)


def _is_resized(place: Place, base: Entry, finetuned: Entry) -> bool:
    """Whether they are a vocabulary's tensors that have other numbers of rows and are else of one shape."""
    is_table = place.layer is None and place.component.partition(".")[0] in ("embed", "lm_head")
    ours, theirs = base.view.shape, finetuned.view.shape
    return is_table and len(ours) > 0 and ours[1:] == theirs[1:] and min(ours[0], theirs[0]) > 0


def _unmatched(place: Place, base: Entry | None, finetuned: Entry | None) -> UnmatchedTensor:
    one = base or finetuned
    assert one is not None
    return UnmatchedTensor(
        layer=place.layer,
        component=place.component,
        name=one.key if one.place == place else place.component,
        base_shape=None if base is None else list(base.view.shape),
        finetuned_shape=None if finetuned is None else list(finetuned.view.shape),
    )


def _tied_notes(base: Checkpoint, finetuned: Checkpoint) -> list[str]:
    """Which components use another's tensor, in both or in one of the two."""
    notes = []
    for place in dict.fromkeys([*base.tied, *finetuned.tied]):
        ours, theirs = base.tied.get(place), finetuned.tied.get(place)
        owner = ours or theirs
        assert owner is not None
        if ours == theirs:
            notes.append(f"{place.component} is tied to {owner.component} in both: one tensor, compared once")
        elif place in base.entries or place in finetuned.entries:
            tying, other = ("base", "fine-tuned") if ours is not None else ("fine-tuned", "base")
            notes.append(
                f"{place.component} is tied to {owner.component} in {tying} and a tensor of its own in "
                f"{other}: it was compared with that {owner.component}"
            )
    return notes


def _resized_notes(resized: Sequence[UnmatchedTensor]) -> list[str]:
    notes = []
    for tensor in resized:
        assert tensor.base_shape is not None
        assert tensor.finetuned_shape is not None
        ours, theirs = tensor.base_shape[0], tensor.finetuned_shape[0]
        notes.append(
            f"{tensor.component} has {ours} rows in base and {theirs} in fine-tuned: the first "
            f"{min(ours, theirs)}, which both have, were compared"
        )
    return notes


def _unmatched_notes(unmatched: Sequence[UnmatchedTensor]) -> list[str]:
    kinds = {
        "only base has": [t.name for t in unmatched if t.finetuned_shape is None],
        "only fine-tuned has": [t.name for t in unmatched if t.base_shape is None],
    }
    notes = [f"not compared, because {who} them: {_named(names)}" for who, names in kinds.items() if names]
    return notes + [
        f"{t.name} was not compared: its shape is {t.base_shape} in base and {t.finetuned_shape} in "
        "fine-tuned"
        for t in unmatched
        if t.base_shape is not None and t.finetuned_shape is not None
    ]


def _named(names: Sequence[str]) -> str:
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"{count}, {listed(names, MOST_NAMED)}"
