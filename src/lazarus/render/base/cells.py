"""Tables of a page as plain data: cells that carry their value at full precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lazarus.render.base.escape import escaped
from lazarus.results import ActivationDiffRecord, WeightDiffRecord

MISSING = "–"

Value = float | int | bool | str | None


@dataclass(frozen=True)
class Cell:
    """Text that is shown, and the value itself at full precision; empty where there is none."""

    shown: str
    value: str
    field: str = ""


@dataclass(frozen=True)
class Heading:
    """A column's heading, and what it means in a line."""

    text: str
    meaning: str = ""


@dataclass(frozen=True)
class Row:
    """A row: the cell that names it, and the others."""

    name: str
    cells: Sequence[Cell]
    flagged: bool = False


@dataclass(frozen=True)
class Table:
    """A table as the template draws it."""

    caption: str
    headings: Sequence[Heading]
    rows: Sequence[Row]
    left_out: Sequence[str] = field(default=())
    """headings of columns without a single value"""


def shown(value: Value, form: str = "") -> str:
    """A value as the glossary formats it; never 0 for what is not 0.

    >>> shown(0.25, ".4f"), shown(3e-9, ".4f"), shown(0.0, ".4f"), shown(None)
    ('0.2500', '3.0e-09', '0.0000', '–')
    """
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and form.endswith("f"):
        text = format(value, form)
        # A small change must not be shown as none.
        return format(value, ".1e") if value and not float(text) else text
    return format(value, form)


def cell(value: Value, form: str = "", name: str = "") -> Cell:
    """A cell of a table."""
    return Cell(shown(value, form), _exact(value), name)


def run_tables(record: Any, models: Mapping[str, Mapping[str, Any]], more: Mapping[str, Any]) -> list[Table]:
    """The models, every setting and the environment, with `more` of the run: all that repeats it."""
    first, *_ = models.values()
    compared = Table(
        caption="The two models",
        headings=[Heading("Model"), *map(Heading, models)],
        rows=[Row(_words(name), [plain(model[name]) for model in models.values()]) for name in first],
    )
    run = {
        "created": record.created,
        "tool": f"{record.tool.name} {record.tool.version}",
        "schema_version": record.schema_version,
        "command": record.command,
        **more,
    }
    settings = msgspec.structs.asdict(record.settings)
    environment = {**run, **msgspec.structs.asdict(record.environment)}
    return [compared, pairs("Settings", settings), pairs("Run and environment", environment)]


def base_and_finetuned(record: ActivationDiffRecord | WeightDiffRecord) -> dict[str, dict[str, Any]]:
    """The two models of a record, by what a page calls them."""
    return {
        "Base": msgspec.structs.asdict(record.base),
        "Fine-tuned": msgspec.structs.asdict(record.finetuned),
    }


def pairs(caption: str, fields: Mapping[str, Any]) -> Table:
    """A table of names and values."""
    rows = [Row(_words(name), [plain(value)]) for name, value in fields.items()]
    return Table(caption, [Heading("Name"), Heading("Value")], rows)


def plain(value: Any) -> Cell:
    """A cell of a text or a value that needs no format."""
    if isinstance(value, str):
        return Cell(escaped(value), value)
    return cell(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _exact(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)
