"""The end of a command: one message on standard error, and its exit code."""

from __future__ import annotations

import errno
import logging
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
            traceback.print_exc()
        tell(error)
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        if error.errno not in _DISK_FAULTS:
            raise
        what = error.filename or "a file"
        # typer prints for us, so a fault that it raises is one of standard output.
        if raised_in(error) == "typer":
            what, advice = "standard output", "Make room, or send it elsewhere."
        else:
            advice = "Make room on its disk, and run again."
        typer.echo(f"Error: {what} cannot be written: {error.strerror}. {advice}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo("Interrupted.", err=True)
        # 128 and the number of SIGINT, as shells have it.
        raise typer.Exit(130) from error


def tell(error: LazarusError) -> None:
    """Print an error, with options as they are typed."""
    typer.echo(f"Error: {in_flags(error.marked)}", err=True)


def unexpected(kind: type[BaseException], error: BaseException, _traceback: TracebackType | None) -> None:
    """Tell of an error that nobody foresaw, in a line; takes the place of `sys.excepthook`.

    The trace goes into a file, so that a run of hours need not be repeated for it.
    """
    text = " ".join(str(error).split())
    theirs = raised_in(error) not in ("lazarus", "")
    whose = "Lazarus did not foresee it" if theirs else "This is a fault of lazarus"
    sys.stderr.write(
        f"Error: unexpected {kind.__name__}: {text} ({raised_at(error)}). {whose}: {_keep_trace(error)}.\n"
    )


def _keep_trace(error: BaseException) -> str:
    """Write the trace of an error to a file, and return what to do about it."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="lazarus-", suffix=".txt", delete=False) as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return "run again with --debug and report what it prints"
    return f"report it with its trace, which is in {file.name}"
