"""The program itself: its commands hang on `app` and `introspect`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lazarus.cli.reporting import unexpected
from lazarus.version import __version__

app = typer.Typer(
    name="lazarus",
    help="Compare two language models from the inside.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
introspect = typer.Typer(help="Look into a pair of models.", no_args_is_help=True)
app.add_typer(introspect, name="introspect")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lazarus {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Compare two language models from the inside."""


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        # A console that cannot encode a character gets its escape instead of an exception.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    finally:
        if sys.excepthook is not sys.__excepthook__:  # typer sets its own; --debug wants Python's
            sys.excepthook = unexpected
