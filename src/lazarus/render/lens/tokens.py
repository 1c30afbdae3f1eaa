"""Tokens and prompts as text in which every space is seen."""

from __future__ import annotations

import unicodedata

from lazarus.render.base.escape import escaped

EMPTY = "(empty)"
MOST_CHARACTERS = 1000
HEAD, TAIL = 700, 300
"""of a longer prompt: its end is what the lens reads at"""


def shown(token: str) -> str:
    r"""The token with control characters written out, and with its spaces where nothing else would be seen.

    >>> shown(" Paris"), shown("  "), shown("\n"), shown("\u200b"), shown("")
    (' Paris', '␣␣', '\\n', '\\u200b', '(empty)')
    """
    if not token:
        return EMPTY
    if not all(map(_is_unseen, token)):
        return escaped(token)
    return "".join("␣" if character == " " else _written_out(character) for character in token)


def quoted(text: str) -> str:
    r"""The text between quotation marks, chosen as Python chooses them; control characters written out.

    >>> print(quoted("The answer is"), quoted("it's\n"))
    'The answer is' "it's\n"
    """
    mark = '"' if "'" in text and '"' not in text else "'"
    return f"{mark}{escaped(text)}{mark}"


def quoted_token(token: str) -> str:
    r"""The token between quotation marks, in which its spaces are seen.

    >>> quoted_token(" Paris"), quoted_token(" "), quoted_token("\u200b")
    ("' Paris'", "' '", "'\\u200b'")
    """
    return quoted("".join(c if c == " " else _written_out(c) if _is_unseen(c) else c for c in token))


def shortened(prompt: str) -> str:
    """The prompt whole up to 1,000 characters; of a longer one the beginning and the end."""
    if len(prompt) <= MOST_CHARACTERS:
        return prompt
    left_out = len(prompt) - HEAD - TAIL
    return f"{prompt[:HEAD]} … {left_out:,} characters … {prompt[-TAIL:]}"


def _is_unseen(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) in {"Cc", "Cf"}


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
