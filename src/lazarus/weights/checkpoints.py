"""One checkpoint as components: each with its place, the key of its tensor, and a view of its elements."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

from transformers import PreTrainedModel

from lazarus.errors import WeightsError
from lazarus.models import Source
from lazarus.models.checkpoint import KeyMap, natural_key
from lazarus.models.contents import Unread
from lazarus.models.faults import translated
from lazarus.models.formats import refuse_empty
from lazarus.models.load import other_shape
from lazarus.models.wrappers import Wrappers, refuse_unmerged
from lazarus.names.components import Part, Place
from lazarus.names.parts import Take
from lazarus.notes import Notes
from lazarus.options import WeightOptions
from lazarus.tokens import listed
from lazarus.weights.gguf import GgufFile
from lazarus.weights.stores import Store, open_store
from lazarus.weights.structure import Structure, learn_structure
from lazarus.weights.views import View

_LAST = sys.maxsize
"""after all of the model's own: what has no place in it"""


@runtime_checkable
class ViewOf(Protocol):
    """Gives a view of a tensor, or of a part of it."""

    def __call__(self, take: Take | None, /) -> View:
        """Return the view; nothing is read yet."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor of the files: its key there, its path in the model, and what was stored."""

    key: str
    path: str
    order: int
    """the place in the model of the parameter that it makes, or a part of it"""
    shape: tuple[int, ...]
    dtype: str
    view: ViewOf
    in_order: bool = True
    """whether the parameter that it makes has its elements as they are stored"""


@dataclass(frozen=True)
class Entry:
    """One component: where it is, its tensor's names in the files and in the model, and a view of it."""

    place: Place
    key: str
    path: str
    take: Take | None
    view: View
    in_order: bool = True
    """whether the parameter that it makes has its elements as they are stored"""


@dataclass(frozen=True)
class Checkpoint:
    """All components of one checkpoint, in the model's order."""

    source: Source
    structure: Structure
    entries: Mapping[Place, Entry]
    tied: Mapping[Place, Place]
    """components without a tensor of their own, and whose tensor they use"""
    tied_paths: Mapping[str, Place]
    """these components by the paths of their parameters"""
    n_tensors: int
    n_parameters: int
    stored_dtype: str
    unread: tuple[Unread, ...] = ()
    """other sets of weights in its folder"""

    def find(self, place: Place) -> Entry | None:
        """A component, even one that uses another's tensor."""
        return self.entries.get(place) or self.entries.get(self.tied.get(place, place))


def read_checkpoint(source: Source, options: WeightOptions, notes: Notes) -> Checkpoint:
    """Find every tensor of a checkpoint; their numbers are read later.

    Raises:
        ModelError: its configuration or its files cannot be read, or its weights are refused.
    """
    structure = learn_structure(source, options, notes)
    unread: tuple[Unread, ...] = ()
    if source.gguf_file:
        stored, made = _read_gguf(structure)
    else:
        store = open_store(structure.opened, notes, allow_pickle=options.allow_pickle)
        stored, made = _read_files(structure, store, notes)
        unread = store.unread
    refuse_empty(source.name, _empty(structure, stored))
    if not stored:
        raise WeightsError(f"{source.name}: there is no tensor in its files. Fetch the model again.")
    entries = _entries(structure, stored)
    tied = _tied(structure, entries)
    _note_lacking(structure, stored, made, notes)
    return Checkpoint(
        source=source,
        structure=structure,
        entries=entries,
        tied=dict(tied.values()),
        tied_paths={path: place for path, (place, _) in tied.items()},
        n_tensors=len(stored),
        n_parameters=sum(math.prod(each.shape) for each in stored),
        stored_dtype=_usual_type(stored),
        unread=unread,
    )


def _empty(structure: Structure, stored: Iterable[Stored]) -> list[str]:
    """The keys of stored tensors without elements that make parameters which have some."""
    if structure.model is None:
        return []
    full = {name for name, tensor in structure.model.state_dict().items() if tensor.numel()}
    return sorted(each.key for each in stored if 0 in each.shape and each.path in full)


def _read_files(structure: Structure, store: Store, notes: Notes) -> tuple[list[Stored], set[str]]:
    """Return the tensors of safetensors or .bin files, and the parameters that they make."""
    known: dict[str, tuple[str, int, bool]] = {}
    made: set[str] = set()
    wrappers, name = Wrappers(), structure.opened.source.name
    if structure.model is not None:
        keys = KeyMap(structure.model, store.shapes)
        known, made, wrappers = _paths(structure.model, keys), keys.made, keys.wrappers
        refuse_unmerged(name, store.shapes.keys() - known.keys())
    stored = []
    for key, shape in store.shapes.items():
        path, order, in_order = known.get(key, (wrappers.strip(key), _LAST, True))
        view = partial(store.view, key)
        stored.append(Stored(key, path, order, shape, store.dtypes[key], view, in_order))
    wrappers.note(name, store.shapes, notes)
    return stored, made


