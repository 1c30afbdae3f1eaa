"""Text that stays on its line, whatever is in it."""

from __future__ import annotations

import re

PROMPT_CHARACTERS = 50

_CONTROL = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # what a terminal obeys
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that reorder a line
    "\u2028\u2029"  # line breaks
    "\ud800-\udfff"  # half a surrogate pair
    # Unseen: zero widths, fillers, tags, and selectors, which hide a text in another. The joiners of Persian
    # and emoji, and the two selectors of emoji, stay.
    "\xad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u2060-\u2065\u206a-\u206f\u3164\ufe00-\ufe0d\ufeff\uffa0"
    "\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    "]"
)


def escaped(text: str) -> str:
    r"""Return the text with control characters and unseen ones written out, so that it stays on its line.

    >>> escaped("a\tb\x1b[0m")
    'a\\tb\\x1b[0m'
    """
    if text.isascii() and text.isprintable():
        return text
    return _CONTROL.sub(_escape, text)


def legible(text: str) -> str:
    r"""Return text of several lines in which nothing else is obeyed by a terminal.

    >>> legible("one\ntwo\r\x1b[2J")
    'one\ntwo\\r\\x1b[2J'
    """
    return "\n".join(map(escaped, text.split("\n")))


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
