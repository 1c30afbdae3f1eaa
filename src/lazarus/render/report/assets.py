"""What every report is made of: the style, the scripts, the vendored library, and their hashes."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
VENDOR = HERE / "vendor"

SCRIPTS = (
    "data",
    "colours",
    "dom",
    "lazy",
    "curve",
    "local",
    "groups",
    "heatmap",
    "pager",
    "explorer",
    "prompts",
    "tokens",
    "main",
)


@cache
def template() -> str:
    """The page's Jinja template."""
    return _read(HERE / "template.html")


@cache
def style() -> str:
    """The style sheet."""
    return _read(HERE / "page.css")


@cache
def script() -> str:
    """The page's own scripts as one, in a scope of their own."""
    parts = [_read(HERE / "js" / f"{name}.js") for name in SCRIPTS]
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "})();\n"


@cache
def plotly() -> str:
    """The plotting library, as it was published."""
    return _read(VENDOR / json.loads(_read(VENDOR / "vendor.json"))["file"])


def csp_hash(text: str) -> str:
    """The source expression that lets a Content-Security-Policy run this script and no other.

    >>> csp_hash("")
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
    """
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
