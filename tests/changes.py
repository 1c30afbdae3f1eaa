"""Print what the changelog tells of a release: `python tests/changes.py v0.1.0`.

It ends with an error where the tag is not the version of the code, or where the changelog's first section is
not that version's with its date. Only Python's own library is needed.
"""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECTION = re.compile(
    r"^## (?P<name>\S+)(?: \((?P<date>[^)]*)\))?\n(?P<text>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL
)


def version(root: Path = ROOT) -> str:
    """Return the version of the code."""
    text = (root / "src" / "lazarus" / "version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)
    assert found is not None
    return found.group(1)


def sections(root: Path = ROOT) -> list[tuple[str, str | None, str]]:
    """Return the name, the date and the text of each section of the changelog, the newest first."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    return [(found["name"], found["date"], found["text"].strip()) for found in SECTION.finditer(text)]


def changes(tag: str, root: Path = ROOT) -> str:
    """Return what has changed with the release of this tag.

    Raises:
        ValueError: the tag is not the version, or the changelog does not begin with it and a date.
    """
    if tag != f"v{version(root)}":
        raise ValueError(
            f"the tag is {tag}, and version.py has {version(root)}: tag v{version(root)}, or change it"
        )
    name, date, text = sections(root)[0]
    if name != version(root) or date is None:
        told = f"it begins with {name!r}"
        raise ValueError(f"CHANGELOG.md has no section `## {version(root)} (YEAR-MONTH-DAY)` on top: {told}")
    datetime.date.fromisoformat(date)
    return text


if __name__ == "__main__":
    sys.stdout.write(changes(sys.argv[1]) + "\n")
