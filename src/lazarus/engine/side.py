"""One of the two models, ready to run batches: out come the compared rows at every site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lazarus.engine.head import MOST_LOGITS, Head
from lazarus.engine.positions import Position, RowPicker
from lazarus.engine.probe import Conventions
from lazarus.engine.recorder import Recorder, StatePair, Take
from lazarus.models import LoadedModel
from lazarus.tokens import TokenBatch


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


def joined(parts: Sequence[States]) -> States:
    """The rows of several batches, one after the other."""
    sites = [torch.cat(rows) for rows in zip(*(part.sites for part in parts), strict=True)]
    others: list[Any] = [
        torch.cat([getattr(part, name) for part in parts])
        for name in ("prompts", "head_prompts", "head_rows")
    ]
    return States(others[0], sites, others[1], others[2])


def logit_pairs(
    base: Head | None, finetuned: Head | None, ours: States, theirs: States
) -> Iterator[StatePair]:
    """Both models' logits at the rows that the heads read, a few rows at a time, over the common tokens."""
    if base is None or finetuned is None:
        return
    n_rows = max(1, MOST_LOGITS // base.n_tokens)
    for start in range(0, len(ours.head_rows), n_rows):
        part = slice(start, start + n_rows)
        b, f = base.logits(ours.head_rows[part]), finetuned.logits(theirs.head_rows[part])
        common = min(b.shape[1], f.shape[1])
        yield StatePair("logits", ours.head_prompts[part], b[:, :common], f[:, :common])
