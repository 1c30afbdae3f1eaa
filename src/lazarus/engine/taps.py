"""The compared rows inside blocks, taken while a model runs: what each sublayer adds, and the router."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lazarus.batches import TokenBatch
from lazarus.engine.forms import Form, Spot, at_places
from lazarus.engine.positions import RowPicker
from lazarus.engine.probe import Conventions
from lazarus.facts import ComponentName, ComponentSite
from lazarus.metrics import to_float64
from lazarus.sites import Position, StatePair

ComponentRows = Mapping[ComponentName, Tensor]
"""the compared rows of each component of a block"""


def joined_rows(parts: Sequence[ComponentRows]) -> ComponentRows:
    """The rows of several batches, one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def split_rows(rows: ComponentRows, n_parts: int) -> list[ComponentRows]:
    """Return as many equal parts, in order."""
    parts = {name: each.chunk(n_parts) for name, each in rows.items()}
    return [{name: each[i] for name, each in parts.items()} for i in range(n_parts)]


@dataclass(frozen=True)
class BlockRows:
    """The compared rows of one block on one batch: of its output, and of its components."""

    states: Float[Tensor, "rows width"]
    components: ComponentRows
    prompts: Int[Tensor, " rows"]
    token_prompts: Int[Tensor, " tokens"] | None
    """of each compared token, its prompt"""

    def prompts_of(self, name: ComponentName) -> Int[Tensor, " rows"]:
        """Return whose each row of a component is."""
        if name != "experts":
            return self.prompts
        assert self.token_prompts is not None
        return self.token_prompts

    def change(self, other: BlockRows) -> Float[Tensor, " rows"] | None:
        """Return ‖f − b‖² of the block's output at each token; None where the rows are means over tokens."""
        if self.token_prompts is None or len(self.states) != len(self.token_prompts):
            return None
        return (to_float64(other.states) - to_float64(self.states)).square().sum(-1)


def split_blocks(parts: Sequence[BlockRows], n_parts: int) -> list[BlockRows]:
    """Return the rows of several batches of one block, one after the other, in as many equal parts."""
    states = torch.cat([part.states for part in parts]).chunk(n_parts)
    prompts = torch.cat([part.prompts for part in parts]).chunk(n_parts)
    tokens = [part.token_prompts for part in parts if part.token_prompts is not None]
    of_tokens = torch.cat(tokens).chunk(n_parts) if tokens else [None] * n_parts
    inside = split_rows(joined_rows([part.components for part in parts]), n_parts)
    return [BlockRows(*rows) for rows in zip(states, inside, prompts, of_tokens, strict=True)]


@dataclass(frozen=True)
class ComponentPicker:
    """Takes the compared rows out of what is at the places of a block."""

    conventions: Conventions
    picker: RowPicker
    tokens: RowPicker
    """takes every compared token by itself: of experts that are picked there is no mean"""

    @classmethod
    def of(cls, conventions: Conventions, batch: TokenBatch, position: Position) -> ComponentPicker:
        """Return what takes a batch's compared rows."""
        # `mean` and `all` compare the same tokens.
        by_token = RowPicker.of(batch, "all" if position == "mean" else position)
        return cls(conventions, RowPicker.of(batch, position), by_token)

    def rows(self, form: Form, name: ComponentName, tensor: Tensor) -> Float[Tensor, "out width"]:
        """Return the compared rows of one place; of experts, 1 for each that is picked, 0 for the others."""
        # Numbers of experts are small integers, which float32 holds.
        numbers = tensor if tensor.is_floating_point() else tensor.float()
        states = self.conventions.by_token(numbers, self.picker.n_tokens)
        if name != "experts":
            return self.picker.pick(states)
        picked = self.tokens.pick(states)
        if tensor.is_floating_point():
            return (picked != 0).float()
        assert form.router is not None
        empty = torch.zeros(len(picked), form.router.n_experts, device=picked.device)
        return empty.scatter_(1, picked.long(), 1.0)

    @contextmanager
    def attached(self, blocks: Sequence[nn.Module], which: range) -> Iterator[list[ComponentRows]]:
        """Hooks on these blocks while the context lasts: the rows of each call, as it ends."""
        assert self.conventions.components is not None
        done = list[ComponentRows]()
        with ExitStack() as stack:
            for index in which:
                form = self.conventions.components.of_blocks[index]
                stack.enter_context(self._collecting(blocks[index], form, done))
            yield done

    @contextmanager
    def _collecting(self, block: nn.Module, form: Form, done: list[ComponentRows]) -> Iterator[None]:
        collected = Collected(self, form)

        def end(*_: Any) -> None:
            done.append(collected.rows)
            collected.rows = {}

        with at_places(block, form, collected.take):
            handle = block.register_forward_hook(end)
            try:
                yield
            finally:
                handle.remove()


class Collected:
    """The rows of one block's components while it runs."""

    def __init__(self, picker: ComponentPicker, form: Form) -> None:
        self.rows: dict[ComponentName, Tensor] = {}
        self._picker, self._form = picker, form

    def take(self, name: ComponentName, _place: Spot, tensor: Tensor) -> None:
        """Take the rows of a tensor of a component."""
        rows = self._picker.rows(self._form, name, tensor)
        # Several sublayers of one kind, as attention beside a state space, count as one: their sum is added.
        self.rows[name] = self.rows[name] + rows if name in self.rows else rows


def component_pairs(
    sites: Sequence[ComponentSite],
    ours: BlockRows,
    theirs: BlockRows,
    local: ComponentRows | None = None,
    trial: int | None = None,
) -> Iterator[StatePair]:
    """The pairs of the components of one block, at these sites."""
    for site in sites:
        name = site.name
        yield StatePair(
            site,
            ours.prompts_of(name),
            ours.components[name],
            theirs.components[name],
            (local or {}).get(name),
            trial,
            ours.change(theirs) if name == "experts" else None,
        )
