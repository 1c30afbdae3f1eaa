"""Both models in memory: each batch through one, then the other, and out come the pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lazarus.batches import BatchPair, TokenBatch
from lazarus.engine.forced import GivenStates, forced
from lazarus.engine.kept import KeptStates
from lazarus.engine.local import beside, components_beside
from lazarus.engine.noise import nudged
from lazarus.engine.pair import ModelPair
from lazarus.engine.positions import RowPicker
from lazarus.engine.replay import Passed, recording
from lazarus.engine.runner import Begun, Runner, States, output_pairs
from lazarus.engine.taps import ComponentRows, component_pairs
from lazarus.sites import Position, StatePair


def run_pairs(
    pair: ModelPair,
    batches: Sequence[BatchPair],
    position: Position,
    advanced: Callable[[int], None],
    *,
    localize: bool = False,
) -> Iterator[StatePair]:
    """Run every batch through both models; yields each site's pair of states, batch by batch.

    `advanced` is told the tokens of each batch when it is done.

    Raises:
        DeviceError: a batch does not fit the device's memory.
    """
    resident = Resident(pair, position, localize=localize)
    for batch in batches:
        yield from resident.run(batch)[1]
        advanced(batch.base.n_tokens)


class Resident:
    """Both models of a pair, ready to run batches.

    Only the compared rows of one batch are ever kept. The first blocks that the two models have in common
    run once. `localize` also runs each block of the fine-tuned model on what base's block receives.
    """

    def __init__(
        self,
        pair: ModelPair,
        position: Position,
        *,
        localize: bool,
        given: GivenStates | None = None,
        nudge: torch.Generator | None = None,
    ) -> None:
        self.pair = pair
        self.position = position
        self.localize = localize
        self.given, self.nudge = given, nudge
        self.kept: KeptStates | None = None
        """base's rows of batches that it has run before"""
        self.base = Runner(pair.base, pair.base_conventions, pair.score_head(0))
        self.finetuned = Runner(pair.finetuned, pair.finetuned_conventions, pair.score_head(1))

    def run(self, batch: BatchPair) -> tuple[States, Iterator[StatePair]]:
        """Run a batch through both models; returns base's states, and each site's pair.

        Raises:
            DeviceError: the batch does not fit the device's memory.
        """
        pair, position = self.pair, self.position
        if pair.is_alone:
            return self._run_alone(batch.base)
        known = self.kept.of(batch.base, position) if self.kept else None
        if known is not None:
            return known, self._pairs(known, self.finetuned.run(batch.finetuned, position), [], [])
        local, inside = list[Tensor](), list[ComponentRows | None]()
        picking, picker = (
            self.base.picking(RowPicker.of(batch.base, position)),
            self.base.inside(batch.base, position),
        )
        # With a tokenizer each the ids may differ, and then no block of base's stands for the other's.
        passed, n_common = Passed(), pair.n_common if batch.base is batch.finetuned else 0
        # Before the hooks: the prefix is a pass of its own, and neither recorded nor run beside.
        self.base.begin(batch.base, position)
        with (
            recording(pair.base.anatomy.blocks[:n_common], passed.add),
            beside(pair, picking, local) if self.localize else nullcontext(),
            components_beside(pair, picker, inside) if self.localize and picker else nullcontext(),
        ):
            ours = self.base.run(batch.base, position)
        if self.kept:
            self.kept.keep(batch.base, position, ours)
        prefix = self.base.prefix_of(batch.base, position)
        begun = Begun(n_common, passed, ours, prefix) if n_common else None
        theirs = self.finetuned.run(batch.finetuned, position, begun)
        return ours, self._pairs(ours, theirs, local, inside)

    def _run_alone(self, batch: TokenBatch) -> tuple[States, Iterator[StatePair]]:
        """Run a batch through one model; where states of another run are given, its blocks on these too."""
        model, position, local = self.pair.base, self.position, list[Tensor]()
        with nudged(model.anatomy.blocks[0], self.nudge) if self.nudge else nullcontext():
            ours = self.base.run(batch, position)
        if self.given is not None:
            with forced(model, self.pair.base_conventions, batch, self.given):
                local = self.base.run(batch, position).sites[1:-1]
        return ours, self._pairs(ours, ours, local, [])

    def _pairs(
        self,
        ours: States,
        theirs: States,
        local: Sequence[Tensor],
        inside: Sequence[ComponentRows | None],
    ) -> Iterator[StatePair]:
        pair = self.pair
        matched = [theirs.sites[0], *(theirs.sites[1 + i] for i in pair.matched), theirs.sites[-1]]
        own: Sequence[Tensor | None] = local or [None] * len(pair.matched)
        # zip stops at the last common site: a final norm that only one of them has is no site.
        for site, b, f, changed in zip(pair.sites, ours.sites, matched, [None, *own, None], strict=False):
            yield StatePair(site, ours.prompts, b, f, changed)
        for layer, counterpart in enumerate(pair.matched):
            block = ours.block(layer)
            # Where a block is the same in both, F(b) is B(b).
            beside_it = None if not inside else block.components if inside[layer] is None else inside[layer]
            sites = pair.component_sites(layer)
            yield from component_pairs(sites, block, theirs.block(counterpart), beside_it)
        if pair.compares_outputs:
            yield from output_pairs(self.base, self.finetuned, ours, theirs)
