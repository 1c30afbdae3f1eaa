"""The modules that a checkpoint's tensors belong to, built empty, and the names that they give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lazarus import _transformers
from lazarus.errors import BlocksNotFoundError
from lazarus.models import LoadOptions, Source, dissect
from lazarus.models.checkpoint import build_empty
from lazarus.models.faults import translated
from lazarus.models.opening import Opened, open_checkpoint
from lazarus.names.components import Namer, Part, name_by_path
from lazarus.notes import Notes
from lazarus.options import WeightOptions


@dataclass(frozen=True)
class Structure:
    """A checkpoint's configuration, and its model without memory, on torch's device `meta`."""

    opened: Opened
    model: PreTrainedModel | None
    """None where its Python code is its own"""
    namer: Namer | None
    n_layers: int

    @property
    def family(self) -> str:
        """The configuration's model_type."""
        return str(self.opened.config.model_type)

    @property
    def architecture(self) -> str:
        """The class of the model."""
        if self.model is not None:
            return type(self.model).__name__
        return str(next(iter(self.opened.config.architectures or ()), "unknown"))

    def parts(self, path: str, shape: tuple[int, ...]) -> list[Part]:
        """Return what one stored tensor holds: a component, or several that are fused."""
        if self.namer is None:
            return [Part(name_by_path(path), None)]
        return self.namer.parts(path, shape)


def learn_structure(source: Source, chosen: WeightOptions, notes: Notes) -> Structure:
    """Build the empty model of a checkpoint and find its blocks.

    Raises:
        ModelError: its configuration cannot be read or used, or `layers_path` is no list of blocks.
    """
    layers_path = chosen.layers_path
    options = LoadOptions(
        None,
        torch.device("meta"),
        chosen.trust_remote_code,
        layers_path,
        digests=not chosen.no_digests,
    )
    opened = open_checkpoint(source, options)
    opened.note(notes)
    with translated(source.name):
        kind = _transformers.registered_class(opened.model_class, opened.config)
        # The dtype does not matter: names and shapes are asked for.
        model = None if kind is None else build_empty(kind, opened.config, [], torch.float32)
    if model is None:
        told = f"{source.name}: its Python code is its own, so its tensors are named by their keys alone"
        notes.add("own-code", told, model=source.name)
        return Structure(opened, None, None, 0)
    try:
        anatomy = dissect(model, layers_path)
    except BlocksNotFoundError as error:
        if layers_path is not None:
            raise
        told = f"{source.name}: no tensor is in a layer: {error.marked}"
        notes.add("no-layers", told, model=source.name)
        return Structure(opened, model, Namer(model, None), 0)
    return Structure(opened, model, Namer(model, anatomy), len(anatomy.blocks))
