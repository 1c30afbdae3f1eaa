"""The lens of a model that runs, and who is told how far it has come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import msgspec

from lazarus.engine import Conventions, find_break
from lazarus.lens.lens import Lens
from lazarus.lens.reading import read_layers
from lazarus.lens.vocabulary import Vocabulary
from lazarus.loading import Role
from lazarus.models import LoadedModel
from lazarus.notes import Note, Notes
from lazarus.tokens import TokenizedPrompt


@runtime_checkable
class Observer(Protocol):
    """An object that is told how far a run has come."""

    def loading(self, role: Role, name: str) -> None:
        """A model is about to be loaded: `base` is model 1, `finetuned` is model 2."""

    def running(self, n_layers: int) -> None:
        """The lens begins: so many layers in all, of both models."""

    def advanced(self, n_layers: int) -> None:
        """Count so many more layers as read."""


class Silence:
    """An observer that tells nobody."""

    def loading(self, role: Role, name: str) -> None:
        """Ignore it."""

    def running(self, n_layers: int) -> None:
        """Ignore it."""

    def advanced(self, n_layers: int) -> None:
        """Ignore it."""


def look_at(
    model: LoadedModel,
    conventions: Conventions,
    prompt: TokenizedPrompt,
    tokenizer: Any,
    advanced: Callable[[int], None],
) -> Lens:
    """Return a model's lens on a prompt; `advanced` is told of so many layers more.

    Raises:
        UnsupportedModelError: the model predicts no next token, or cannot be read layer by layer.
        DeviceError: out of memory, or an operator that the device lacks.
    """

    def why_not_finite() -> Note | None:
        found = find_break(model, prompt.ids, conventions.axes[1], conventions.head_reads)
        return None if found is None else found.note(model, "the prompt")

    notes = Notes(conventions.notes)
    logits = read_layers(model, conventions, prompt.ids, advanced, notes)
    vocabulary = Vocabulary(tokenizer, logits.shape[-1])
    info = msgspec.structs.replace(model.info(conventions.n_layers), files=model.files.told(notes))
    return Lens(info, why_not_finite, vocabulary, prompt, logits, notes)
