"""What the commands have in common: outputs, checked first and saved last; progress for one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from lazarus.errors import LazarusError


def check_outputs(outputs: Sequence[str], command: str, inputs: Sequence[str]) -> None:
    """Check every `-o` before anything is loaded; `inputs` are what the run reads.

    Raises:
        UsageError: a path or format that cannot be written.
    """
    if outputs:
        from lazarus.render.save import check_outputs

        check_outputs(outputs, command, inputs)


def save_all(result: Any, outputs: Sequence[str]) -> None:
    """Save what can be saved: an output that cannot be written does not cost the user the others.

    Raises:
        LazarusError: one of them could not be written; the others' messages are printed.
    """
    from lazarus.render import text

    faults = []
    for path in outputs:
        try:
            files = result.save(path)
        except LazarusError as fault:
            faults.append(fault)
        else:
            typer.echo("\n".join(map(text.saved, files)))
    for other in faults[:-1]:
        typer.echo(f"Error: {other}", err=True)
    if faults:
        raise faults[-1]


def leads() -> bool:
    """Whether this process is the one, of several, that prints and saves."""
    from lazarus.ranks import find_rank

    return find_rank().leads


def shows_progress(quiet: bool, debug: bool) -> bool:
    """Whether there are progress bars; the libraries below are told too, and of their logs."""
    from lazarus.console import quieten

    show = sys.stderr.isatty() and not quiet and leads()
    quieten(show_bars=show, show_logs=debug and not quiet)
    return show
