"""Functions that all commands share: outputs, checked first and saved last; progress for one process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from lazarus.cli.reporting import tell
from lazarus.errors import LazarusError
from lazarus.terminal import say


def check_outputs(outputs: Sequence[str], command: str, inputs: Sequence[str]) -> None:
    """Check every `-o` before anything is loaded; `inputs` are what the run reads.

    Raises:
        UsageError: a path or format that cannot be written.
    """
    if outputs:
        from lazarus.render.save import check_outputs

        check_outputs(outputs, command, inputs)


def print_and_save(body: str, result: Any, outputs: Sequence[str]) -> None:
    """Print, and save what can be saved.

    Neither an output that cannot be written nor a standard output that is closed costs the user the others.

    Raises:
        LazarusError: an output could not be written; the messages of all others are printed.
        OSError: standard output could not be written.
    """
    from lazarus.render.base.words import saved

    unread, faults = _print(body), []
    for path in outputs:
        try:
            files = result.save(path)
        except LazarusError as fault:
            faults.append(fault)
        else:
            unread = unread or _print("\n".join(map(saved, files)))
    for other in faults if unread else faults[:-1]:
        tell(other)
    if unread:
        raise unread
    if faults:
        raise faults[-1]


def print_estimate(estimate: Callable[..., Any]) -> None:
    """Print what a run would take: `estimate` is told how many seconds this process has run until here."""
    from lazarus.estimating import since_start
    from lazarus.render.base import estimates

    say(estimates.text(estimate(start_seconds=since_start())))


def _print(text: str) -> OSError | None:
    """Print, and return what kept it from being printed."""
    try:
        say(text)
    except OSError as error:
        return error
    return None


def leads() -> bool:
    """Return whether this process is the one, of several, that prints and saves."""
    from lazarus.ranks import find_rank

    return find_rank().leads


def set_up_libraries(quiet: bool, debug: bool) -> bool:
    """Set how the libraries below log, show progress and wait for the Hub; return whether bars are shown."""
    from lazarus.console import quieten
    from lazarus.models.hub_client import bound_waits

    bound_waits()
    show = sys.stderr.isatty() and not quiet and leads()
    quieten(show_bars=show, show_logs=debug and not quiet)
    return show
