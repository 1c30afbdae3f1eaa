"""The program itself: its commands hang on `app` and `introspect`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lazarus.blame import MemoryFaults
from lazarus.cli.endings import ended_by_signals
from lazarus.cli.reporting import tell, told_of_disk, unexpected
from lazarus.errors import DeviceError
from lazarus.render.base.escape import escaped
from lazarus.scratch import remove_all
from lazarus.terminal import drop_unwritten, guard_streams, say
from lazarus.version import __version__

# typer shows this one itself. Its module is another one in each version, and its name is not.
_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in typer.BadParameter.__mro__}
_Mistyped = _KINDS["UsageError"]


class _Group(TyperGroup):
    """Escapes what typer's own errors quote of the command line: rich writes them past the guard."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _quoted():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _quoted():
            return super().invoke(ctx)


@contextmanager
def _quoted() -> Iterator[None]:
    try:
        yield
    except _Mistyped as error:
        error.message = escaped(error.message)  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    name="lazarus",
    cls=_Group,
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
        say(f"lazarus {__version__}")
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
    guard_streams()
    try:
        # Where there is too little to begin: a command tells of its own.
        with ended_by_signals(), MemoryFaults(()):
            app()
    except DeviceError as error:
        tell(error)
        sys.exit(error.exit_code)
    except OSError as error:
        if not told_of_disk(error):
            raise
        sys.exit(1)
    finally:
        remove_all()
        drop_unwritten()
        if sys.excepthook is not sys.__excepthook__:  # typer sets its own; --debug wants Python's
            sys.excepthook = unexpected
