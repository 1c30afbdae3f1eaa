"""Sharing of shards: a process runs those whose lock it gets, until the files of all are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lazarus.errors import SaveError
from lazarus.messages import option
from lazarus.metrics import AccumulatorState
from lazarus.shards.folder import WorkFolder

PAUSE_SECONDS = 0.2
_COVERS = "covers"


@dataclass(frozen=True)
class Shard:
    """A part of a run: the prompts that it covers, so many tokens."""

    number: int
    prompts: Sequence[int]
    n_tokens: int


def run_shards(
    folder: WorkFolder,
    shards: Sequence[Shard],
    run: Callable[[Shard], AccumulatorState],
    advanced: Callable[[int], None],
) -> int:
    """Return when every shard is done, by this process or another, with how many were done before.

    A shard that another process is running is waited for. If that process dies, its lock is free, and the
    shard is run here. `advanced` is told the tokens of the shards that are not run here.

    Raises:
        SaveError: the disk gave out.
    """
    first = folder.rank.number * len(shards) // folder.rank.world  # each begins at a place of its own
    left = [*shards[first:], *shards[:first]]
    n_before = -1
    while left:
        done = [shard for shard in left if _read(folder, shard) is not None]
        advanced(sum(shard.n_tokens for shard in done))
        left = [shard for shard in left if shard not in done]
        n_before = len(done) if n_before < 0 else n_before
        ran = _run_one(folder, left, run)
        if ran is not None:
            left.remove(ran)
        elif left:
            time.sleep(PAUSE_SECONDS)
    return max(n_before, 0)


def states(folder: WorkFolder, shards: Sequence[Shard]) -> Iterator[AccumulatorState]:
    """Yield what each shard has accumulated, in their order.

    Raises:
        SaveError: a file that was there cannot be read any more.
    """
    for shard in shards:
        state = _read(folder, shard)
        if state is None:
            raise SaveError(
                f"{option('work_dir', folder.path)}: shard {shard.number} was there and cannot be read any "
                "more. Run again: it alone is missing.",
                option="work_dir",
            )
        yield state


def _run_one(
    folder: WorkFolder, left: Sequence[Shard], run: Callable[[Shard], AccumulatorState]
) -> Shard | None:
    """Run the first shard that nobody else is running; None if there is none."""
    for shard in left:
        with folder.claimed(shard.number) as ours:
            # Another process may have finished it between the look at its file and this lock.
            if ours and _read(folder, shard) is None:
                folder.write(shard.number, {**run(shard), _COVERS: np.asarray(shard.prompts)})
                return shard
    return None


def _read(folder: WorkFolder, shard: Shard) -> AccumulatorState | None:
    state = folder.read(shard.number)
    # By its prompts: a file of the same number may be of another division into shards.
    if state is None or not np.array_equal(state.pop(_COVERS, np.zeros(0)), np.asarray(shard.prompts)):
        return None
    return state
