"""The model that an adapter stands on."""

from __future__ import annotations

import os

from lazarus.errors import AdapterError
from lazarus.models.reference import ModelReference, Source, adapter_settings
from lazarus.notes import Notes


def adapter_of(reference: ModelReference) -> Source:
    """The adapter of a MODEL that is an adapter alone."""
    assert reference.adapters, reference
    return reference.adapters[0]


def source_under(finetuned: ModelReference, base: ModelReference) -> Source:
    """The checkpoint that FINETUNED stands on: its own, or BASE's under an adapter alone."""
    if finetuned.model is not None:
        return finetuned.model
    if base.model is None or base.adapters:
        raise AdapterError(
            f"{finetuned.name}: an adapter alone runs on top of BASE, and BASE ({base.name}) is an "
            f"adapter too. Say which model it belongs to: MODEL+{finetuned.name}"
        )
    return base.model


def note_base(adapter: Source, base: Source, notes: Notes) -> None:
    """Note if the adapter names another base than the one that it is on; any spelling will do."""
    named = str(adapter_settings(adapter).get("base_model_name_or_path") or "")
    if not named or os.path.realpath(os.path.expanduser(named)) == os.path.realpath(base.place[0]):
        return
    told = f"{adapter.name} names {named} as its base; it was put on {base.name}"
    notes.add("adapter-base", told, model=adapter.name)
