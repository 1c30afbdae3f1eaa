"""The commands that save results: what each is made of. Whatever lists commands reads it from here.

A new command is a package, a folder of renderers, and one call of `register`. What it names is imported
when it is used, so that this module costs nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """One command; its parts as `module:name`."""

    name: str
    """as it is typed, and as it stands in what it saves"""
    record: str
    """what it saves: a msgspec struct with `schema_version`, `command`, `tool`, `notes` and `note_codes`"""
    result: str
    """the result class, which holds the record"""
    view: str
    """the package of its renderers: `table` (columns, KINDS, write_markdown), `page` (write_html), `figure`
    (write_figure), `recipe` (write_recipe), `vectors` (write_vectors), each a module or an attribute of the
    package; a format that has none is not written"""
    metrics: str
    """its glossary, a mapping of names to `Metric`"""
    cli: str
    """the module that hangs it on the command line"""

    def load(self, part: str) -> Any:
        """Import one of its parts by the name of the field."""
        module, _, name = getattr(self, part).partition(":")
        found = importlib.import_module(module)
        return getattr(found, name) if name else found

    def renderer(self, name: str) -> Any:
        """Return one of its renderers; None where there is none of this name."""
        view = self.load("view")
        if hasattr(view, name):
            return getattr(view, name)
        module = f"{self.view}.{name}"
        is_there = hasattr(view, "__path__") and importlib.util.find_spec(module)
        return importlib.import_module(module) if is_there else None


_COMMANDS: dict[str, Command] = {}


def register(command: Command) -> None:
    """Make a command known to show, schema, `-o`, load_result, the command line and the docs."""
    _COMMANDS[command.name] = command


def commands() -> Mapping[str, Command]:
    """Return all commands by their names, in the order in which they were registered."""
    return _COMMANDS


register(
    Command(
        name="activation-diff",
        record="lazarus.results:ActivationDiffRecord",
        result="lazarus.result_classes:ActivationDiff",
        view="lazarus.render.activation",
        metrics="lazarus.results:METRICS",
        cli="lazarus.cli.activation",
    )
)
register(
    Command(
        name="weight-diff",
        record="lazarus.results:WeightDiffRecord",
        result="lazarus.result_classes:WeightDiff",
        view="lazarus.render.weights",
        metrics="lazarus.results:WEIGHT_METRICS",
        cli="lazarus.cli.weights",
    )
)
register(
    Command(
        name="compare",
        record="lazarus.results:CompareRecord",
        result="lazarus.result_classes:Comparison",
        view="lazarus.render.lens",
        metrics="lazarus.results:LENS_METRICS",
        cli="lazarus.cli.lens",
    )
)
register(
    Command(
        name="series",
        record="lazarus.results:SeriesRecord",
        result="lazarus.result_classes:Series",
        view="lazarus.render.series",
        metrics="lazarus.results:SERIES_METRICS",
        cli="lazarus.cli.series",
    )
)
