"""Both models in memory: each batch through one, then the other, and out come the pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from lazarus.engine.head import MOST_LOGITS, Head
from lazarus.engine.local import beside
from lazarus.engine.noise import NoisePlan, nudged
from lazarus.engine.pair import ModelPair
from lazarus.engine.positions import Position, RowPicker
from lazarus.engine.probe import Conventions
from lazarus.engine.recorder import Recorder, StatePair, Take
from lazarus.models import LoadedModel
from lazarus.tokens import BatchPair, Padding, TokenBatch

EXTRA_PADDING = 8


@dataclass(frozen=True)
class States:
    """One model's compared rows of one batch: at every site in order, and those that its head reads."""

    prompts: Tensor
    sites: list[Tensor]
    head_prompts: Tensor
    head_rows: Tensor

    def split(self, n_parts: int) -> list[States]:
        """As many equal parts, in order."""
        sites = zip(*(rows.chunk(n_parts) for rows in self.sites), strict=True)
        others = (t.chunk(n_parts) for t in (self.prompts, self.head_prompts, self.head_rows))
        return [States(p, list(rows), h, r) for rows, p, h, r in zip(sites, *others, strict=True)]


class Side:
    """One of the two models, ready to run batches."""

    def __init__(self, model: LoadedModel, conventions: Conventions) -> None:
        self.model = model
        self.conventions = conventions
        self.recorder = Recorder(model)
        self.head = Head(model, conventions.head_reads) if conventions.head_reads else None

    def run(self, batch: TokenBatch, position: Position) -> States:
        """The compared rows of one batch. The head reads them too, or the last ones where they are means."""
        picker = RowPicker.of(batch, position)
        head_picker = RowPicker.of(batch, "last") if picker.average else picker
        head_rows: list[Tensor] = []

        def final(states: Tensor) -> Tensor:
            head_rows.append(head_picker.pick(states))
            return head_rows[0] if head_picker is picker else picker.pick(states)

        seen = self.recorder.run(*batch.padded(), Take(self.picking(picker), final))
        assert seen.embedding is not None
        assert seen.final is not None
        assert len(seen.blocks) == self.conventions.n_layers, (len(seen.blocks), self.conventions.n_layers)
        sites = [seen.embedding, *seen.blocks, seen.final]
        return States(picker.prompts, sites, head_picker.prompts, head_rows[0])

    def picking(self, picker: RowPicker) -> Callable[[Tensor], Tensor]:
        """Takes the compared rows out of a block's states."""
        return lambda states: picker.pick(self.conventions.rows(states))


def run_pairs(
    pair: ModelPair,
    batches: Sequence[BatchPair],
    position: Position,
    advanced: Callable[[int], None],
    *,
    localize: bool = False,
) -> Iterator[StatePair]:
    """Run every batch through both models; yields each site's pair of states, batch by batch.

    Only the compared rows of one batch are ever kept. `localize` also runs each block of the fine-tuned
    model on what base's block receives. `advanced` is told the tokens of each batch when it is done.

    Raises:
        DeviceError: a batch does not fit the device's memory.
    """
    base, finetuned = Side(pair.base, pair.base_conventions), Side(pair.finetuned, pair.finetuned_conventions)
    for batch in batches:
        local: list[Tensor] = []
        picking = base.picking(RowPicker.of(batch.base, position))
        with beside(pair.base, pair.finetuned, picking, local) if localize else nullcontext():
            ours = base.run(batch.base, position)
        theirs = finetuned.run(batch.finetuned, position)
        matched = [theirs.sites[0], *(theirs.sites[1 + i] for i in pair.matched), theirs.sites[-1]]
        own: Sequence[Tensor | None] = local or [None] * len(pair.matched)
        # zip stops at the last common site: a final norm that only one of them has is no site.
        for site, b, f, changed in zip(pair.sites, ours.sites, matched, [None, *own, None], strict=False):
            yield StatePair(site, ours.prompts, b, f, changed)
        if pair.shares_vocabulary:
            yield from _logits(base.head, finetuned.head, ours, theirs)
        advanced(batch.base.n_tokens)


def run_noise(
    pair: ModelPair,
    batches: Sequence[TokenBatch],
    position: Position,
    padding: Padding,
    plan: NoisePlan,
    advanced: Callable[[int], None],
) -> Iterator[tuple[int, StatePair]]:
    """Base against base with what ought not to matter changed; yields each trial's number and pairs.

    Each trial runs the same prompts in other batches, with other padding where padding is right for the
    model, and with the first block's input moved by one unit in the last place. Few prompts are run
    several times in a batch, a trial each time. Both states of a pair are base's: no second copy of the
    weights is needed.
    """
    base = Side(pair.base, pair.base_conventions)
    generator = torch.Generator().manual_seed(plan.seed)
    for batch in batches:
        plain = base.run(batch, position)
        n_copies = 1 if padding == "one_by_one" else plan.copies(batch)
        trials = count()
        extra_padding = _extra_padding(batch, padding, pair.base.anatomy.context)
        for parts in _recomposed(batch, extra_padding, n_copies):
            moved = []
            for part in parts:
                with nudged(pair.base.anatomy.blocks[0], generator):
                    moved.append(base.run(part, position))
            for other in _joined(moved).split(n_copies):
                trial = next(trials)
                for site, b, f in zip(pair.sites, plain.sites, other.sites, strict=False):
                    yield trial, StatePair(site, plain.prompts, b, f)
                for states in _logits(base.head, base.head, plain, other):
                    yield trial, states
        advanced(batch.n_tokens)


def _extra_padding(batch: TokenBatch, padding: Padding, context: int | None) -> int:
    """How much more padding a batch can have: there may be no positions for it, or it may not be right."""
    if padding != "right":
        return 0
    return EXTRA_PADDING if context is None else max(0, min(EXTRA_PADDING, context - batch.padded_length))


def _recomposed(batch: TokenBatch, extra_padding: int, n_copies: int) -> list[list[TokenBatch]]:
    """The same prompts in the same order: in two halves, or several times, and with more padding."""
    padded = replace(batch, members=batch.members * n_copies, extra_padding=extra_padding)
    if n_copies > 1:
        return [[replace(padded, extra_padding=0)], [padded]]
    middle = len(batch.members) // 2
    halves = [replace(batch, members=part) for part in (batch.members[:middle], batch.members[middle:])]
    return [halves if middle else [padded], [padded]]


def _joined(parts: Sequence[States]) -> States:
    """The rows of several batches, one after the other."""
    sites = [torch.cat(rows) for rows in zip(*(part.sites for part in parts), strict=True)]
    others: list[Any] = [
        torch.cat([getattr(part, name) for part in parts])
        for name in ("prompts", "head_prompts", "head_rows")
    ]
    return States(others[0], sites, others[1], others[2])


def _logits(base: Head | None, finetuned: Head | None, ours: States, theirs: States) -> Iterator[StatePair]:
    """Both models' logits at the rows that the heads read, a few rows at a time, over the common tokens."""
    if base is None or finetuned is None:
        return
    n_rows = max(1, MOST_LOGITS // base.n_tokens)
    for start in range(0, len(ours.head_rows), n_rows):
        part = slice(start, start + n_rows)
        b, f = base.logits(ours.head_rows[part]), finetuned.logits(theirs.head_rows[part])
        common = min(b.shape[1], f.shape[1])
        yield StatePair("logits", ours.head_prompts[part], b[:, :common], f[:, :common])
