"""The command line: parse, call, print, exit code. No formula and no formatting here.

app.py         the program, on which the commands hang
activation.py  activation-diff, and the demo
weights.py     weight-diff
lens.py        compare
series.py      series
record.py      record
saved.py       show and schema: what was saved
arguments.py   the options as a user types them
imports.py     torch and transformers, as fast as they go
endings.py     the signals that end a command
output.py      outputs that are checked first and saved last
reporting.py   how a command ends
"""

from lazarus.cli.app import app, main
from lazarus.commands import commands

for name in sorted(commands()):  # in which order the help has them
    commands()[name].load("cli")

from lazarus.cli import record, saved  # noqa: E402 - and these after them

__all__ = ["app", "main", "record", "saved"]
