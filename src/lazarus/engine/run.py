"""Run the pair in whichever way its models are held: both in memory, or a block of each at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lazarus.engine.noise import run_noise
from lazarus.engine.pair import ModelPair
from lazarus.engine.resident import run_pairs
from lazarus.engine.streamed import run_streamed
from lazarus.engine.work import Work
from lazarus.sites import StatePair


def run(pair: ModelPair, work: Work, advanced: Callable[[int], None]) -> Iterator[StatePair]:
    """Yield every pair of states, in whichever order suits the engine.

    `advanced` is told of tokens as they pass.

    Raises:
        DeviceError: a batch does not fit the device's memory.
        SaveError: the states that wait between two blocks fit neither memory nor the disk.
    """
    if pair.streams:
        yield from run_streamed(pair, work, advanced)
        return
    yield from run_pairs(pair, work.batches, work.position, advanced, localize=work.localize)
    yield from run_noise(pair, work.sample, work.noise, advanced)
