"""Prompts that are the same for both models: each runs once, and counts as often as it was given."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lazarus.metrics import OncePerBatch, on_device
from lazarus.notes import Notes
from lazarus.sites import StatePair
from lazarus.tokens import TokenizedPrompt

MOST_ROWS = 2048
"""The most rows of repeated prompts that are taken in at once; one prompt is never parted."""

Portion = tuple[Int[Tensor, " copies"], Int[Tensor, " copies"]]
"""rows that count again, and the prompts that they count for"""


@dataclass(frozen=True)
class Repeats:
    """Prompts that say the same as an earlier one to both models: they do not run, and count the same."""

    distinct: Sequence[int]
    others: Mapping[int, Sequence[int]]
    """of each prompt that is repeated, the later ones that repeat it"""

    @classmethod
    def none(cls, n_prompts: int) -> Repeats:
        """Return that no prompt is a repeat."""
        return cls(range(n_prompts), {})

    @classmethod
    def among(cls, base: Sequence[TokenizedPrompt], finetuned: Sequence[TokenizedPrompt]) -> Repeats:
        """Compare the prompts' ids, as each model reads them, and which of these are of responses."""
        first: dict[Any, int] = {}
        others: dict[int, list[int]] = {}
        for index, (ours, theirs) in enumerate(zip(base, finetuned, strict=True)):
            # One reading for both models is looked up once.
            readings = (ours,) if ours is theirs else (ours, theirs)
            # As bytes: a tuple of Python integers takes several times their memory.
            same = first.setdefault(tuple((array("q", p.ids).tobytes(), p.response) for p in readings), index)
            if same != index:
                others.setdefault(same, []).append(index)
        return cls(list(first.values()), others)

    def note(self, notes: Notes) -> None:
        """Note the prompts that are repeats, if there are any."""
        repeats = [prompt for others in self.others.values() for prompt in others]
        if repeats:
            n_prompts = len(self.distinct) + len(repeats)
            told = f"{len(repeats)} of {n_prompts} prompts are repeats of others: each text ran once"
            notes.add("repeated-prompts", told, prompts=sorted(repeats))

    def spread(self, found: StatePair) -> Iterator[StatePair]:
        """Yield the pair, and its rows again for the prompts that repeat its own, a portion at a time."""
        yield found
        for rows, prompts in self.copies(found.prompts):
            base, finetuned, local, change = (
                None if states is None else states[on_device(rows, states.device)]
                for states in (found.base, found.finetuned, found.local, found.change)
            )
            assert base is not None
            assert finetuned is not None
            yield replace(found, prompts=prompts, base=base, finetuned=finetuned, local=local, change=change)

    def copies(self, prompts: Int[Tensor, " rows"]) -> Sequence[Portion]:
        """Return the rows that count again, and the prompts they count for; a prompt's rows stay together."""
        return self._copies(prompts) if self.others else ()

    @cached_property
    def _copies(self) -> OncePerBatch[Sequence[Portion]]:
        return OncePerBatch(lambda prompts: list(self._portions(prompts)))

    def _portions(self, prompts: Int[Tensor, " rows"]) -> Iterator[Portion]:
        places: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts.tolist()):
            if prompt in self.others:
                places.setdefault(prompt, []).append(row)
        rows, owners = list[int](), list[int]()
        for prompt, own in places.items():
            for other in self.others[prompt]:
                # A prompt's rows are never parted: accumulators expect whole prompts.
                if rows and len(rows) + len(own) > MOST_ROWS:
                    yield torch.tensor(rows), torch.tensor(owners)
                    rows, owners = [], []
                rows += own
                owners += [other] * len(own)
        if rows:
            yield torch.tensor(rows), torch.tensor(owners)
