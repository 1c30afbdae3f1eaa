"""A fourth command for `test_commands.py`: this module and one registration are the whole of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import IO, Annotated, Any, Literal

import typer
from msgspec import Struct

from lazarus.cli.app import introspect
from lazarus.cli.output import check_outputs, print_and_save
from lazarus.cli.reporting import reported
from lazarus.result_classes import Result
from lazarus.results import Metric, Tool
from lazarus.version import __version__


class Tally(Struct, frozen=True, kw_only=True):
    """How many words a text has."""

    command: Literal["tally"] = "tally"
    schema_version: Literal["1.0"] = "1.0"
    tool: Tool = Tool(name="lazarus", version=__version__)
    words: list[str]
    notes: list[str] = []
    note_codes: list[str] = []


class TallyResult(Result[Tally]):
    """The result of tally."""

    kind = Tally

    def __str__(self) -> str:
        return f"{len(self.record.words)} words"


def _columns(record: Tally) -> dict[str, list[Any]]:
    return {"word": record.words}


def _write_markdown(record: Tally, stream: IO[bytes]) -> None:
    stream.write("".join(f"- {word}\n" for word in record.words).encode())


table = SimpleNamespace(columns=_columns, KINDS={"word": "string"}, write_markdown=_write_markdown)
METRICS = {"n_words": Metric("n_words", "Words", "words", "0 to ∞", "d", "words of a text", "counting")}


@introspect.command("tally")
def tally(text: str, output: Annotated[list[str] | None, typer.Option("-o")] = None) -> None:
    """Count the words of a text."""
    with reported(debug=False):
        check_outputs(output or [], "tally", [])
        result = TallyResult(Tally(words=text.split()))
        print_and_save(str(result), result, output or [])
