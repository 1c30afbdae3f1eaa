"""How a command ends: one message on standard error, and its exit code."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import typer

from lazarus.errors import LazarusError

_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Every error that is meant becomes one message on standard error and its exit code."""
    if debug:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        sys.excepthook = sys.__excepthook__
    else:
        warnings.simplefilter("ignore")
    try:
        yield
    except LazarusError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        if error.errno not in _DISK_FAULTS:
            raise
        typer.echo(
            f"Error: standard output cannot be written: {error.strerror}. Make room, or send it elsewhere.",
            err=True,
        )
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo("Interrupted.", err=True)
        raise typer.Exit(130) from error


def unexpected(kind: type[BaseException], error: BaseException, _traceback: TracebackType | None) -> None:
    """Tell of an error that nobody foresaw, in a line; takes the place of `sys.excepthook`."""
    text = " ".join(str(error).split())
    sys.stderr.write(
        f"Error: unexpected {kind.__name__}: {text}. This is a fault of lazarus: run again with --debug "
        "and report what it prints.\n"
    )
