"""Parts of a checkpoint besides what was compared, and what a verdict may claim because of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta

from lazarus.notes import Notes
from lazarus.results.rows import Record

BROKEN = "weights that hold NaN or infinity"
"""what a kernel makes of them is chance: they count as not compared"""
SETTING = "setting "
"""What the name of a setting in which the two differ begins with."""
MOST_TOLD = 8
"""how many parts or settings a note names"""


class NotCompared(Record, frozen=True, kw_only=True):
    """A part of a checkpoint, or a setting of it, that took no part in the comparison."""

    what: Annotated[str, Meta(description="such as `score head (score)` or `setting rms_norm_eps`")]
    n_tensors: Annotated[
        int, Meta(ge=0, description="stored tensors of it in this checkpoint; 0 for a setting")
    ]
    differs: Annotated[
        bool | None, Meta(description="whether the two models differ in it; null where that is not known")
    ]


class ReadFile(Record, frozen=True, kw_only=True):
    """A file that a model was read from."""

    name: Annotated[
        str, Meta(description="its path in the model's folder; in an adapter's, from that folder's name on")
    ]
    bytes: Annotated[int, Meta(ge=0, description="its size")]
    sha256: Annotated[
        str | None,
        Meta(description="the SHA-256 of its bytes; null with no_digests, and where it has changed"),
    ]


def differing(*sides: Sequence[NotCompared]) -> list[NotCompared]:
    """Return the parts in which the two models differ, or may differ, each once."""
    found = {part.what: part for parts in sides for part in parts if part.differs is not False}
    return list(found.values())


def told(parts: Sequence[NotCompared]) -> str:
    """Return the parts as the end of a sentence: `the score head (score) differs`."""
    known = [part.what for part in parts if part.differs]
    unknown = [part.what for part in parts if part.differs is None]
    clauses = []
    if known:
        clauses.append(f"{_listed(known)} {'differs' if len(known) == 1 else 'differ'}")
    if unknown:
        clauses.append(f"of {_listed(unknown)} it is not known")
    return ", and ".join(clauses)


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def note_outside(base: Sequence[NotCompared], finetuned: Sequence[NotCompared], notes: Notes) -> None:
    """Note what was not compared, and the settings in which the configurations differ."""
    ours, theirs = ({part.what: part for part in parts} for parts in (base, finetuned))
    parts, settings = [], []
    for what, part in (ours | theirs).items():
        if what.startswith(SETTING):
            settings += [what.removeprefix(SETTING)] if part.differs else []
            continue
        where = (
            ""
            if what in ours and what in theirs
            else f"only {'base' if what in ours else 'fine-tuned'} has it"
        )
        known = {True: "differs", False: "the same in both", None: "not known whether it differs"}[
            part.differs
        ]
        parts.append(f"{what}: {where or known}")
    if parts:
        notes.add("not-compared", f"not compared: {'; '.join(parts[:MOST_TOLD])}{_more(parts)}")
    if settings:
        told = f"settings that differ: {'; '.join(settings[:MOST_TOLD])}{_more(settings)}"
        notes.add("settings-differ", told)


def _more(items: Sequence[str]) -> str:
    return f"; and {len(items) - MOST_TOLD} more (not_compared in JSON)" if len(items) > MOST_TOLD else ""
