"""The signals that end a command: each is an exception, so that a run cleans up after itself."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_SECONDS = 10.0
"""how long further signals wait for the clean-up: torchrun and Slurm send more than one"""

_ENDING = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Ended(KeyboardInterrupt):
    """A signal that ends the command; whoever cleans up after Ctrl-C does so after this."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number
        """as shells have it: 130 after SIGINT, 143 after SIGTERM"""


class _Signals:
    """Remembers the first signal."""

    def __init__(self) -> None:
        self.first: Ended | None = None
        self._since = 0.0

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._since = Ended(number), now
        elif now - self._since < GRACE_SECONDS:
            return
        # A library may have swallowed the first one, so a later one is raised again.
        raise self.first


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `Ended` at each signal that ends a command, and exit with its code, whatever comes of it.

    A signal that was ignored when the process began, as by nohup, stays so.

    Raises:
        SystemExit: a signal came; an exception that a library made of it is left out.
    """
    signals = _Signals()
    before = {
        number: signal.signal(number, signals)
        for number in (getattr(signal, name) for name in _ENDING)
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    }
    try:
        yield
    except BaseException:
        if signals.first is None:
            raise
        raise SystemExit(signals.first.exit_code) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
