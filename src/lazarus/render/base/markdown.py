"""Text in Markdown that stays text, whoever wrote it: no image, link, mention, heading or end of a cell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lazarus.render.base.escape import escaped

_MARKUP = re.compile(r"[\\`*_{}\[\]<>#|&$~]")
# A dash or a number that would begin a list in the list.
_MARKER = re.compile(r"^([-+=]|\d+[.)])")
# GitHub makes links and mentions of text in which the characters are escaped, but not of code.
_LINKED = re.compile(r"[@#]|://|www\.|mailto:|xmpp:", re.IGNORECASE)
_WORD = re.compile(r"\S+")
_BAR = "&#124;"


def code(text: str) -> str:
    r"""The text as code, in a table too: a bar would end the cell, and a backtick the code.

    >>> print(code("org/base"), code("a`b|c"))
    `org/base` `` a`b ``&#124;`c`
    """
    # A bar is between two pieces of code: before one, readers of tables take backslashes in two ways.
    return _BAR.join(map(_code, escaped(text).split("|"))) if "|" in text else _code(escaped(text) or " ")


def prose(text: str) -> str:
    r"""The text as a sentence in which nothing is markup; a word that would be a link is code.

    >>> print(prose("a_b <i> see https://x.y/"))
    a\_b \<i\> see `https://x.y/`
    """
    plain = _WORD.sub(lambda word: _prose(word[0]), escaped(text).strip())
    return _MARKER.sub(lambda found: f"{found[1][:-1]}\\{found[1][-1]}", plain)


def ending(summary: Iterable[str], notes: Sequence[str]) -> list[str]:
    """Return the lines of the summary and the notes, with which every page of Markdown ends."""
    lines = [f"- {prose(line)}" for line in summary]
    return [*lines, "", "Notes:", "", *(f"- {prose(note)}" for note in notes)] if notes else lines


def page(lines: Sequence[str]) -> bytes:
    """Return the lines as a file."""
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def _code(text: str) -> str:
    if not text:
        return ""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text or text != text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"


def _prose(word: str) -> str:
    return code(word) if _LINKED.search(word) else _MARKUP.sub(r"\\\g<0>", word)
