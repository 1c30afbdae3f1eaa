"""The plan of a run: the prompts, how they are batched, and of which every token is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, takewhile
from typing import Literal

from lazarus.activation.repeats import Repeats
from lazarus.batches import BatchPair, TokenBatch, make_batches
from lazarus.engine import ModelPair, pick_sample
from lazarus.messages import option
from lazarus.notes import Notes
from lazarus.sites import Position
from lazarus.tokens import TokenizedPrompt

MOST_TRACED_TOKENS = 16_384
"""Tokens of which every one is kept until the end, where the run chooses among their prompts."""


@dataclass(frozen=True)
class RunPlan:
    """The prompts that run through both models, and how."""

    base_prompts: Sequence[TokenizedPrompt]
    finetuned_prompts: Sequence[TokenizedPrompt]
    pad_ids: tuple[int, int]
    batch_tokens: int
    position: Position
    localize: bool
    noise_floor: bool
    seed: int
    n_prefix: int = 0
    """how many first tokens, the same in all prompts, run once"""
    token_prompts: Literal["auto"] | Sequence[int] = ()
    """the prompts of which every token is kept; auto leaves the choice to what they turn out to be"""
    each_runs: bool = False
    """whether repeats of a prompt run as well"""

    @property
    def longest(self) -> int:
        """The tokens of the longest prompt."""
        return max(len(p.ids) for p in (*self.base_prompts, *self.finetuned_prompts))

    @cached_property
    def repeats(self) -> Repeats:
        """The prompts whose ids are those of an earlier prompt, for both models."""
        if self.each_runs:
            return Repeats.none(len(self.base_prompts))
        return Repeats.among(self.base_prompts, self.finetuned_prompts)

    def batches(self, pair: ModelPair) -> list[BatchPair]:
        """Return the batches of the prompts that differ, for both models."""
        padding = pair.padding(self.longest)
        distinct = [self.base_prompts[i] for i in self.repeats.distinct]
        batches = make_batches(distinct, self.batch_tokens, padding, self.pad_ids[0], self.n_prefix)
        if pair.align == "ids":
            return BatchPair.same(batches)
        # All prompts of the other reading, because the batches name theirs by index.
        return BatchPair.of(batches, self.finetuned_prompts, self.pad_ids[1])

    def noise_batches(self, pair: ModelPair) -> list[TokenBatch]:
        """Return the batches of a sample of them, on which the noise is measured."""
        if not self.noise_floor:
            return []
        distinct = [self.base_prompts[i] for i in self.repeats.distinct]
        sample = [distinct[i] for i in pick_sample(len(distinct), self.seed)]
        padding = pair.padding(self.longest)
        return make_batches(sample, self.batch_tokens, padding, self.pad_ids[0], self.n_prefix)

    @property
    def traced(self) -> Sequence[int]:
        """The prompts of which every token is kept: those named, or the first ones that there is room for."""
        if self.token_prompts != "auto":
            return self.token_prompts
        ends = accumulate(len(self.base_prompts[i].ids) for i in self.repeats.distinct)
        n_prompts = len(list(takewhile(lambda n_tokens: n_tokens <= MOST_TRACED_TOKENS, ends)))
        return self.repeats.distinct[:n_prompts]

    def note(self, notes: Notes) -> None:
        """Note what ran once for several prompts, and of which prompts no token is kept."""
        n_distinct, n_traced = len(self.repeats.distinct), len(self.traced)
        self.repeats.note(notes)
        if self.token_prompts != "auto" or n_traced == n_distinct:
            return
        told = (
            f"tokens are kept of the most divergent of the first {n_traced} of {n_distinct} prompts, for "
            "which there is room"
            if n_traced
            else f"no prompt's tokens are kept: the first prompt alone has more than {MOST_TRACED_TOKENS:,}"
        )
        notes.add("kept-tokens", f"{told}; {option('token_prompts')} names others")
