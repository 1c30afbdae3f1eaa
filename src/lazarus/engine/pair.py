"""Two models that can be compared, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Literal

from lazarus.batches import Padding
from lazarus.engine.forms import Form
from lazarus.engine.probe import Conventions, learn, passes_go_on
from lazarus.engine.score_heads import ScoreHead
from lazarus.engine.scored import Scored, find_scored
from lazarus.errors import ShapeMismatchError
from lazarus.facts import ComponentName, ComponentSite, PairShape, note_dtypes
from lazarus.messages import option
from lazarus.models import LoadedModel, shared_blocks
from lazarus.models import same_design as have_same_design
from lazarus.notes import Notes


@dataclass(frozen=True)
class ModelPair(PairShape):
    """Two models, and how the blocks of each behave."""

    base: LoadedModel
    finetuned: LoadedModel
    base_conventions: Conventions
    finetuned_conventions: Conventions
    align: Literal["ids", "text"] = "ids"
    same_blocks: tuple[bool, ...] = ()
    """for each block, whether both models have the same one: the same weights, bit for bit"""
    n_common: int = 0
    """how many of the first blocks run once, for both models"""
    same_design: bool = False
    """whether both have one class and one configuration, so that the same weights compute the same"""
    scored: Scored | None = None
    """the outputs beside next tokens that are compared: then next tokens are not"""
    why_no_scores: str | None = None
    """why there are none, where one of the two has such outputs"""
    streams: bool = False
    """whether the blocks run one at a time over all batches, read from disk"""

    @property
    def is_alone(self) -> bool:
        """Return whether one model runs by itself: both states of a pair are its own."""
        return self.finetuned is self.base

    @property
    def widths(self) -> tuple[int, int]:
        """The width of each model's residual stream."""
        return self.base_conventions.width, self.finetuned_conventions.width

    @property
    def n_layers(self) -> tuple[int, int]:
        """The number of blocks of each model."""
        return self.base_conventions.n_layers, self.finetuned_conventions.n_layers

    @property
    def have_final_norm(self) -> bool:
        """Return whether both models have a norm after their last block."""
        return self.base_conventions.has_final_norm and self.finetuned_conventions.has_final_norm

    @property
    def shares_vocabulary(self) -> bool:
        """Return whether token i of both heads is the same token."""
        heads = (self.base_conventions.head_reads, self.finetuned_conventions.head_reads)
        return self.align == "ids" and None not in heads and self.scored is None

    @property
    def compares_outputs(self) -> bool:
        """Return whether next tokens, scores or embeddings are compared."""
        return self.shares_vocabulary or self.scored is not None

    def without_output(self) -> ModelPair:
        """Return the pair without its heads: only hidden states are compared."""
        ours, theirs = (
            replace(conventions, head_reads=None)
            for conventions in (self.base_conventions, self.finetuned_conventions)
        )
        return replace(self, base_conventions=ours, finetuned_conventions=theirs, scored=None)

    def score_head(self, side: int) -> ScoreHead | None:
        """Return what makes the scores of base, 0, or of the fine-tuned model, 1, where they are compared."""
        return None if self.scored is None else self.scored.heads[side]

    @cached_property
    def forms(self) -> tuple[list[Form], list[Form]]:
        """Return the forms of base's blocks and of their counterparts; empty where that is not compared."""
        ours, theirs = self.base_conventions.components, self.finetuned_conventions.components
        if ours is None or theirs is None:
            return [], []
        return list(map(ours.at, range(self.n_layers[0]))), list(map(theirs.at, self.matched))

    def component_sites(self, layer: int) -> list[ComponentSite]:
        """Return the components of a block that both models have, as wide in one as in the other."""
        if not self.forms[0]:
            return []
        ours, theirs = self.forms[0][layer], self.forms[1][layer]
        names = list[ComponentName](ours.terms if self.same_width else [])
        # Of two readings of a text the last tokens are compared, which need not be the same token.
        if self.align == "ids" and ours.router and theirs.router:
            same_experts = ours.router.n_experts == theirs.router.n_experts
            names += [name for name in ("router", "experts") if same_experts and name in ours.names]
        return [ComponentSite(layer, name) for name in names if name in theirs.names]

    def padding(self, longest: int) -> Padding:
        """The batching that is right for both models and prompts of up to `longest` tokens."""
        needed = {self.base_conventions.padding, self.finetuned_conventions.padding}
        # An attention that picks its keys breaks ties by where they stand in the padded batch.
        if any(longest > (model.anatomy.picked_keys or longest) for model in (self.base, self.finetuned)):
            needed.add("equal_lengths")
        if self.align == "text" and needed != {"right"}:
            return "one_by_one"  # prompts of one length for base are of several for the other tokenizer
        return next(p for p in ("one_by_one", "equal_lengths", "right") if p in needed)

    def note_run(self, longest: int, notes: Notes) -> None:
        """Note what a reader must know of how the two models run, with prompts of up to `longest` tokens."""
        notes.extend([*self.base_conventions.notes, *self.finetuned_conventions.notes])
        names = self.base.name, self.finetuned.name
        note_dtypes(names, (self.base.run_dtype, self.finetuned.run_dtype), notes)
        padding = self.padding(longest)
        if padding != "right":
            how = "one at a time" if padding == "one_by_one" else "with others of their length"
            known = (self.base_conventions, self.finetuned_conventions)
            why = (
                "padding changes the states of this architecture"
                if all(each.padding_is_known for each in known)
                else "too few states were finite to see whether padding changes them"
            )
            notes.add("no-padding", f"{why}, so prompts ran {how}")
        if self.base.pager is not None and not self.streams:
            notes.add(
                "batches-read-weights",
                "a pass of this architecture cannot go on after a block that ran before, so prompts ran "
                "batch by batch, and each batch read all weights",
            )
        self.note_shapes(names, notes)
        if self.scored is not None:
            self.scored.note(longest, notes)

    def note_common(self, notes: Notes) -> None:
        """Note what did not run a second time; of models that are streamed it is known after the run."""
        n_common = self._n_streamed_alike() if self.streams and not self.is_alone else self.n_common
        if not n_common:
            return
        which = "block 0 is" if n_common == 1 else f"blocks 0 to {n_common - 1} are"
        alike = "and ran once for both where the same states entered them"
        text = f"{which} the same in both models, bit for bit, {alike}"
        notes.add("common-blocks", text, layers=range(n_common))

    def _n_streamed_alike(self) -> int:
        pager = self.finetuned.pager
        if pager is None or self.align != "ids" or not self.same_design:
            return 0
        return sum(1 for _ in takewhile(pager.same_as_base, range(pager.n_blocks)))


