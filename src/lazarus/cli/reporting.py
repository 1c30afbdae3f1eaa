"""The end of a command: one message on standard error, and its exit code."""

from __future__ import annotations

import errno
import logging
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import typer

from lazarus.blame import MemoryFaults, raised_at, raised_in
from lazarus.errors import LazarusError
from lazarus.messages import in_flags
from lazarus.render.base.escape import escaped
from lazarus.terminal import STANDARD_OUTPUT, say

_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn each error that is meant into one message on standard error, and its exit code."""
    if debug:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        sys.excepthook = sys.__excepthook__
    else:
        warnings.simplefilter("ignore")
    try:
        with MemoryFaults(()):
            yield
    except LazarusError as error:
        if debug:
            say(traceback.format_exc(), to_errors=True)
        tell(error)
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        if not told_of_disk(error):
            raise
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        say("Interrupted.", to_errors=True)
        raise typer.Exit(getattr(error, "exit_code", 128 + signal.SIGINT)) from error


def tell(error: LazarusError) -> None:
    """Print an error, with options as they are typed."""
    say(f"Error: {escaped(in_flags(error.marked))}", to_errors=True)


def told_of_disk(error: OSError) -> bool:
    """Print an error of a file, or of standard output, that cannot be written; return whether it is one."""
    is_closed = (error.filename, error.errno) == (STANDARD_OUTPUT, errno.EBADF)
    if error.errno not in _DISK_FAULTS and not is_closed:
        return False
    what, advice = error.filename or "a file", "Make room on its disk, and run again."
    if what == STANDARD_OUTPUT:
        advice = "It is closed." if is_closed else "Make room, or send it elsewhere."
    say(f"Error: {escaped(str(what))} cannot be written: {error.strerror}. {advice}", to_errors=True)
    return True


def unexpected(kind: type[BaseException], error: BaseException, _traceback: TracebackType | None) -> None:
    """Tell of an error that nobody foresaw, in a line; takes the place of `sys.excepthook`.

    The trace goes into a file, so that a run of hours need not be repeated for it.
    """
    text = " ".join(str(error).split())
    theirs = raised_in(error) not in ("lazarus", "")
    whose = "Lazarus did not foresee it" if theirs else "This is a fault of lazarus"
    say(
        f"Error: unexpected {kind.__name__}: {escaped(text)} ({raised_at(error)}). "
        f"{whose}: {_keep_trace(error)}.",
        to_errors=True,
    )


def _keep_trace(error: BaseException) -> str:
    """Write the trace of an error to a file, and return what to do about it."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="lazarus-", suffix=".txt", delete=False
        ) as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return "run again with --debug and report what it prints"
    return f"report it with its trace, which is in {file.name}"
