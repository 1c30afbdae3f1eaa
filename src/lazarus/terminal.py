"""Text that leaves for a terminal or a pipe, in which no control character of a stranger is left.

A model's name, a tensor's, a template's error or a saved result may hold sequences that a terminal obeys.
What this package prints leaves through `say`. The logs, warnings, traces and progress bars of other libraries
leave through the standard streams, in whose place `guard_streams` puts guarded ones.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from typing import Any, TextIO, cast

from lazarus.render.base.escape import legible

STANDARD_OUTPUT = "standard output"
"""the file name that an error of standard output bears"""

# tqdm goes up from one bar to another, and writes a bar from the beginning of its line.
_MOVES = re.compile(r"(?:\x1b\[A)+\Z|\r?")


def say(text: str, *, to_errors: bool = False) -> None:
    """Print lines on standard output; `to_errors`, on standard error, where a fault is passed over.

    Raises:
        OSError: standard output cannot be written; `filename` names it.
    """
    stream = sys.stderr if to_errors else sys.stdout
    try:
        stream.write(f"{legible(text)}\n")
        stream.flush()
    except OSError as error:
        if not to_errors:
            error.filename = STANDARD_OUTPUT
            raise


def guard_streams() -> None:
    """Open those of the three streams that are closed, and guard the two that are written.

    Else the next file that is opened would take the descriptor of a closed one, and whatever a library writes
    there would go into that file. A closed standard output fails when it is written, as that of any other
    command; what goes to a closed standard error is lost, and nothing else.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        if not _is_open(number):
            # The lowest number that is free is this one. To read from: so writing fails.
            os.open(os.devnull, flags)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        if not isinstance(stream, _Guarded):
            # A console that cannot encode a character gets its escape instead of an exception.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, cast(TextIO, _Guarded(stream)))


def drop_unwritten() -> None:
    """Let go of what standard output has not taken, which Python would report once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return False
    return True


class _Guarded:
    """A stream of text that escapes what is written to it; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        # The name by which rich finds the stream: what it writes are its own sequences, for a terminal alone.
        self.rich_proxied_file = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

    def write(self, text: str) -> int:
        """Write the text, and return how many characters it has."""
        moves = cast(re.Match[str], _MOVES.match(text))[0]
        self.rich_proxied_file.write(moves + legible(text[len(moves) :]))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write one text after another."""
        for line in lines:
            self.write(line)
