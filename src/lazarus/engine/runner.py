"""One of the two models, ready to run batches: out come the compared rows at every site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lazarus.batches import TokenBatch
from lazarus.engine.head import Head
from lazarus.engine.positions import RowPicker
from lazarus.engine.prefix_cache import PrefixCache, holds_keys_and_values
from lazarus.engine.probe import Conventions
from lazarus.engine.recorder import Recorder, RowSelection
from lazarus.engine.replay import Passed, UnlikeError, replaying
from lazarus.engine.score_heads import BatchScores, ScoreHead
from lazarus.engine.taps import BlockRows, ComponentPicker, ComponentRows, joined_rows, split_rows
from lazarus.errors import UnsupportedModelError
from lazarus.metrics import MOST_LOGITS
from lazarus.models import LoadedModel, same_bits
from lazarus.sites import Position, StatePair


@dataclass(frozen=True)
class States:
    """One model's compared rows of one batch: at every site in order, and those that its head reads.

    Of a model whose scores are compared the last are the scores themselves.
    """

    prompts: Tensor
    sites: list[Tensor]
    head_prompts: Tensor
    head_rows: Tensor
    components: Sequence[ComponentRows] = ()
    """the rows inside each block, in order, where they are compared"""
    token_prompts: Tensor | None = None
    """of each compared token, its prompt: of the experts that are picked there is no mean"""

    def block(self, layer: int) -> BlockRows:
        """Return the rows of one block."""
        inside = self.components[layer] if self.components else {}
        return BlockRows(self.sites[1 + layer], inside, self.prompts, self.token_prompts)

    def split(self, n_parts: int) -> list[States]:
        """Return as many equal parts, in order."""
        sites = zip(*(rows.chunk(n_parts) for rows in self.sites), strict=True)
        others = (t.chunk(n_parts) for t in (self.prompts, self.head_prompts, self.head_rows))
        inside = [split_rows(each, n_parts) for each in self.components]
        tokens = [None] * n_parts if self.token_prompts is None else self.token_prompts.chunk(n_parts)
        return [
            States(p, list(rows), h, r, [parts[i] for parts in inside], tokens[i])
            for i, (rows, p, h, r) in enumerate(zip(sites, *others, strict=True))
        ]


@dataclass(frozen=True)
class Prefix:
    """A prefix as a model has read it: the KV cache, and the compared rows at every site."""

    prefix_cache: PrefixCache
    sites: Sequence[Tensor]


@dataclass(frozen=True)
class Begun:
    """A batch after the first `n_blocks` blocks, and the compared rows on the way."""

    n_blocks: int
    passed: Passed
    states: States
    prefix: Prefix | None = None
    """what that model made of the prefix before the batch, where one ran by itself"""

    @property
    def sites(self) -> list[Tensor]:
        """The rows at the embedding and after each of these blocks."""
        return self.states.sites[: 1 + self.n_blocks]


class Runner:
    """One of the two models, ready to run batches. A prefix that stands before several of them runs once."""

    def __init__(
        self, model: LoadedModel, conventions: Conventions, score_head: ScoreHead | None = None
    ) -> None:
        """Take a model, how it behaves, and what makes its scores where these are compared."""
        self.model = model
        self.conventions = conventions
        self.recorder = Recorder(model)
        self.head = Head(model, conventions.head_reads) if conventions.head_reads else None
        self.score_head = score_head
        self._prefixes: dict[tuple[tuple[int, ...], Position], Prefix] = {}
        self._compared: tuple[Prefix, Prefix, bool] | None = None
        """the last prefixes of both models that were compared, and whether their rows are the same"""

    def begin(self, batch: TokenBatch, position: Position) -> None:
        """Run the prefix of a batch, unless it has run or there is none.

        Raises:
            UnsupportedModelError: the model keeps no cache that a batch can go on from.
        """
        # By position as well: it decides which of the prefix's rows are kept.
        key = (batch.prefix, position)
        if not batch.prefix or key in self._prefixes:
            return
        ids = torch.tensor([batch.prefix])
        picker = RowPicker.of(batch, position).of_prefix(len(batch.prefix))
        take = RowSelection(self.picking(picker), picker.pick)
        seen = self.recorder.run(ids, torch.ones_like(ids), take, prefix_cache=PrefixCache())
        if not holds_keys_and_values(seen.cache):
            raise UnsupportedModelError(
                f"{self.model.name} keeps more than keys and values of what it has read, or nothing, so a "
                "prefix that prompts have in common has to run with each of them."
            )
        self._prefixes[key] = Prefix(PrefixCache(len(batch.prefix), seen.cache), seen.sites)

    def run(self, batch: TokenBatch, position: Position, begun: Begun | None = None) -> States:
        """Return the compared rows of a batch. The head reads them too, or the last ones if they are means.

        `begun` is what the other model's first blocks made of the batch, where this model has the same ones:
        they do not run again. They do run where something else enters them here, or where the prefix left
        another KV cache or other rows.
        """
        self.begin(batch, position)
        if begun is not None and self._has_rows_of(begun, self.prefix_of(batch, position)):
            try:
                with replaying(self.model.anatomy.blocks[: begun.n_blocks], begun.passed, verify=True):
                    return self._run(batch, position, begun)
            except UnlikeError:
                pass
        return self._run(batch, position)

    def prefix_of(self, batch: TokenBatch, position: Position) -> Prefix | None:
        """Return what this model made of the prefix before a batch; None where none ran by itself."""
        return self._prefixes.get((batch.prefix, position))

    def _has_rows_of(self, begun: Begun, prefix: Prefix | None) -> bool:
        """Compare both prefixes' compared rows at the sites that the other model's blocks reach.

        Replaying compares the KV caches, but the same keys and values may come of other states: a norm takes
        the length of a state away.
        """
        if prefix is None or begun.prefix is None:
            return prefix is begun.prefix
        before = self._compared
        # Once for all batches: on a device the host waits for each comparison.
        if before is None or before[0] is not prefix or before[1] is not begun.prefix:
            n_sites = len(begun.sites)
            pairs = zip(prefix.sites[:n_sites], begun.prefix.sites[:n_sites], strict=True)
            is_same = all(same_bits(ours, theirs) is True for ours, theirs in pairs)
            self._compared = before = prefix, begun.prefix, is_same
        return before[2]

    def _run(self, batch: TokenBatch, position: Position, begun: Begun | None = None) -> States:
        """A pass, after the first blocks of `begun`."""
        known: Sequence[Tensor] = begun.sites if begun else []
        picker = RowPicker.of(batch, position)
        # A mean of states is no token's state: the head reads the last token's instead.
        head_picker = RowPicker.of(batch, "last") if picker.average else picker
        head_rows: list[Tensor] = []

        def final(states: Tensor) -> Tensor:
            head_rows.append(head_picker.pick(states))
            return head_rows[0] if head_picker is picker else picker.pick(states)

        # `known` begins with the embedding, which is no block.
        first = max(0, len(known) - 1)
        prefix = self.prefix_of(batch, position)
        prefix_cache = prefix.prefix_cache if prefix else None
        scores = BatchScores(self.score_head, batch, position) if self.score_head else None
        take = RowSelection(self.picking(picker), final, scores.take if scores else None)
        inside, blocks = self.inside(batch, position), self.model.anatomy.blocks
        attached: AbstractContextManager[list[ComponentRows]] = (
            inside.attached(blocks, range(first, len(blocks))) if inside else nullcontext([])
        )
        with attached as components:
            seen = self.recorder.run(*batch.padded(), take, first, prefix_cache)
        embedding = [] if known else [seen.embedding]
        taken = [rows for rows in (*embedding, *seen.blocks, seen.final) if rows is not None]
        if prefix:
            before = prefix.sites[len(known) :]
            taken = [picker.whole(*rows) for rows in zip(taken, before, strict=True)]
        sites = [*known, *taken]
        # Beside the blocks there are the embedding and the end.
        assert len(sites) == self.conventions.n_layers + 2, (len(sites), self.conventions.n_layers)
        read = head_picker.prompts, sites[-1] if head_picker is picker else head_rows[0]
        if scores is not None:
            read = scores.prompts, scores.rows
        replayed = begun.states.components[: begun.n_blocks] if begun else ()
        tokens = inside.tokens.prompts if inside else None
        return States(picker.prompts, sites, *read, [*replayed, *components], tokens)

    def inside(self, batch: TokenBatch, position: Position) -> ComponentPicker | None:
        """Return what takes the compared rows inside the blocks, where these are compared."""
        components = self.conventions.components
        return None if components is None else ComponentPicker.of(self.conventions, batch, position)

    def picking(self, picker: RowPicker) -> Callable[[Tensor], Tensor]:
        """Return what takes the compared rows out of a block's states."""
        return lambda states: picker.pick(self.conventions.rows(states))


