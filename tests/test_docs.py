"""The documentation is true: the reference is generated, every number is explained, the map matches.

That its examples run is in tests/test_site.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer.main

import lazarus
from lazarus.cli import app
from lazarus.commands import commands
from lazarus.errors import UsageError
from lazarus.options import (
    CompareArguments,
    CompareOptions,
    OptionArguments,
    Options,
    WeightArguments,
    WeightOptions,
)
from lazarus.options.option import described
from lazarus.results import METRICS, WEIGHT_METRICS, Output, Readout
from lazarus.statistics import FACTOR

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_reference_of_options_is_what_the_command_takes(golden: Callable[[str, str], None]) -> None:
    golden("../../docs/reference.md", reference())


def reference() -> str:
    """Every command and option, from the command line's own definition."""
    root = typer.main.get_command(app)
    lines = [
        "# Reference of the command line",
        "",
        "Written by `make docs-reference` from the program itself.",
    ]
    for path, command in sorted(_commands("lazarus", root)):
        lines += ["", f"## `{path}`", "", (command.help or "").strip().split("\n")[0], ""]
        lines += ["| Option | Meaning | Default |", "|---|---|---|"]
        lines += [_row(parameter) for parameter in command.params]
    lines += ["", "## Metrics"]
    for number, found in enumerate(commands().values()):
        lines += ["", f"### Of {found.name}"] if number else []
        lines += ["", "| Name | Formula | Range | What it is |", "|---|---|---|---|"]
        metrics = found.load("metrics").values()
        cells = [[m.name, m.formula, m.range, m.source] for m in metrics]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
        lines += [f"| `{name}` | {' | '.join(told)} |" for name, *told in cells]
    return "\n".join(lines) + "\n"


def _commands(path: str, command: Any) -> list[tuple[str, Any]]:
    children = getattr(command, "commands", {}).items()
    below = [found for name, child in children for found in _commands(f"{path} {name}", child)]
    return [(path, command), *below] if command.params else below


def _row(parameter: Any) -> str:
    names = ", ".join(getattr(parameter, "opts", []))
    metavar = getattr(parameter, "metavar", None) or ""
    default = getattr(parameter, "show_default", None)
    if not isinstance(default, str):
        value = getattr(parameter, "default", None)
        required = getattr(parameter, "required", False)
        default = "required" if required else "off" if value is False else "" if value is None else str(value)
    cells = (f"`{names} {metavar}".strip() + "`", getattr(parameter, "help", None) or "", default)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@pytest.mark.parametrize(
    ("arguments", "options"),
    [(OptionArguments, Options), (WeightArguments, WeightOptions), (CompareArguments, CompareOptions)],
)
def test_the_arguments_and_the_options_record_are_the_same(arguments: Any, options: Any) -> None:
    assert get_type_hints(arguments) == get_type_hints(options)


@pytest.mark.parametrize(
    ("page", "names"),
    [("weights.md", [*WEIGHT_METRICS]), ("lens.md", ["emerges", "rank", "KL", "JS"])],
)
def test_every_number_of_the_siblings_is_explained(page: str, names: list[str]) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert [name for name in names if name not in text] == []


def test_all_is_the_namespace() -> None:
    assert sorted(lazarus.__all__) == sorted(
        name for name in dir(lazarus) if getattr(lazarus, name) is not None
    )


HOW_TO_READ = (ROOT / "docs" / "how-to-read-it.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*METRICS, *Output.__struct_fields__, *Readout.__struct_fields__])
def test_every_number_is_explained(name: str) -> None:
    """By its name in JSON, or by what it is called after a dot."""
    spellings = {name, name.removeprefix("local_"), name.replace("base_", "*_").replace("finetuned_", "*_")}
    assert any(spelling in HOW_TO_READ for spelling in spellings)


def test_the_factor_of_the_noise_floor_is_the_one_in_the_page() -> None:
    assert f"The floor** is {FACTOR:g} times the largest mean seen" in " ".join(HOW_TO_READ.split())


def test_the_map_of_the_house_is_true() -> None:
    """Every module stands in the README's map, and everything in the map stands in the source."""
    listed = set(re.findall(r"^      ?(\w+(?:\.py|/))", README, flags=re.MULTILINE))
    source = ROOT / "src" / "lazarus"
    there = {path.name for path in source.glob("*.py")} | {
        f"{path.parent.name}/" for path in source.glob("*/__init__.py")
    }
    assert listed == there - {"__init__.py", "__main__.py", "version.py"} | {"__init__.py"}


RECORDS = (Options, WeightOptions, CompareOptions)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in RECORDS for name in described(kind)])
def test_an_option_that_does_not_take_none_refuses_it(kind: Any, name: str) -> None:
    found = described(kind)[name]
    if type(None) in get_args(found.type):
        assert getattr(kind.make(**{name: None}), name) is None
    elif found.option.check is not None:
        with pytest.raises(UsageError, match=f"`{name}=None`: "):
            kind.make(**{name: None})


def test_an_unknown_option_is_named_before_a_wrong_value() -> None:
    with pytest.raises(UsageError, match=r"unknown option 'aa'"):
        Options.make(threshold=9, zz=1, aa=1)
