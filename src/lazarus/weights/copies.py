"""Models of different depth: which layers of one are copies of layers of the other."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lazarus.notes import Notes
from lazarus.weights.checkpoints import Checkpoint
from lazarus.weights.views import View, bits, same_bits

_SAMPLE = 4096
"""how many elements of a tensor its fingerprint is taken of"""
_MOST_NAMED = 4

Layer = Mapping[str, View]
"""the tensors of one layer by their components"""


@dataclass(frozen=True)
class Run:
    """Layers of fine-tuned that are as many layers of base, one after the other, bit for bit."""

    finetuned: int
    base: int
    n_layers: int

    def __str__(self) -> str:
        verb = "is" if self.n_layers == 1 else "are"
        return f"{_span(self.finetuned, self.n_layers)} {verb} base's {_span(self.base, self.n_layers)}"


def find_copies(base: Checkpoint, finetuned: Checkpoint) -> list[Run]:
    """Find the layers of fine-tuned that are copies of layers of base, in the order of fine-tuned.

    Of several equal layers of base, the one that goes on with the run is taken.

    Raises:
        OSError: a file is missing or too short.
    """
    ours, theirs = _layers(base), _layers(finetuned)
    prints: dict[str, list[int]] = defaultdict(list)
    for place, layer in ours.items():
        prints[_fingerprint(layer)].append(place)
    runs: list[Run] = []
    for place, layer in theirs.items():
        following = runs[-1].base + runs[-1].n_layers if runs else place
        alike = sorted(prints.get(_fingerprint(layer), ()), key=lambda i: (i != following, i))
        # The fingerprint only narrows the search: what is called a copy was compared to the end.
        origin = next((i for i in alike if _same(ours[i], layer)), None)
        if origin is None:
            continue
        last = runs[-1] if runs else None
        if last and last.finetuned + last.n_layers == place and origin == following:
            runs[-1] = Run(last.finetuned, last.base, last.n_layers + 1)
        else:
            runs.append(Run(place, origin, 1))
    return runs


def note_depths(base: Checkpoint, finetuned: Checkpoint, runs: Sequence[Run], notes: Notes) -> None:
    """Note that the two have different depths, and which layers are copies."""
    n_base, n_finetuned = base.structure.n_layers, finetuned.structure.n_layers
    said = (
        f"base has {n_base} layers and fine-tuned {n_finetuned}: they were compared by number, and those "
        "beyond the other's have no counterpart"
    )
    if not runs:
        notes.add("depths-differ", f"{said}. No layer of fine-tuned is a copy of one of base")
        return
    named = ", ".join(map(str, runs[:_MOST_NAMED]))
    left = len(runs) - _MOST_NAMED
    n_copies = sum(run.n_layers for run in runs)
    notes.add(
        "depths-differ",
        f"{said}. {n_copies} layers of fine-tuned are copies of base's, bit for bit: {named}"
        + (f" and {left} more" if left > 0 else "")
        + ("" if n_copies == n_finetuned else f"; the other {n_finetuned - n_copies} are not"),
    )


def _span(first: int, n_layers: int) -> str:
    return f"layer {first}" if n_layers == 1 else f"layers {first} to {first + n_layers - 1}"


def _layers(checkpoint: Checkpoint) -> dict[int, Layer]:
    found: dict[int, dict[str, View]] = defaultdict(dict)
    for place, entry in checkpoint.entries.items():
        if place.layer is not None:
            found[place.layer][place.component] = entry.view
    return dict(sorted(found.items()))


def _fingerprint(layer: Layer) -> str:
    """Return a hash of the first elements of every tensor, in float64, whatever their stored dtype is."""
    found = hashlib.sha256()
    for component in sorted(layer):
        view = layer[component]
        n_rows = min(view.matrix[0], max(1, _SAMPLE // max(view.matrix[1], 1)))
        sample = bits(view.read(0, n_rows).to(torch.float64).contiguous())
        found.update(f"{component} {view.shape}".encode())
        found.update(sample.numpy().tobytes())
    return found.hexdigest()


def _same(one: Layer, other: Layer) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)
