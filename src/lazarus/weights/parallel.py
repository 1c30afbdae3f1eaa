"""Many pairs of tensors at once, in a few threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any, TypeVar

import torch

from lazarus.weights.numbers import Chunk, Pair
from lazarus.weights.views import View

T = TypeVar("T")


class _StoppedError(Exception):
    """Another pair failed, or the user interrupted."""


@dataclass(frozen=True, eq=False)
class _Stoppable:
    """A pair whose chunks end in an error once `stop` is set."""

    pair: Pair
    stop: Event

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pair.shape

    @property
    def matrix(self) -> tuple[int, int]:
        return self.pair.matrix

    @property
    def base(self) -> View:
        return self.pair.base

    @property
    def finetuned_dtype(self) -> str:
        return self.pair.finetuned_dtype

    def identical(self) -> bool:
        return self.pair.identical()

    def chunks(self, n_elements: int) -> Iterator[Chunk]:
        return until(self.stop, self.pair.chunks(n_elements))


def stoppable(pair: Pair, stop: Event) -> Pair:
    """Return the pair, of which reading ends in an error once `stop` is set."""
    return _Stoppable(pair, stop)


def until(stop: Event, items: Iterable[T]) -> Iterator[T]:
    """Yield the items, until `stop` is set: then the task ends with an error."""
    for item in items:
        if stop.is_set():
            raise _StoppedError
        yield item


def measure_all(
    pairs: Sequence[Pair],
    measure_one: Callable[[Pair], T],
    n_threads: int,
    on_done: Callable[[int], Any] | None = None,
) -> list[T]:
    """Return what `measure_one` returns for each pair, in their order, from `n_threads` threads.

    The largest pairs go first. `on_done` is called in this thread, with a pair's index, as each is ready. The
    first error, or an interrupt, ends all: the other threads end at their next chunk, and then it is raised.
    """
    tasks = [partial(_measured, measure_one, pair) for pair in pairs]
    return run_all(tasks, [math.prod(pair.matrix) for pair in pairs], n_threads, on_done)


def _measured(measure_one: Callable[[Pair], T], pair: Pair, stop: Event) -> T:
    return measure_one(stoppable(pair, stop))


def run_all(
    tasks: Sequence[Callable[[Event], T]],
    sizes: Sequence[int],
    n_threads: int,
    on_done: Callable[[int], Any] | None = None,
) -> list[T]:
    """Run tasks as `measure_all` does, and return what they return; `until` ends one early by its event."""
    stop = Event()
    done: dict[int, T] = {}
    with _single_threads(n_threads) as pool:
        try:
            # Otherwise one thread may begin the largest last, while the others have nothing to do.
            largest_first = sorted(range(len(tasks)), key=lambda i: -sizes[i])
            places: dict[Future[T], int] = {pool.submit(tasks[i], stop): i for i in largest_first}
            for future in as_completed(places):
                i = places[future]
                done[i] = future.result()
                if on_done is not None:
                    on_done(i)
        finally:  # after an error there is work left
            stop.set()
            pool.shutdown(cancel_futures=True)
    return [done[i] for i in range(len(tasks))]


@contextmanager
def _single_threads(n_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch uses one thread each: two on two cores, not four."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(n_threads, "weights", lambda: torch.set_num_threads(1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
