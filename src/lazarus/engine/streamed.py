"""One block of each model in memory at a time: each block runs all batches before the next one is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from lazarus.batches import TokenBatch
from lazarus.engine.arguments import Arguments
from lazarus.engine.local import beside, components_beside
from lazarus.engine.noise import NoisePlan, Sample, n_copies, nudged
from lazarus.engine.pair import ModelPair
from lazarus.engine.positions import RowPicker
from lazarus.engine.recorder import RowSelection
from lazarus.engine.replay import (
    Call,
    Passed,
    recording,
    replaying,
    stopping_after,
    stopping_before,
)
from lazarus.engine.runner import Runner, States, joined, output_pairs
from lazarus.engine.score_heads import BatchScores
from lazarus.engine.spill import SpillBuffer, check_room
from lazarus.engine.taps import BlockRows, ComponentRows, component_pairs, split_blocks
from lazarus.engine.work import Work
from lazarus.facts import ComponentSite
from lazarus.models import Equality, LoadedModel, free_bytes, give_back
from lazarus.sites import Position, StatePair

_NOTHING: AbstractContextManager[Any] = nullcontext()

KEPT_SHARE = 16
"""States between two blocks may take one part in so many of the free memory."""


@dataclass(frozen=True)
class _Step:
    """One block on one batch: its call, and the compared rows of it; those before it for the first."""

    call: Call
    embedding: Tensor | None
    block: BlockRows


class _Pass:
    """One batch on its way through one model, block by block; between blocks its states are in a buffer."""

    def __init__(self, runner: Runner, batch: TokenBatch, position: Position, buffer: SpillBuffer) -> None:
        self.runner = runner
        self.batch = batch
        self.buffer = buffer
        self.blocks = runner.model.anatomy.blocks
        self.picker = RowPicker.of(batch, position)
        self.inside = runner.inside(batch, position)
        self.components: ComponentRows = {}
        """the rows inside the last block that ran, where they are compared"""
        self.head_picker = RowPicker.of(batch, "last") if self.picker.average else self.picker
        self.scores = BatchScores(runner.score_head, batch, position) if runner.score_head else None
        self.is_alike = True
        """whether no block had to run: base's had made the very same"""
        self.embedding: Tensor | None = None
        """the compared rows before the first block, of a pass that is ahead of the other model's"""

    @property
    def state_bytes(self) -> int:
        """The size of one hidden state a token, padding included."""
        n_tokens = len(self.batch.members) * self.batch.padded_length
        return int(n_tokens * self.runner.conventions.width * self.runner.model.model.dtype.itemsize)

    def step(self, index: int, around: AbstractContextManager[Any] = _NOTHING) -> _Step:
        """Run block `index`, with something around it."""
        self.is_alike = False
        passed, calls = self._passed(), list[Call]()
        # The hook of `around` stands first: it moves the first block's input before that is recorded.
        tapped = self.inside.attached(self.blocks, range(index, index + 1)) if self.inside else _NOTHING
        with around, tapped as components, recording([self.blocks[index]], calls.append):
            self._run(index, passed)
        self.components = components[0] if components else {}
        return self._taken(calls[0], passed)

    def step_as(self, index: int, twin: _Step) -> _Step:
        """Run a block that base has as well, or take base's call of it where all has been the same so far."""
        # The last block runs in any case: its pass goes on to the final norm.
        if self.is_alike and not self._ends_with(index):
            passed, received = self._passed(), list[Arguments]()
            with stopping_before(self.blocks[index], received):
                self._run(index, passed)
            if received[0].same_as(twin.call.received, Equality()):
                self.components = twin.block.components
                return self._taken(twin.call, passed)
        return self.step(index)

    def block(self) -> BlockRows:
        """The compared rows after the last block that ran, and inside it."""
        states = self._passed().states
        assert states is not None
        return self._block(states)

    def _block(self, states: Tensor) -> BlockRows:
        tokens = None if self.inside is None else self.inside.tokens.prompts
        rows = self.runner.picking(self.picker)(states)
        return BlockRows(rows, self.components, self.picker.prompts, tokens)

    def end(self) -> States:
        """The compared rows after the final norm, and those that the head reads, or the scores."""
        final, head = self.buffer.take((self, "end"))
        if self.scores is not None:
            return States(self.picker.prompts, [final], self.scores.prompts, self.scores.rows)
        return States(self.picker.prompts, [final], self.head_picker.prompts, head)

    def _ends_with(self, index: int) -> bool:
        return index == len(self.blocks) - 1

    def _passed(self) -> Passed:
        return Passed.of_parts(self.buffer.take(self)) if self in self.buffer else Passed()

    def _run(self, index: int, passed: Passed) -> None:
        """A pass from block `index` on, to its end or to that of the block."""

        def final(states: Tensor) -> Tensor:
            head = self.head_picker.pick(states)
            rows = head if self.head_picker is self.picker else self.picker.pick(states)
            self.buffer.put((self, "end"), (rows, head))
            return rows

        ends = self._ends_with(index)
        with (
            replaying(self.blocks[:index], passed, verify=False),
            _NOTHING if ends else stopping_after(self.blocks[index]),
        ):
            # The recorder hooks no block: `recording` has the one that runs.
            take = RowSelection(torch.Tensor.detach, final, self.scores.take if self.scores else None)
            self.runner.recorder.run(*self.batch.padded(), take, first=len(self.blocks))

    def _taken(self, call: Call, passed: Passed) -> _Step:
        pick, first = self.runner.picking(self.picker), not passed.returned
        passed.add(call)
        self.buffer.put(self, passed.parts())
        assert passed.states is not None
        return _Step(call, pick(call.args[0]) if first else None, self._block(passed.states))


