"""The file itself, whichever command it is of: one page that asks nobody for anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lazarus.render.base import assets
from lazarus.render.base.script import in_script

if TYPE_CHECKING:
    from jinja2 import Environment

RENDER = Path(__file__).parent.parent


@dataclass(frozen=True)
class Kit:
    """The parts of one command's page, besides those that all pages have."""

    template: str
    """below `render/`; it extends `base/base.html`"""
    scripts: Sequence[str]
    """in their order; each is in `js/` beside the template, or else in `base/js/`"""
    has_plots: bool = True
    """whether the plotting library is in it, which is 1.5 MB"""


@dataclass(frozen=True)
class Answer:
    """A question, its answer in a word or two, and what it rests on."""

    question: str
    answer: str
    reason: str


def write_page(kit: Kit, context: Mapping[str, Any], data: object, stream: IO[bytes]) -> None:
    """Write a page: one file that needs no network, the same bytes for the same result.

    `context` has what base.html names (`record`, `command`, `names`, `verdict`, `headline`, `answers`,
    `notes`, `absent`, `provenance`, `metrics`) and what the template adds; `data` is the JSON that the
    scripts read.
    """
    from markupsafe import Markup

    folder = (RENDER / kit.template).parent
    code = {"script": assets.script(tuple(kit.scripts), folder)}
    if kit.has_plots:
        code["library"] = assets.plotly()
    page = (
        _environment()
        .get_template(kit.template)
        .render(
            {
                "library": "",
                **context,
                "csp": _policy(list(code.values())),
                "style": Markup(assets.style(folder)),
                "data": Markup(in_script(data)),
                **{name: Markup(text) for name, text in code.items()},
            }
        )
    )
    # Half a surrogate pair, which a prompt or a name may have, cannot be encoded.
    stream.write(page.encode("utf-8", "replace"))


def unsaid(lines: Sequence[str]) -> list[tuple[str, str]]:
    """The summary without the verdict, which is the headline: (what, what is said of it)."""
    kept = [line for line in lines if not line.startswith("Verdict: ")]
    parts = [line.partition(": ") for line in kept]
    return [
        (head, rest) if mark and ";" not in head else ("", line)
        for line, (head, mark, rest) in zip(kept, parts, strict=True)
    ]


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(RENDER),
        autoescape=True,
        # a name that is missing is an error, not an empty place in the page
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _policy(scripts: Sequence[str]) -> str:
    """Return the page's Content-Security-Policy: no request of any kind, and no script but these."""
    hashes = " ".join(assets.csp_hash(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