def _paths(model: PreTrainedModel, keys: KeyMap) -> dict[str, tuple[str, int, bool]]:
    """Return each key's path, its place in the model, and whether the model has its elements in their order.

    A piece of a parameter has a path as if it were one itself.
    """
    order = {name: place for place, name in enumerate(model.state_dict())}
    return {
        key: (target if keys.is_plain(target) else keys.renamed(key), order[target], keys.is_in_order(target))
        for target, sources in keys.sources.items()
        for key in sources
    }


def _read_gguf(structure: Structure) -> tuple[list[Stored], set[str]]:
    """The tensors of a GGUF file, every expert of a stack by itself, and the parameters that come of them."""
    opened, model = structure.opened, structure.model
    assert opened.gguf is not None
    assert model is not None
    parameters = model.state_dict()
    order = {name: place for place, name in enumerate(parameters)}
    stored, made = [], set()
    with translated(opened.source.name):
        file = GgufFile(opened.gguf.file, model)
        for tensor in file.tensors():
            view = partial(file.view, tensor.key, tensor.expert)
            place = order.get(tensor.target, _LAST)
            if (
                tensor.expert is None
                and place != _LAST
                and tensor.view.shape != parameters[tensor.target].shape
            ):
                # The layout of queries and keys depends on the number of heads, which is then wrong as well.
                wanted = parameters[tensor.target].shape
                raise other_shape(opened.source, tensor.target, tensor.view.shape, wanted)
            stored.append(Stored(tensor.key, tensor.path, place, tensor.view.shape, tensor.view.dtype, view))
            made.add(tensor.target)
    return stored, made


def _entries(structure: Structure, stored: Iterable[Stored]) -> dict[Place, Entry]:
    """The components in the model's order; of two in one place, the second is whole and called by its key."""
    found: dict[Place, Entry] = {}
    # The pieces of one parameter have its place in common: experts are sorted by their numbers.
    for each in sorted(stored, key=lambda each: (each.order, natural_key(each.path))):
        parts = structure.parts(each.path, each.shape)
        if any(part.place in found for part in parts):
            parts = [Part(Place(parts[0].place.layer, each.key), None)]
        for part in parts:
            view = each.view(part.take)
            found[part.place] = Entry(part.place, each.key, each.path, part.take, view, each.in_order)
    return found


def _tied(structure: Structure, entries: Mapping[Place, Entry]) -> dict[str, tuple[Place, Place]]:
    """Return the parameters that are not stored but tied to others: their places, and their owners."""
    if structure.model is None:
        return {}
    by_path = {entry.path: place for place, entry in entries.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in structure.model.state_dict().items()}
    ties: dict[str, str] = structure.model.all_tied_weights_keys
    groups = {owner: [owner] for owner in ties.values()}
    for name, owner in ties.items():
        groups[owner].append(name)
    found: dict[str, tuple[Place, Place]] = {}
    for names in groups.values():
        # Files hold any one of them: a tied embedding may be there under the name of the LM head alone.
        held = next((by_path[name] for name in names if name in by_path), None)
        if held is not None:
            lacking = [name for name in names if name not in by_path and name in shapes]
            found |= {name: (structure.parts(name, shapes[name])[0].place, held) for name in lacking}
    return found


def _note_lacking(structure: Structure, stored: Iterable[Stored], made: set[str], notes: Notes) -> None:
    """Note the parameters that no file holds, or of which not all pieces are there.

    A GGUF file has whole stacks, and not every size that the configuration has.
    """
    if structure.model is None:
        return
    source = structure.opened.source
    pieces: dict[int, list[int]] = defaultdict(list)
    for each in stored:
        pieces[each.order].append(math.prod(each.shape))
    order = {name: place for place, name in enumerate(structure.model.state_dict())}
    held = set(made)
    ties: dict[str, str] = structure.model.all_tied_weights_keys
    # A checkpoint may hold either of two tied parameters, or both.
    held |= {tied for tied, owner in ties.items() if owner in held}
    held |= {owner for tied, owner in ties.items() if tied in held}
    names = []
    for name, parameter in structure.model.named_parameters():
        sizes = pieces.get(order[name], [])
        if name not in held:
            names.append(name)
        elif source.gguf_file is None and len(sizes) > 1 and sum(sizes) < parameter.numel():
            names.append(f"{name} (in part)")
    if names:
        told = f"{source.name}: its files lack {len(names)} of the model's parameters: {listed(names, 5)}"
        notes.add("missing-tensors", told, model=source.name)


def _usual_type(stored: Iterable[Stored]) -> str:
    """Return the dtype of most of the stored elements."""
    counts: Counter[str] = Counter()
    for each in stored:
        counts[each.dtype] += math.prod(each.shape)
    return counts.most_common(1)[0][0]
