"""Text that stays on its line, whatever is in it."""

from __future__ import annotations

import re
import unicodedata

PROMPT_CHARACTERS = 50


def escaped(text: str) -> str:
    r"""Return the text with control characters written out, so that it stays on its line.

    >>> escaped("a\tb\x1b[0m")
    'a\\tb\\x1b[0m'
    """
    return "".join(_escape(character) if _is_control(character) else character for character in text)


def code(text: str) -> str:
    r"""The text as code in Markdown, in a table too: a bar would end the cell, and a backtick the code.

    >>> print(code("org/base"), code("a`b|c"))
    `org/base` `` a`b\|c ``
    """
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text or text != text.strip() else ""
    return f"{fence}{space}{escaped(text)}{space}{fence}".replace("|", "\\|")


def _is_control(character: str) -> bool:
    # Cc: control; Cs: half a surrogate; Zl, Zp: line breaks; the bidirectional marks reorder a line.
    is_marked = unicodedata.bidirectional(character) in {
        "LRE",
        "RLE",
        "LRO",
        "RLO",
        "PDF",
        "LRI",
        "RLI",
        "FSI",
        "PDI",
    }
    return unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} or is_marked


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
