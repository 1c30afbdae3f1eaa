"""The passes of a streamed run: one batch through one model, block by block, and a model's blocks on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from lazarus.batches import TokenBatch
from lazarus.engine.arguments import Arguments
from lazarus.engine.noise import NoisePlan, Sample, n_copies, nudged
from lazarus.engine.positions import RowPicker
from lazarus.engine.recorder import RowSelection
from lazarus.engine.replay import Call, Passed, recording, replaying, stopping_after, stopping_before
from lazarus.engine.runner import Runner, States, joined, output_pairs
from lazarus.engine.score_heads import BatchScores
from lazarus.engine.spill import SpillBuffer
from lazarus.engine.taps import BlockRows, ComponentRows, component_pairs, split_blocks
from lazarus.facts import ComponentSite
from lazarus.models import Equality, LoadedModel, give_back
from lazarus.sites import Position, StatePair

NOTHING: AbstractContextManager[Any] = nullcontext()


@dataclass(frozen=True)
class Step:
    """One block on one batch: its call, and the compared rows of it; those before it for the first."""

    call: Call
    embedding: Tensor | None
    block: BlockRows


class Pass:
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
        itemsize = self.runner.model.model.dtype.itemsize
        return int(self.batch.n_padded * self.runner.conventions.width * itemsize)

    def step(self, index: int, around: AbstractContextManager[Any] = NOTHING) -> Step:
        """Run block `index`, with something around it."""
        self.is_alike = False
        passed, calls = self._passed(), list[Call]()
        # The hook of `around` stands first: it moves the first block's input before that is recorded.
        tapped = self.inside.attached(self.blocks, range(index, index + 1)) if self.inside else NOTHING
        with around, tapped as components, recording([self.blocks[index]], calls.append):
            self._run(index, passed)
        self.components = components[0] if components else {}
        return self._taken(calls[0], passed)

    def step_as(self, index: int, twin: Step) -> Step:
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
            NOTHING if ends else stopping_after(self.blocks[index]),
        ):
            # The recorder hooks no block: `recording` has the one that runs.
            take = RowSelection(torch.Tensor.detach, final, self.scores.take if self.scores else None)
            self.runner.recorder.run(*self.batch.padded(), take, first=len(self.blocks))

    def _taken(self, call: Call, passed: Passed) -> Step:
        pick, first = self.runner.picking(self.picker), not passed.returned
        passed.add(call)
        self.buffer.put(self, passed.parts())
        assert passed.states is not None
        return Step(call, pick(call.args[0]) if first else None, self._block(passed.states))


class NoisePass:
    """Base against itself on one batch: as the run has it, and moved in several trials."""

    def __init__(self, runner: Runner, batch: TokenBatch, plan: NoisePlan, buffer: SpillBuffer) -> None:
        self.runner = runner
        self.batch = batch
        self.prompts = RowPicker.of(batch, plan.position).prompts
        self.moved = [
            [Pass(runner, part, plan.position, buffer) for part in parts]
            for parts in plan.recomposed(batch, runner.model.anatomy.context)
        ]

    @property
    def passes(self) -> list[Pass]:
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
            steps = [p.step(index, NOTHING if index else nudged(block, generator)) for p in parts]
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

    def _n_copies(self, parts: Sequence[Pass]) -> int:
        return n_copies([part.batch for part in parts], self.batch)


class PagedBlocks:
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
