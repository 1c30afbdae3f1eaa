"""One block of each model in memory at a time: each block runs all batches before the next one is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import zip_longest

import torch
from torch import Tensor

from lazarus.engine.forced import forced
from lazarus.engine.local import beside, components_beside
from lazarus.engine.noise import Sample, nudged
from lazarus.engine.pair import ModelPair
from lazarus.engine.passes import NOTHING, NoisePass, PagedBlocks, Pass, Step
from lazarus.engine.runner import Runner, States, output_pairs
from lazarus.engine.spill import SpillBuffer, check_room
from lazarus.engine.taps import ComponentRows, component_pairs
from lazarus.engine.work import Work
from lazarus.models import free_bytes
from lazarus.sites import StatePair

KEPT_SHARE = 16
"""States between two blocks may take one part in so many of the free memory."""


class _Stream:
    """A pair on its way, a block at a time."""

    def __init__(self, pair: ModelPair, work: Work, buffer: SpillBuffer, reader: Executor | None) -> None:
        self.pair = pair
        self.work = work
        base, finetuned = (
            Runner(pair.base, pair.base_conventions, pair.score_head(0)),
            Runner(pair.finetuned, pair.finetuned_conventions, pair.score_head(1)),
        )
        self.runners = base, finetuned
        self.ours = [Pass(base, b.base, work.position, buffer) for b in work.batches]
        # Of a model alone: on the states of another run, where there are such.
        others = work.batches if not pair.is_alone or work.given else ()
        self.theirs = [Pass(finetuned, b.finetuned, work.position, buffer) for b in others]
        self.again = [Pass(base, batch, work.position, buffer) for batch in work.again]
        self.noise = [NoisePass(base, batch, work.noise, buffer) for batch in work.sample]
        self.sample = Sample(work.sample)
        self.our_blocks, self.their_blocks = (
            PagedBlocks(pair.base, reader),
            PagedBlocks(pair.finetuned, reader),
        )
        self.generator = torch.Generator().manual_seed(work.noise.seed)
        self.n_done = 0
        """blocks of the fine-tuned model that have run"""

    @property
    def state_bytes(self) -> int:
        """Return what the states of all passes take, between two blocks."""
        passes = [*self.ours, *self.theirs, *self.again, *(p for noise in self.noise for p in noise.passes)]
        return sum(p.state_bytes for p in passes)

    def layer(self, layer: int, advanced: Callable[[int], None]) -> Iterator[StatePair]:
        """Run one block of base over all batches, and the fine-tuned model up to its counterpart."""
        counterpart = self.pair.matched[layer]
        if not self.pair.is_alone:
            self._run_theirs(counterpart)
        is_new = self.n_done == counterpart
        theirs = self.their_blocks.in_memory(counterpart) if is_new and not self.pair.is_alone else NOTHING
        with self.our_blocks.in_memory(layer), theirs:
            for ours, other in zip_longest(self.ours, self.theirs):
                if self.pair.is_alone:
                    yield from self._alone(layer, ours, other)
                else:
                    yield from self._pair(layer, ours, other, is_new)
                advanced(_share(ours.batch.n_tokens, layer, len(self.pair.matched)))
            for again in self.again:
                self._keep(layer, again, again.step(layer))
            for noise in self.noise:
                yield from noise.step(layer, self.pair.component_sites(layer), self.generator, self.sample)
                advanced(_share(noise.batch.n_tokens, layer, len(self.pair.matched)))
        self.n_done = counterpart + 1

    def ends(self) -> Iterator[StatePair]:
        """Yield what comes after the blocks: the final norm, and the heads."""
        with _heads_in_memory(self.pair):
            for ours, theirs in zip_longest(self.ours, self.theirs):
                b = ours.end()
                f = b if self.pair.is_alone else theirs.end()
                # Base's rows are kept before the noise of the same prompts asks for them.
                self._keep_end(b)
                if "final_norm" in self.pair.sites:
                    yield StatePair("final_norm", b.prompts, b.sites[0], f.sites[0])
                if self.pair.compares_outputs:
                    yield from output_pairs(*self.runners, b, f)
            for again in self.again:
                self._keep_end(again.end())
            for noise in self.noise:
                yield from noise.ends("final_norm" in self.pair.sites, self.sample)

    def _alone(self, layer: int, ours: Pass, beside: Pass | None) -> Iterator[StatePair]:
        """Run one block of a model that runs by itself, and on the states of another run if there are any."""
        model, work, prompts = self.pair.base, self.work, ours.picker.prompts
        around = NOTHING
        if work.nudge is not None and not layer:
            around = nudged(model.anatomy.blocks[0], work.nudge)
        b = ours.step(layer, around)
        self._keep(layer, ours, b)
        local = None
        if beside is not None and work.given is not None:
            around = forced(model, self.pair.base_conventions, ours.batch, work.given, layer)
            local = beside.step(layer, around).block.states
        if b.embedding is not None:
            yield StatePair("embedding", prompts, b.embedding, b.embedding)
        yield StatePair(layer, prompts, b.block.states, b.block.states, local)
        yield from component_pairs(self.pair.component_sites(layer), b.block, b.block)

    def _pair(self, layer: int, ours: Pass, theirs: Pass, is_new: bool) -> Iterator[StatePair]:
        local, inside = list[Tensor](), list[ComponentRows | None]()
        same, prompts, pick = self._is_same(layer), ours.picker.prompts, ours.runner.picking(ours.picker)
        with ExitStack() as around:
            if self.work.localize and not same:
                around.enter_context(beside(self.pair, pick, local, layer))
                if ours.inside is not None:
                    around.enter_context(components_beside(self.pair, ours.inside, inside, layer))
            b = ours.step(layer)
        if self.work.localize and same:
            local, inside = [b.block.states], [b.block.components]  # F(b) is B(b)
        self._keep(layer, ours, b)
        if not is_new:  # base is the deeper one: the same block again
            block = theirs.block()
        else:
            counterpart = self.pair.matched[layer]
            f = theirs.step_as(counterpart, b) if same else theirs.step(counterpart)
            block = f.block
            entered = f.embedding if theirs.embedding is None else theirs.embedding
            if b.embedding is not None and entered is not None:
                yield StatePair("embedding", prompts, b.embedding, entered)
        yield StatePair(layer, prompts, b.block.states, block.states, local[0] if local else None)
        sites = self.pair.component_sites(layer)
        yield from component_pairs(sites, b.block, block, inside[0] if inside else None)

    def _keep(self, layer: int, ours: Pass, step: Step) -> None:
        """Keep what the noise needs of a block of base."""
        self.sample.take(layer, ours.picker.prompts, step.block.states)
        self.sample.take_block(self.pair.component_sites(layer), step.block)
        if step.embedding is not None:
            self.sample.take("embedding", ours.picker.prompts, step.embedding)

    def _keep_end(self, end: States) -> None:
        self.sample.take("final_norm", end.prompts, end.sites[0])
        self.sample.take("logits", end.head_prompts, end.head_rows)

    def _is_same(self, layer: int) -> bool:
        """Return whether a block is the same in both models, and called on the same tokens."""
        pager, pair = self.pair.finetuned.pager, self.pair
        if pager is None:
            return pair.align == "ids" and pair.same_blocks[layer]
        return pair.align == "ids" and pager.same_as_base(layer)

    def _run_theirs(self, until: int) -> None:
        """Run blocks of a deeper fine-tuned model that have no counterpart."""
        for index in range(self.n_done, until):
            with self.their_blocks.in_memory(index):
                for theirs in self.theirs:
                    step = theirs.step(index)
                    if step.embedding is not None:
                        theirs.embedding = step.embedding
        self.n_done = max(self.n_done, until)


def run_streamed(pair: ModelPair, work: Work, advanced: Callable[[int], None]) -> Iterator[StatePair]:
    """Run every batch through both models, block by block; yields each site's pairs, and those of the noise.

    Each block's weights are read once, whatever the number of batches. `advanced` is told of tokens as they
    pass: a batch's in as many parts as there are layers.

    Raises:
        SaveError: the states between two blocks fit neither memory nor the disk.
        DeviceError: a batch does not fit the device's memory.
    """
    free = free_bytes(pair.base.device)
    with SpillBuffer(free // KEPT_SHARE) as buffer, ThreadPoolExecutor(1) as reader:
        ahead = _block_bytes(pair) < free // 4  # of the two that are read meanwhile, and two that compute
        stream = _Stream(pair, work, buffer, reader if ahead else None)
        check_room(stream.state_bytes, buffer.budget_bytes)
        for layer in range(pair.base_conventions.n_layers):
            yield from stream.layer(layer, advanced)
        yield from stream.ends()


def _block_bytes(pair: ModelPair) -> int:
    """The size of the largest block of each model, together."""
    pagers = [model.pager for model in (pair.base, pair.finetuned) if model.pager is not None]
    return sum(max(pager.block_bytes(i) for i in range(pager.n_blocks)) for pager in pagers)


def _share(n_tokens: int, layer: int, n_layers: int) -> int:
    """A layer's part of a batch's tokens; all parts together are all tokens."""
    return n_tokens * (layer + 1) // n_layers - n_tokens * layer // n_layers


@contextmanager
def _heads_in_memory(pair: ModelPair) -> Iterator[None]:
    pagers = [model.pager for model in (pair.base, pair.finetuned) if model.pager is not None]
    for pager in pagers:
        pager.load_head()
    try:
        yield
    finally:
        for pager in pagers:
            pager.free_head()
