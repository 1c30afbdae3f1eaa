"""Run the pair in whichever way its models are held: both in memory, or a block of each at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lazarus.engine.noise import Noise
from lazarus.engine.pair import ModelPair
from lazarus.engine.resident import Resident
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
    noise = Noise(pair, work.sample, work.noise)
    resident = Resident(pair, work.position, localize=work.localize, given=work.given, nudge=work.nudge)
    resident.kept = work.kept
    for batch in work.batches:
        ours, pairs = resident.run(batch)
        yield from pairs
        noise.take(ours)
        del ours, pairs  # the trials need room as well
        advanced(batch.base.n_tokens)
        yield from noise.run(advanced)
    # Base alone: both models run these batches in another shard.
    for again in work.again:
        noise.take(resident.base.run(again, work.position))
        yield from noise.run(advanced)
