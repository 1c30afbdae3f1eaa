"""The commands on saved results: show one again, and print the schema of what each command saves."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazarus.cli import arguments as a
from lazarus.cli.app import app
from lazarus.cli.output import check_outputs, print_and_save
from lazarus.cli.reporting import reported
from lazarus.commands import commands
from lazarus.terminal import say

RECORDING = "recording"

if TYPE_CHECKING:
    CommandName = str
else:  # typer lists the choices of an enumeration; a type checker cannot read one that is made of a registry
    CommandName = StrEnum(
        "CommandName", [(name.replace("-", "_"), name) for name in (*commands(), RECORDING)]
    )


@app.command()
def show(
    result: a.Result,
    output: a.Outputs = None,
    threshold: a.AnotherThreshold = None,
    fail_above: a.FailAbove = None,
    expect: a.Expect = None,
    only_compared: a.OnlyCompared = False,
    debug: a.Debug = False,
) -> None:
    """Show a saved result again: print it, save it in other formats, hold it against gates.

    No model is loaded and nothing is measured anew.

    Example:

    lazarus show diff.json --threshold 0.05 -o report.html -o figure.pdf
    """
    with reported(debug):
        from lazarus.errors import UsageError
        from lazarus.foreign import user_path
        from lazarus.result_classes import load_result

        found: Any = load_result(user_path(result))
        check_outputs(output or [], found.record.command, [result])
        if not found.has_gates:
            if (threshold, fail_above, expect, only_compared) != (None, None, None, False):
                raise UsageError(
                    f"{result}: a result of {found.record.command}, which has no threshold and no gates. "
                    "Leave --threshold, --fail-above, --expect and --only-compared out."
                )
            print_and_save(str(found), found, output or [])
            return
        found.check_options(fail_above, expect)
        if threshold is not None:
            found = found.with_threshold(threshold)
        print_and_save(str(found), found, output or [])
        found.check_gates(fail_above=fail_above, expect=expect, only_compared=only_compared)


@app.command()
def schema(
    command: Annotated[
        CommandName, typer.Argument(help="The command that saves it, or recording: its recording.json.")
    ],
) -> None:
    """Print the JSON Schema of what a command saves."""
    from lazarus.recordings import recording_schema
    from lazarus.results import json_schema

    found = recording_schema() if str(command) == RECORDING else json_schema(str(command))
    say(json.dumps(found, indent=2, ensure_ascii=False))
