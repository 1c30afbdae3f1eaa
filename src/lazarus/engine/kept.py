"""Base's compared rows, kept from the first of several runs against it, so that base runs once for all."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from lazarus.batches import TokenBatch
from lazarus.engine.runner import States
from lazarus.engine.spill import SpillBuffer
from lazarus.sites import Position


class KeptStates:
    """Base's rows of the batches that have run. A batch that is not among them runs, and is kept."""

    def __init__(self, buffer: SpillBuffer) -> None:
        """Take the buffer that they wait in."""
        self._buffer = buffer
        self._condition: Any = None
        self._n_conditions = 0

    def under(self, condition: object) -> bool:
        """Set how base runs from here on; return whether that is how it ran before.

        States of another condition, such as another kernel of attention, are not used.
        """
        is_known = self._n_conditions > 0 and condition == self._condition
        if not is_known:
            self._condition = condition
            self._n_conditions += 1
        return is_known

    def of(self, batch: TokenBatch, position: Position) -> States | None:
        """Return base's rows of a batch; None where it has to run."""
        key = self._key(batch, position)
        if key not in self._buffer:
            return None
        prompts, sites, head_prompts, head_rows = self._buffer.take(key)
        return States(prompts, list(sites), head_prompts, head_rows)

    def keep(self, batch: TokenBatch, position: Position, states: States) -> None:
        """Keep base's rows of a batch.

        Raises:
            SaveError: they fit neither memory nor the disk.
        """
        value = (states.prompts, tuple(states.sites), states.head_prompts, states.head_rows)
        self._buffer.put(self._key(batch, position), value)

    def _key(self, batch: TokenBatch, position: Position) -> Hashable:
        # One by one, because company and padding move the states by their rounding.
        ids = tuple((prompt.index, tuple(prompt.ids)) for prompt in batch.members)
        return self._n_conditions, ids, batch.padded_length, batch.prefix, position