def joined(parts: Sequence[States]) -> States:
    """The rows of several batches, one after the other."""
    sites = [torch.cat(rows) for rows in zip(*(part.sites for part in parts), strict=True)]
    others: list[Any] = [
        torch.cat([getattr(part, name) for part in parts])
        for name in ("prompts", "head_prompts", "head_rows")
    ]
    components = [joined_rows(layer) for layer in zip(*(part.components for part in parts), strict=True)]
    tokens = [part.token_prompts for part in parts if part.token_prompts is not None]
    return States(others[0], sites, others[1], others[2], components, torch.cat(tokens) if tokens else None)


def output_pairs(
    base: Runner, finetuned: Runner, ours: States, theirs: States, trial: int | None = None
) -> Iterator[StatePair]:
    """Both models' scores where these are compared, and else their logits."""
    if base.score_head is None:
        yield from logit_pairs(base.head, finetuned.head, ours, theirs, trial)
    else:
        yield StatePair("logits", ours.head_prompts, ours.head_rows, theirs.head_rows, trial=trial)


def logit_pairs(
    base: Head | None, finetuned: Head | None, ours: States, theirs: States, trial: int | None = None
) -> Iterator[StatePair]:
    """Both models' logits at the rows that the heads read, a few rows at a time, each over its own tokens."""
    if base is None or finetuned is None:
        return
    n_rows = max(1, MOST_LOGITS // base.n_tokens)
    for start in range(0, len(ours.head_rows), n_rows):
        part = slice(start, start + n_rows)
        b, f = base.logits(ours.head_rows[part]), finetuned.logits(theirs.head_rows[part])
        yield StatePair("logits", ours.head_prompts[part], b, f, trial=trial)
