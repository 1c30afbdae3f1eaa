"""The parts of every report: the style, the scripts, the vendored library, and their hashes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
VENDOR = HERE / "vendor"
PLOTLY = "plotly-cartesian.min.js"


@cache
def style(folder: Path = HERE) -> str:
    """The style sheet that all pages have, and after it what `folder` adds for its own page."""
    own = folder / "page.css"
    common = _read(HERE / "page.css")
    return common if folder == HERE or not own.is_file() else common + _read(own)


@cache
def script(names: Sequence[str], folder: Path) -> str:
    """A page's own scripts as one, in a scope of their own: those of `folder`, else the common ones here."""
    own = folder / "js"
    paths = [own if (own / f"{name}.js").is_file() else HERE / "js" for name in names]
    parts = [_read(path / f"{name}.js") for path, name in zip(paths, names, strict=True)]
    # In a scope of their own, so that no name of theirs meets one of the library's.
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "})();\n"


@cache
def plotly() -> str:
    """The plotting library, as it was published."""
    return _read(VENDOR / PLOTLY)


def csp_hash(text: str) -> str:
    """The source expression that lets a Content-Security-Policy run this script and no other.

    >>> csp_hash("")
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
    """
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
