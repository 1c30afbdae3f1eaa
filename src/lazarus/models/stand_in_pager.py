"""The pager of a stand-in for a model that is read block by block: it counts, and reads nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from lazarus.models.equality import Fault, has_non_finite
from lazarus.models.pager import Pager
from lazarus.models.sameness import shared_blocks
from lazarus.models.skipping import Clock
from lazarus.models.stand_ins import StandIn


class StandInPager(Pager):
    """Reads nothing, and counts what the pager of a model that is read block by block would read."""

    def __init__(self, standing: StandIn, clock: Clock, base: Pager | None) -> None:
        model = standing.model
        self.model, self.blocks = model.model, model.anatomy.blocks
        self.n_blocks, self.base = len(self.blocks), base
        self.seen: dict[int, dict[str, Fault]] = {}
        self.n_bytes = 0
        """as stored"""
        self.same: Sequence[bool] = ()
        """for each block, whether it is base's"""
        self._standing, self._clock, self._loaded = standing, clock, set[int]()
        self._device: torch.device = model.model.device
        for index, block in enumerate(self.blocks):
            self._on_demand(block, index, partial(self._load_now, index), partial(self.free, index))

    @property
    def device(self) -> torch.device:
        """Return where it runs."""
        return self._device

    def block_bytes(self, index: int) -> int:
        """Return the size of a block in memory."""
        return self._standing.size.blocks[index]

    def reading_seconds(self, index: int) -> float:
        """Return the seconds that reading a block takes."""
        return self._stored(self.block_bytes(index)) * self._standing.seconds_a_byte

    def same_as_base(self, index: int) -> bool:
        """Return whether a block is base's."""
        return bool(self.same) and self.same[index]

    def has_weights_of(self, other: Pager) -> bool | None:
        """Return False, as the first tensors that a run reads would tell: those outside of the blocks."""
        for pager in (self, other):
            assert isinstance(pager, StandInPager)
            pager.load_head()
        return False

    def read(self, index: int) -> dict[str, Tensor]:
        """Count a block as read, in the time of another thread."""
        self.n_bytes += self._stored(self.block_bytes(index))
        return {}

    def put(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Take a block as loaded; the first time a pager looks through it for what is not finite."""
        if index not in self.seen:
            self.seen[index] = {}
            self._clock.skipped_seconds += self.block_bytes(index) * self._looking_seconds
        self._loaded.add(index)

    def free(self, index: int) -> None:
        """Take a block as freed."""
        self._loaded.discard(index)

    def load_head(self) -> None:
        """Count what is not in blocks as read, while nothing computes."""
        n_bytes = self._stored(self._standing.size.rest)
        self.n_bytes += n_bytes
        self._clock.skipped_seconds += n_bytes * self._standing.seconds_a_byte

    def free_head(self) -> None:
        """Do nothing."""

    def is_table(self, tensor: Tensor) -> bool:
        """Return False: nothing stays on disk."""
        return False

    def _load_now(self, index: int) -> None:
        self.read(index)
        self._clock.skipped_seconds += self.reading_seconds(index)
        self.put(index, {})

    @cached_property
    def _looking_seconds(self) -> float:
        """Return the seconds a byte that looking for what is not finite takes."""
        started, parameters = time.perf_counter(), list(self.blocks[0].parameters())
        for parameter in parameters:
            has_non_finite(parameter)
        return (time.perf_counter() - started) / sum(parameter.nbytes for parameter in parameters)

    def _stored(self, n_bytes: int) -> int:
        size = self._standing.size
        return n_bytes * size.files // max(1, size.whole)


def page(each: Sequence[StandIn], clock: Clock) -> tuple[StandIn, ...]:
    """Return a pair, or a model that runs alone, as read block by block."""
    base = StandInPager(each[0], clock, None)
    pagers = [base]
    if len(each) > 1:
        pagers.append(StandInPager(each[1], clock, base))
        pagers[1].same = shared_blocks(each[0].model, each[1].model)
    return tuple(
        replace(one, model=replace(one.model, pager=pager)) for one, pager in zip(each, pagers, strict=True)
    )
