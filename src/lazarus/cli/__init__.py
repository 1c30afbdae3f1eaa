"""The command line: parse, call, print, exit code. No formula and no formatting here.

commands.py    the commands
arguments.py   their options
reporting.py   how a command ends
"""

from lazarus.cli.commands import app, main

__all__ = ["app", "main"]
