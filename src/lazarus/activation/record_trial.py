"""A run of record on a stand-in for its model: what it writes goes to a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

from lazarus.activation.capture import Capture
from lazarus.activation.measure import Part
from lazarus.activation.prepare import Given, Prepared
from lazarus.activation.run import Silence
from lazarus.activation.trial import Trial
from lazarus.loading import Model
from lazarus.models import Clock
from lazarus.options import RecordOptions


class _Forwarding(Silence):
    """An observer that passes on which batches are done."""

    def __init__(self) -> None:
        self.told: Callable[[int], None] = super().advanced

    def advanced(self, n_tokens: int) -> None:
        """Tell whoever asks at the time that so many tokens are done."""
        self.told(n_tokens)


class RecordTrial(Trial[Capture]):
    """A run of record on a stand-in."""

    def __init__(
        self, given: Given, model: Model, clock: Clock, options: RecordOptions, folder: Path
    ) -> None:
        self._options, self._folder = options, folder
        self._watcher, self._numbers = _Forwarding(), count()
        super().__init__(given, (model,), clock)

    def settled(self, prepared: Prepared) -> Prepared:
        """Return what is recorded."""
        capture = Capture(prepared, self._options, self._folder, self._watcher)
        return replace(prepared, pair=capture.job.pair, run=replace(capture.job.plan, noise_floor=False))

    @property
    def bytes_written(self) -> int:
        """Return the size of the recording, but for logits and what is inside blocks."""
        return Capture(self.prepared, self._options, self._folder, self._watcher).n_bytes

    def begin(self) -> Capture:
        """Return what writes states."""
        return Capture(self.prepared, self._options, self._folder, self._watcher)

    def take(self, into: Capture, part: Part, advanced: Callable[[int], None]) -> None:
        """Run a part of the prompts, and write their states to a file."""
        self._watcher.told = advanced
        into.write(part, next(self._numbers))

    def kept_bytes(self, into: Capture) -> int:
        """Return 0: all states go to files."""
        return 0

    def conclude(self, into: Capture) -> None:
        """Do nothing: what is left to write is small."""
