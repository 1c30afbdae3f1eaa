"""Options in messages: marked until it is known whether Python or the command line shows the message."""

from __future__ import annotations

import json
import re
from pathlib import PurePath

START, END = "\ufdd0", "\ufdd1"
"""What stands around an option in a message that is not spelled yet.

They are noncharacters: nothing that a message quotes, such as a prompt or another library's text, has them.
"""
CAUSE = "__cause__"
"""the attribute with the error of another library that a message tells of; `--debug` shows it"""

_NO_VALUE = object()


def option(name: str, value: object = _NO_VALUE, form: str = "") -> str:
    """Return an option by its Python name, or with a value, for a message; `form` is a number's.

    >>> in_python(f"Use {option('dtype', 'float32')}, or {option('localize')}.")
    'Use `dtype="float32"`, or `localize`.'
    """
    if value is _NO_VALUE:
        return f"{START}{name}{END}"
    is_text = isinstance(value, str | PurePath)
    literal = json.dumps(str(value), ensure_ascii=False) if is_text else format(value, form)
    return f"{START}{name}={literal}{END}"


def in_python(marked: str) -> str:
    """Return a marked message with its options as a call has them."""
    return marked.replace(START, "`").replace(END, "`")


_MARKED = re.compile(f'{START}([^={END}]+)(?:=("(?:[^"\\\\]|\\\\.)*"|[^{END}]*))?{END}')


def in_flags(marked: str) -> str:
    """Return a marked message with its options as they are typed: `--dtype float32`, `--localize`."""

    def typed(found: re.Match[str]) -> str:
        name, value = found.groups()
        if value is None or value == "True":
            return flag(name)
        # A text stands as JSON in a mark, in quotes; a number stands as it is.
        return f"{flag(name)} {json.loads(value) if value.startswith(chr(34)) else value}"

    return _MARKED.sub(typed, marked)


def flag(name: str) -> str:
    """Return an option of this name as it is typed.

    >>> flag("batch_tokens")
    '--batch-tokens'
    """
    return "--debug" if name == CAUSE else "--" + name.replace("_", "-")
