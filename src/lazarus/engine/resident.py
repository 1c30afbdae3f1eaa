"""Both models in memory: each batch through one, then the other, and out come the pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lazarus.engine.positions import Position, RowPicker
from lazarus.engine.probe import Conventions, learn
from lazarus.engine.recorder import Recorder, Site, StatePair, Take
from lazarus.errors import ShapeMismatchError
from lazarus.models import LoadedModel
from lazarus.tokens import Padding, TokenBatch

_INERT = {
    "_name_or_path",
    "dtype",
    "transformers_version",
    "architectures",
    "use_cache",
    "quantization_config",
}
"""Entries of a configuration that do not change how blocks behave."""


@dataclass(frozen=True)
class ModelPair:
    """Two models of the same depth and width, and how the blocks of each behave."""

    base: LoadedModel
    finetuned: LoadedModel
    base_conventions: Conventions
    finetuned_conventions: Conventions

    def padding(self, longest: int) -> Padding:
        """The batching that is right for both models and prompts of up to `longest` tokens."""
        needed = {self.base_conventions.padding, self.finetuned_conventions.padding}
        # An attention that picks its keys breaks ties by where they stand in the padded batch.
        if any(longest > (model.anatomy.picked_keys or longest) for model in (self.base, self.finetuned)):
            needed.add("equal_lengths")
        return next(p for p in ("one_by_one", "equal_lengths", "right") if p in needed)

    def notes(self, longest: int) -> list[str]:
        """What a reader must know of how the two models run."""
        notes = [*self.base_conventions.notes, *self.finetuned_conventions.notes]
        if self.base.run_dtype != self.finetuned.run_dtype:
            notes.append(
                f"{self.base.name} ran in {self.base.run_dtype}, {self.finetuned.name} in "
                f"{self.finetuned.run_dtype}: part of the divergence is the rounding of the narrower type"
            )
        padding = self.padding(longest)
        if padding != "right":
            how = "one at a time" if padding == "one_by_one" else "with others of their length"
            notes.append(f"padding changes the states of this architecture, so prompts ran {how}")
        return notes

    @property
    def sites(self) -> list[Site]:
        """Every site in the order in which the states reach it."""
        layers: list[Site] = list(range(self.base_conventions.n_layers))
        normed = self.base_conventions.has_final_norm and self.finetuned_conventions.has_final_norm
        return ["embedding", *layers, "final_norm"] if normed else ["embedding", *layers]


def learn_pair(base: LoadedModel, finetuned: LoadedModel, ids: Sequence[int], pad_id: int) -> ModelPair:
    """Learn how both models' blocks behave, and that they can be compared layer by layer.

    Raises:
        ShapeMismatchError: their depth or width is not the same.
        BlocksNotFoundError: one of them has no residual stream over tokens.
    """
    ours = learn(base, ids, pad_id)
    theirs = ours if _same_design(base, finetuned) else learn(finetuned, ids, pad_id)
    for what, b, f in (
        ("layers", ours.n_layers, theirs.n_layers),
        ("features in the residual stream", ours.width, theirs.width),
    ):
        if b != f:
            raise ShapeMismatchError(
                f"{base.name} has {b} {what}, {finetuned.name} has {f}. Layer by layer, cosine "
                "similarity is defined only for models of the same depth and width: compare a model "
                "with one derived from it."
            )
    return ModelPair(base, finetuned, ours, theirs)


def _same_design(base: LoadedModel, finetuned: LoadedModel) -> bool:
    """The same class and the same configuration: then the blocks of both behave alike."""
    one, other = base.model.config.to_dict(), finetuned.model.config.to_dict()
    differing = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    return type(base.model) is type(finetuned.model) and differing <= _INERT


def run_pairs(
    pair: ModelPair,
    batches: Sequence[TokenBatch],
    position: Position,
    advanced: Callable[[int], None],
) -> Iterator[StatePair]:
    """Run every batch through both models; yields each site's pair of states, batch by batch.

    Only the compared rows of one batch are ever kept. `advanced` is told the tokens of each batch
    when it is done.

    Raises:
        DeviceError: a batch does not fit the device's memory.
    """
    base, finetuned = Recorder(pair.base), Recorder(pair.finetuned)
    for batch in batches:
        picker = RowPicker.of(batch.prompts, batch.lengths, position)
        padded = batch.padded()
        ours = _pass(base, padded, picker, pair.base_conventions)
        theirs = _pass(finetuned, padded, picker, pair.finetuned_conventions)
        # zip stops at the last common site: a final norm that only one of them has is no site.
        for site, b, f in zip(pair.sites, ours, theirs, strict=False):
            yield StatePair(site, picker.prompts, b, f)
        advanced(batch.n_tokens)


def _pass(
    recorder: Recorder, padded: tuple[Tensor, Tensor], picker: RowPicker, conventions: Conventions
) -> list[Tensor]:
    """The compared rows of one model at every site, in the order of the sites."""
    take = Take(block=lambda states: picker.pick(conventions.rows(states)), final=picker.pick)
    seen = recorder.run(*padded, take)
    assert seen.embedding is not None
    assert seen.final is not None
    assert len(seen.blocks) == conventions.n_layers, (len(seen.blocks), conventions.n_layers)
    return [seen.embedding, *seen.blocks, seen.final]
