"""Reads small files that strangers wrote: whole, within bounds, and quoted in no message."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from lazarus.bounds import LIFT, MOST_BYTES, MOST_NESTED, MOST_PIPED, exceeds, lifted
from lazarus.errors import LazarusError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class UnreadableError(ValueError):
    """A file that is not read; the message is a clause that says why, and nothing of what the file holds."""

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice
        """what to do about it, where that is not what the caller says"""


def user_path(path: str | Path) -> Path:
    """Return a path with its `~` written out; one whose home is not known stays as it is."""
    # Path.expanduser raises a RuntimeError of `~nobody`.
    return Path(os.path.expanduser(path))


def read_json(path: str | Path, fault: type[LazarusError], advice: str, most: int = MOST_BYTES) -> Any:
    """Return what a file of JSON says.

    Raises:
        LazarusError: of the class `fault`, with the advice: it cannot be read, is no regular file, has more
            than `most` bytes, or holds no JSON.
    """
    try:
        return decoded(content(path, most))
    except UnreadableError as error:
        raise _told(path, error, fault, advice) from error


def read_text(path: str | Path, fault: type[LazarusError], advice: str) -> str:
    """Return the text of a file in UTF-8.

    Raises:
        LazarusError: of the class `fault`, with the advice: it cannot be read, is no regular file, larger
            than a limit, or not UTF-8.
    """
    try:
        return as_text(content(path))
    except UnreadableError as error:
        raise _told(path, error, fault, advice) from error


def read_bytes(
    path: str | Path,
    fault: type[LazarusError],
    advice: str,
    most: int | None = MOST_BYTES,
    *,
    may_be_piped: bool = False,
) -> bytes:
    """Return the bytes of a file, of at most so many; None for as many as there are, `may_be_piped` as there.

    Raises:
        LazarusError: of the class `fault`, with the advice: it cannot be read, is no regular file, or larger.
    """
    try:
        return content(path, most, may_be_piped=may_be_piped)
    except UnreadableError as error:
        raise _told(path, error, fault, advice) from error


def content(path: str | Path, most: int | None = MOST_BYTES, *, may_be_piped: bool = False) -> bytes:
    """Return the bytes of a regular file, of at most so many; None for as many as there are.

    With `may_be_piped`, a pipe will do too, as in `<(zcat FILE)`: for what the user named, and no file did.

    Raises:
        UnreadableError: it cannot be read, is none, or larger.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as stream:
            mode = os.fstat(handle).st_mode
            is_pipe = stat.S_ISFIFO(mode) and may_be_piped
            if is_pipe:
                os.set_blocking(handle, True)  # where nobody writes, it is at its end all the same
                most = MOST_PIPED if most is None else most
            elif not stat.S_ISREG(mode):
                raise UnreadableError("it is no regular file, but a folder, a device or a pipe")
            found = stream.read(-1 if most is None else most + 1)
            if found is None or (is_pipe and not found):  # None: of the system's own files, some are pipes
                raise UnreadableError("it is a pipe, and nothing comes out of it")
            if most is not None and exceeds(len(found), most):
                raise UnreadableError(
                    f"it is larger than {most // 2**20} MiB, the limit of such a file", LIFT
                )
            return found + stream.read()  # nothing, unless the limit is lifted
    except UnreadableError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise UnreadableError(str(getattr(error, "strerror", None) or error)) from error


def decoded(text: str | bytes) -> Any:
    """Return what JSON says.

    Raises:
        UnreadableError: it is none, or none that can be worked with.
    """
    text = as_text(text) if isinstance(text, bytes) else text
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UnreadableError(f"no JSON: {error.msg.rstrip(': ')} ({_place(text, error.pos)})") from error
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise UnreadableError("a number in it has thousands of digits") from error
    except RecursionError as error:
        raise UnreadableError("thousands of brackets stand within each other in it") from error
    if _is_deep(found):
        raise UnreadableError(f"more than {MOST_NESTED} brackets stand within each other in it", LIFT)
    if _SURROGATE.search(text) and not _is_unicode(found):
        raise UnreadableError("a text in it has half a character (a lone surrogate)")
    return found


def as_text(found: bytes) -> str:
    """Return UTF-8 as text.

    Raises:
        UnreadableError: it is none.
    """
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = found[error.start]
        raise UnreadableError(f"not UTF-8: byte 0x{byte:02x} at position {error.start}") from error


def _told(path: str | Path, error: UnreadableError, fault: type[LazarusError], advice: str) -> LazarusError:
    return fault(f"{path}: cannot be read: {error}. {error.advice or advice}")


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    return f"line {line}, column {position - text.rfind(chr(10), 0, position)}"


def _is_deep(found: Any) -> bool:
    """Return whether more lists and objects are within each other than is allowed."""
    level = [found]
    for _ in range(MOST_NESTED + 1):
        level = [item for each in level for item in _items(each)]
        if not level:
            return False
    return not lifted()


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _is_unicode(found: Any) -> bool:
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
