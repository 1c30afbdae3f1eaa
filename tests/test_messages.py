"""Messages name options as Python does; the command line, and nothing else, names them as they are typed."""

from __future__ import annotations

import ast
import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import given, strategies
from typer.testing import CliRunner

import lazarus
from lazarus.cli import app
from lazarus.errors import LazarusError, PromptTooLongError, UsageError
from lazarus.messages import CAUSE, END, START, in_flags, option
from lazarus.notes import Note, Notes
from lazarus.options import CompareOptions, Options, RecordOptions, SeriesOptions, WeightOptions
from lazarus.options.option import described

SOURCE = Path(lazarus.__file__).parent
KINDS = (Options, WeightOptions, RecordOptions, SeriesOptions, CompareOptions)
MODELS = ("base", "finetuned")
"""keywords of the library that are flags of the command line as well, and no options of a record"""
NAMES = sorted({name for kind in KINDS for name in described(kind)})
FLAGS = {found.flag for kind in KINDS for found in described(kind).values()} | {"--debug"}


@pytest.mark.parametrize(
    ("marked", "in_python", "typed"),
    [
        (option("localize"), "`localize`", "--localize"),
        (option("no_split", True), "`no_split=True`", "--no-split"),
        (option("dtype", "float32"), '`dtype="float32"`', "--dtype float32"),
        (option("fail_above", 0.5), "`fail_above=0.5`", "--fail-above 0.5"),
        (option("fail_above", 1.0, "g"), "`fail_above=1`", "--fail-above 1"),
        (option("top_k", -3), "`top_k=-3`", "--top-k -3"),
        (option("expect", None), "`expect=None`", "--expect None"),
        (option("work_dir", Path("a b/c")), '`work_dir="a b/c"`', "--work-dir a b/c"),
        (option("device", ""), '`device=""`', "--device "),
        (option(CAUSE), "`__cause__`", "--debug"),
    ],
)
def test_an_option_is_spelled_for_whoever_reads_it(marked: str, in_python: str, typed: str) -> None:
    error = UsageError(f"Use {marked}.", option="x")
    assert str(error) == f"Use {in_python}."
    assert in_flags(error.marked) == f"Use {typed}."
    assert in_flags(str(error)) == str(error), "what is not marked is not ours"


@given(strategies.text(strategies.characters(exclude_characters=START + END)))
def test_any_value_is_printed_as_it_was_typed(value: str) -> None:
    assert in_flags(f"{option('track', value)}: {option('dtype')}") == f"--track {value}: --dtype"


def test_an_error_keeps_its_option_where_it_goes() -> None:
    error = UsageError(f"{option('dtype', 'int8')}: not a choice", option="dtype")
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(again), again.marked, again.option) == (str(error), error.marked, "dtype")
    assert LazarusError("no model").option is None


def test_a_note_has_flags_and_no_mark_however_it_comes_in() -> None:
    marked = Note("not-finite", f"run with {option('dtype', 'float32')}", "base", (1,))
    spelled = Note("not-finite", "run with --dtype float32", "base", (1,))
    added = Notes()
    added.add("not-finite", marked.text, model="base", layers=[1])
    added.extend([marked])
    assert list(added) == list(Notes([marked])) == [spelled]


WRONG: dict[str, Any] = {
    "position": "middle",
    "threshold": 3.0,
    "align": "words",
    "readout": "first",
    "token_prompts": "x",
    "fail_above": -1.0,
    "expect": "equal",
    "dtype": "int8",
    "device": "tpu",
    "batch_tokens": 0,
    "memory": "disk",
    "layers_path": "",
    "work_dir": "",
    "top_k": 0,
    "track": "",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_is_refused_is_told_with_its_option(name: str) -> None:
    kind = CompareOptions if name in ("top_k", "track") else Options
    with pytest.raises(UsageError) as refused:
        kind.make(**{name: WRONG[name]})
    assert refused.value.option == name
    assert f"`{name}" in str(refused.value)
    assert "--" not in str(refused.value)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(UsageError, match="unknown option 'colour'") as refused:
        Options.make(colour="red")
    assert refused.value.option == "colour"


def test_a_prompt_that_names_an_option_is_printed_as_it_is(base_folder: Path) -> None:
    """Backticks of a user's text are no option of ours."""
    text = "`dtype` " + "and so on " * 60
    with pytest.raises(PromptTooLongError, match=r"'`dtype` and.*`truncate=True`") as refused:
        lazarus.activation_diff(base_folder, base_folder, [text])
    assert refused.value.option == "truncate"
    command = ["introspect", "activation-diff", "-b", str(base_folder), "-f", str(base_folder), "-p", text]
    printed = CliRunner().invoke(app, command).stderr
    assert "('`dtype` and" in printed
    assert printed.endswith("or cut it there with --truncate.\n")


# --- What the source says


def literals(tree: ast.Module) -> Iterator[ast.Constant]:
    """The texts of a module but docstrings and the help of options."""
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            called = f".{ast.unparse(call.func)}"
            if called.endswith((".Option", ".add_argument")):
                left_out |= {id(node) for node in ast.walk(call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node


def test_no_message_of_the_library_names_a_flag() -> None:
    found = {
        f"{path.relative_to(SOURCE)}, line {node.lineno}: {flag}"
        for path in SOURCE.rglob("*.py")
        if path.relative_to(SOURCE).parts[0] not in ("cli", "render")
        for node in literals(ast.parse(path.read_text(encoding="utf-8")))
        for flag in re.findall(r"--[a-z][a-z-]*", str(node.value))
        if flag in FLAGS
    }
    # The function that spells them has one of its own.
    assert {place for place in found if not place.startswith("messages.py")} == set()


def calls(match: Callable[[ast.Call], bool]) -> Iterator[tuple[Path, ast.Call]]:
    """The calls in the source that are such."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and match(node):
                yield path, node


def _options_in(node: ast.AST) -> list[ast.Call]:
    found = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
    return [call for call in found if ast.unparse(call.func) == "option"]


def test_an_error_whose_message_names_an_option_carries_one() -> None:
    for path, error in calls(lambda call: ast.unparse(call.func).endswith("Error")):
        named = [call for arg in error.args for call in _options_in(arg) if "CAUSE" not in ast.unparse(call)]
        if named:
            carried = [keyword for keyword in error.keywords if keyword.arg == "option"]
            assert carried, f"{path}, line {error.lineno}: which option is it about?"


def test_every_option_that_a_message_names_is_one() -> None:
    for path, call in calls(lambda call: ast.unparse(call.func) == "option"):
        name = call.args[0]
        if isinstance(name, ast.Constant):
            assert name.value in {*NAMES, *MODELS}, f"{path}, line {call.lineno}"


def test_the_flags_are_those_of_the_command_line() -> None:
    command: Any = typer.main.get_command(app)
    introspect = command.commands["introspect"].commands
    typed = {name for each in introspect.values() for found in each.params for name in found.opts}
    assert typed >= FLAGS
