"""Blocks that do not run, and a clock that counts their time as that of blocks like them which did.

An estimate runs the very code of a run, but only a few blocks of each kind: a block that is skipped passes
its input on, and the clock moves by what a block of its kind took on a batch of the same shape.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any, Protocol, cast, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lazarus.models.anatomy import block_settings


@runtime_checkable
class Counter(Protocol):
    """An object that counts floating-point operations, such as torch's FlopCounterMode."""

    def get_total_flops(self) -> int:
        """Return the operations counted so far."""


@dataclass
class Clock:
    """The time on a device, with that of all blocks that were skipped."""

    device: torch.device
    skipped_seconds: float = 0.0
    skipped_flops: int = 0
    counter: Counter | None = None
    """what counts the operations of blocks that run, while they are counted"""

    def now(self) -> float:
        """Return the time in seconds, when all that was begun on the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() + self.skipped_seconds

    def flops(self) -> int:
        """Return the operations that were counted until now, with those of blocks that were skipped."""
        return (self.counter.get_total_flops() if self.counter else 0) + self.skipped_flops

    @contextmanager
    def counting(self, counter: Any) -> Iterator[None]:
        """Count operations while the context lasts."""
        self.counter, self.skipped_flops = counter, 0
        try:
            with counter:
                yield
        finally:
            self.counter = None


@dataclass
class Twins:
    """Blocks of one kind: the first `n_run` of them run, and tell what the others take."""

    clock: Clock
    n_run: int
    _taken: dict[Hashable, deque[tuple[float, int]]] = field(default_factory=dict)
    _returned: dict[Hashable, Any] = field(default_factory=dict)

    def call(
        self, place: int, run: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run the block at `place` among them, or pass its input on."""
        # Apart while operations are counted: that is slow, and other calls have counted none.
        states, key = args[0] if args else None, (_shapes(args, kwargs), self.clock.counter is None)
        if place >= self.n_run and key in self._taken and isinstance(states, Tensor):
            return self._skip(key, states)
        started, counted = self.clock.now(), self.clock.flops()
        output = run(*args, **kwargs)
        taken = self.clock.now() - started, self.clock.flops() - counted
        self._taken.setdefault(key, deque(maxlen=self.n_run)).append(taken)
        self._returned[key] = _without_states(output)
        return output

    def _skip(self, key: Hashable, states: Tensor) -> Any:
        started = self.clock.now()
        # A clone, as a block makes a new tensor: the memory is that of a run.
        output = self._returned[key](states.clone())
        seconds, flops = zip(*self._taken[key], strict=True)
        # The first call at a shape may choose kernels, once for all blocks, so the slowest does not tell.
        self.clock.skipped_seconds += max(0.0, statistics.median_low(seconds) - (self.clock.now() - started))
        self.clock.skipped_flops += statistics.median_low(flops)
        return output


def skip_blocks(blocks: Sequence[nn.Module], clock: Clock, n_run: int) -> None:
    """Let only the first `n_run` blocks of each kind run, and count the others by `clock`."""
    kinds: list[tuple[Any, Twins]] = []
    places: dict[int, int] = defaultdict(int)
    for index, block in enumerate(dict.fromkeys(blocks)):
        kind = [block_settings(module, index) for module in block.modules()]
        twins = next((known for settings, known in kinds if settings == kind), None)
        if twins is None:
            twins = Twins(clock, n_run)
            kinds.append((kind, twins))
        _OF_BLOCKS[block] = twins, places[id(twins)]
        places[id(twins)] += 1
        block.__class__ = _skippable(cast(Hashable, type(block)))


_OF_BLOCKS: WeakKeyDictionary[nn.Module, tuple[Twins, int]] = WeakKeyDictionary()
"""the twins of a block, and its place among them; beside it, so that blocks compare as ever"""


@cache
def _skippable(kind: Hashable) -> type[nn.Module]:
    """Return a class of blocks, of which the forward pass asks the block's twins first."""
    of_blocks = cast(Any, kind)

    @wraps(of_blocks.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        twins, place = _OF_BLOCKS[self]
        return twins.call(place, partial(of_blocks.forward, self), args, kwargs)

    return type(of_blocks.__name__, (of_blocks,), {"forward": forward})


def _shapes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """Return the shapes of a call; of a pass that goes on from a KV cache the mask has that of the cache."""
    given = [*args, kwargs.get("attention_mask")]
    return tuple((tuple(each.shape), each.dtype) for each in given if isinstance(each, Tensor))


def _without_states(output: Any) -> Callable[[Tensor], Any]:
    """Return what makes a block's output of other hidden states."""
    if isinstance(output, Tensor):
        return lambda states: states
    if isinstance(output, Mapping):
        make, first = cast(Any, type(output)), next(iter(output))
        return lambda states: make({**output, first: states})
    others = tuple(output)[1:]
    return lambda states: getattr(type(output), "_make", type(output))((states, *others))