class _NoisePass:
    """Base against itself on one batch: as the run has it, and moved in several trials."""

    def __init__(self, runner: Runner, batch: TokenBatch, plan: NoisePlan, buffer: SpillBuffer) -> None:
        self.runner = runner
        self.batch = batch
        self.prompts = RowPicker.of(batch, plan.position).prompts
        self.moved = [
            [_Pass(runner, part, plan.position, buffer) for part in parts]
            for parts in plan.recomposed(batch, runner.model.anatomy.context)
        ]

    @property
    def passes(self) -> list[_Pass]:
        """Return every pass of every trial."""
        return [part for parts in self.moved for part in parts]

    def step(
        self, index: int, sites: Sequence[ComponentSite], generator: torch.Generator, sample: Sample
    ) -> Iterator[StatePair]:
        """Run block `index` in every trial; `sites` are those inside it."""
        block, trials = self.runner.model.anatomy.blocks[0], count()
        entered, plain = (
            None if index else sample.give("embedding", self.batch),
            sample.give(index, self.batch),
        )
        inside = sample.give_block(sites, self.batch)
        for parts in self.moved:
            steps = [p.step(index, _NOTHING if index else nudged(block, generator)) for p in parts]
            n = self._n_copies(parts)
            blocks = split_blocks([step.block for step in steps], n)
            before = [step.embedding for step in steps if step.embedding is not None]
            embeddings = torch.cat(before).chunk(n) if before else [None] * n
            for other, embedding in zip(blocks, embeddings, strict=True):
                trial = next(trials)
                if embedding is not None and entered is not None:
                    yield StatePair("embedding", self.prompts, entered, embedding, trial=trial)
                yield StatePair(index, self.prompts, plain, other.states, trial=trial)
                own = replace(other, states=plain, components=inside)
                yield from component_pairs(sites, own, other, trial=trial)

    def ends(self, has_final_norm: bool, sample: Sample) -> Iterator[StatePair]:
        """The pairs after the final norm and at the logits."""
        plain = [sample.give("final_norm", self.batch)] if has_final_norm else []
        read, trials = sample.give("logits", self.batch), count()
        for parts in self.moved:
            for other in joined([part.end() for part in parts]).split(self._n_copies(parts)):
                trial = next(trials)
                for final in plain:
                    yield StatePair("final_norm", other.prompts, final, other.sites[0], trial=trial)
                ours = States(other.prompts, plain, other.head_prompts, read)
                yield from output_pairs(self.runner, self.runner, ours, other, trial)

    def _n_copies(self, parts: Sequence[_Pass]) -> int:
        return n_copies([part.batch for part in parts], self.batch)


class _Blocks:
    """The blocks of one model, each in memory while it is needed; the next one is read in the meantime."""

    def __init__(self, model: LoadedModel, reader: Executor | None) -> None:
        self.pager = model.pager
        self.n_blocks = len(model.anatomy.blocks)
        self.reader = reader
        self._next: Future[Any] | None = None

    @contextmanager
    def in_memory(self, index: int) -> Iterator[None]:
        """Hold one block in memory."""
        if self.pager is None:
            yield
            return
        # Blocks are asked for in order, so the one that was read ahead is this one.
        self.pager.put(index, self._next.result() if self._next else self.pager.read(index))
        self._next = None
        if self.reader is not None and index + 1 < self.n_blocks:
            # Read while this one computes: one block ahead of each model, by one thread.
            self._next = self.reader.submit(self.pager.read, index + 1)
        try:
            yield
        finally:
            self.pager.free(index)
            give_back()


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
        self.ours = [_Pass(base, b.base, work.position, buffer) for b in work.batches]
        self.theirs = [_Pass(finetuned, b.finetuned, work.position, buffer) for b in work.batches]
        self.again = [_Pass(base, batch, work.position, buffer) for batch in work.again]
        self.noise = [_NoisePass(base, batch, work.noise, buffer) for batch in work.sample]
        self.sample = Sample(work.sample)
        self.our_blocks, self.their_blocks = _Blocks(pair.base, reader), _Blocks(pair.finetuned, reader)
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
        self._run_theirs(counterpart)
        is_new = self.n_done == counterpart
        theirs = self.their_blocks.in_memory(counterpart) if is_new else _NOTHING
        with self.our_blocks.in_memory(layer), theirs:
            for ours, other in zip(self.ours, self.theirs, strict=True):
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
            for ours, theirs in zip(self.ours, self.theirs, strict=True):
                b, f = ours.end(), theirs.end()
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

    def _pair(self, layer: int, ours: _Pass, theirs: _Pass, is_new: bool) -> Iterator[StatePair]:
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

    def _keep(self, layer: int, ours: _Pass, step: _Step) -> None:
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