def learn_pair(
    base: LoadedModel,
    finetuned: LoadedModel,
    ids: tuple[Sequence[int], Sequence[int]],
    pad_ids: tuple[int, int],
    align: Literal["ids", "text"] = "ids",
) -> ModelPair:
    """Learn how both models' blocks behave, from a few of each one's own token ids.

    Raises:
        BlocksNotFoundError: one of them has no residual stream over tokens.
    """
    ours = learn(base, ids[0], pad_ids[0])
    same_design = have_same_design(base.model, finetuned.model)
    # What a checkpoint lacks is random, and then its head is not that of the other.
    as_base = same_design and base.missing == finetuned.missing
    theirs = ours if as_base else learn(finetuned, ids[1], pad_ids[1])
    scored = find_scored((base, finetuned), (ours.labels, theirs.labels), align)
    pair = ModelPair(
        base,
        finetuned,
        ours,
        theirs,
        align,
        same_design=same_design,
        scored=scored if isinstance(scored, Scored) else None,
        why_no_scores=scored if isinstance(scored, str) else None,
    )
    if pair.is_alone:
        return replace(pair, streams=base.pager is not None and _streams(pair, ids, pad_ids))
    if base.pager is not None:  # which blocks are the same is seen when they are read
        unknown = (False,) * len(base.anatomy.blocks)
        return replace(pair, streams=_streams(pair, ids, pad_ids), same_blocks=unknown)
    same = shared_blocks(base, finetuned)
    # Later blocks may be the same again, but what enters them is not.
    n_common = same.index(False) if False in same else len(same)
    # With a tokenizer each, what enters the first block may differ already.
    if align == "text" or (n_common and not passes_go_on(base, ids[0], pad_ids[0], [n_common])):
        n_common = 0
    return replace(pair, same_blocks=tuple(same), n_common=n_common)


def _streams(pair: ModelPair, ids: tuple[Sequence[int], Sequence[int]], pad_ids: tuple[int, int]) -> bool:
    """Return whether a pass of each model goes on after any number of its blocks without them."""
    models = ((pair.base, pair.base_conventions), (pair.finetuned, pair.finetuned_conventions))
    # One class and one configuration: what base's code can do, the other's can.
    n_models = 1 if pair.same_design else 2
    return all(
        passes_go_on(model, ids[i], pad_ids[i], range(conventions.n_layers))
        for i, (model, conventions) in enumerate(models[:n_models])
    )


def check_shapes(pair: ModelPair, n_prompts: int, fewest: int, *, localize: bool) -> None:
    """Refuse a pair that cannot be compared in the way that was asked for.

    Raises:
        ShapeMismatchError: widths differ and there are too few prompts for CKA, or blocks cannot be
            put beside each other.
    """
    names = f"{pair.base.name} and {pair.finetuned.name}"
    if not pair.same_width and n_prompts < fewest:
        raise ShapeMismatchError(
            f"{names} have {pair.widths[0]} and {pair.widths[1]} features in the residual stream, so their "
            f"states have no cosine. CKA compares them from {fewest} prompts on, and these are {n_prompts}: "
            "give more prompts, or compare a model with one derived from it."
        )
    if localize and not pair.same_shape:
        raise ShapeMismatchError(
            f"{option('localize')} runs each block of one model on the states of the other, and {names} have "
            f"{pair.base_conventions.n_layers} blocks of {pair.widths[0]} features and "
            f"{pair.finetuned_conventions.n_layers} of {pair.widths[1]}. Leave {option('localize')} out.",
            option="localize",
        )
