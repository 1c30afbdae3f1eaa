"""The commands: what each checks before anything is loaded, calls, prints and saves."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazarus.cli import arguments as a
from lazarus.cli.reporting import reported, unexpected
from lazarus.errors import LazarusError
from lazarus.version import __version__

if TYPE_CHECKING:
    from lazarus import ActivationDiff
    from lazarus.console import ConsoleObserver
    from lazarus.loading import Model
    from lazarus.prompts import PromptList

app = typer.Typer(
    name="lazarus",
    help="Compare two language models from the inside.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
introspect = typer.Typer(help="Look into a pair of models.", no_args_is_help=True)
app.add_typer(introspect, name="introspect")


class Command(StrEnum):
    """The commands that write JSON, each with a schema."""

    activation_diff = "activation-diff"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lazarus {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Compare two language models from the inside."""


@introspect.command("activation-diff")
def activation_diff(
    context: typer.Context,
    base: a.Base,
    finetuned: a.Finetuned,
    prompts: a.Prompts,
    output: a.Outputs = None,
    position: a.Position = "auto",
    threshold: a.Threshold = 0.1,
    align: a.Align = "ids",
    localize: a.Localize = False,
    readout: a.ReadoutLayers = None,
    token_prompts: a.TokenPrompts = "auto",
    no_noise_floor: a.NoNoiseFloor = False,
    fail_above: a.FailAbove = None,
    expect: a.Expect = None,
    chat_template: a.ChatTemplate = "none",
    no_split: a.NoSplit = False,
    truncate: a.Truncate = False,
    dtype: a.Dtype = "auto",
    device: a.Device = "auto",
    batch_tokens: a.BatchTokens = None,
    memory: a.Memory = "auto",
    layers_path: a.LayersPath = None,
    seed: a.Seed = 0,
    trust_remote_code: a.TrustRemoteCode = False,
    work_dir: a.WorkDir = None,
    quiet: a.Quiet = False,
    debug: a.Debug = False,
) -> None:
    """Compare activation divergence between two models.

    Runs the same prompts through both and prints, for each layer, the cosine similarity of their hidden
    states. Layer i is the residual stream after block i; *** marks a divergence above the threshold.

    Example:

    lazarus introspect activation-diff -b org/base -f org/tuned -p "Hello,How are you" -o diff.json
    """
    from lazarus.options import OptionArguments

    options = {name: context.params[name] for name in OptionArguments.__annotations__}
    with reported(debug):
        from lazarus.options import check_token_prompts, make_options
        from lazarus.prompts import check_chats, parse_prompts
        from lazarus.ranks import find_rank

        make_options(**options)
        output = (output or []) if find_rank().leads else []
        files = [value[1:] for value in prompts if value[:1] == "@" and value[:2] != "@@"]
        _check_outputs(output, [*files, chat_template, base, finetuned])
        found = parse_prompts(prompts, no_split=no_split)
        check_chats(found.prompts, chat_template)
        check_token_prompts(token_prompts, len(found.prompts))
        _compare(base, finetuned, found, output, _observer(quiet, debug), **options)


@app.command()
def demo(output: a.Outputs = None, quiet: a.Quiet = False, debug: a.Debug = False) -> None:
    """Run activation-diff on the pair of models that ships with the package, offline."""
    with reported(debug):
        from lazarus.demo import BASE, FINETUNED, PROMPTS
        from lazarus.prompts import parse_prompts

        _check_outputs(output or [], [])
        found = parse_prompts([f"@{PROMPTS}"])
        observer = _observer(quiet, debug)
        from lazarus.models import parse_model

        base, finetuned = (
            replace(parse_model(str(path)), name=f"demo/{path.name}") for path in (BASE, FINETUNED)
        )
        _compare(base, finetuned, found, output or [], observer)


@app.command()
def show(
    result: a.Result,
    output: a.Outputs = None,
    threshold: a.AnotherThreshold = None,
    fail_above: a.FailAbove = None,
    expect: a.Expect = None,
    debug: a.Debug = False,
) -> None:
    """Show a saved result again: print it, save it in other formats, hold it against gates.

    No model is loaded and nothing is measured anew.

    Example:

    lazarus show diff.json --threshold 0.05 -o report.html -o figure.pdf
    """
    with reported(debug):
        from lazarus.diff import ActivationDiff
        from lazarus.options import check_gates
        from lazarus.render import text

        check_gates(fail_above, expect)
        _check_outputs(output or [], [result])
        diff = ActivationDiff.load(Path(result).expanduser())
        if threshold is not None:
            diff = diff.with_threshold(threshold)
        typer.echo(text.page(diff.record))
        _save_all(diff, output or [])
        diff.check_gates(fail_above=fail_above, expect=expect)


@app.command()
def schema(
    command: Annotated[Command, typer.Argument(help="The command whose JSON it describes.")],
) -> None:
    """Print the JSON Schema of what a command saves."""
    from lazarus.results import json_schema

    assert command is Command.activation_diff
    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    finally:
        if sys.excepthook is not sys.__excepthook__:  # typer sets its own; --debug wants Python's
            sys.excepthook = unexpected


def _compare(
    base: Model,
    finetuned: Model,
    found: PromptList,
    outputs: Sequence[str],
    observer: Any,
    **options: Any,
) -> None:
    """Run, print, save, and then hold the gate; of several processes, the first does so for all."""
    from lazarus.activation import activation_diff as run
    from lazarus.ranks import find_rank
    from lazarus.render import text

    with observer:
        diff = run(base, finetuned, found, observer=observer, **options)
    if not find_rank().leads:
        return
    typer.echo(f"\n{text.table(diff.record)}\n\n{text.summary(diff.record)}")
    _save_all(diff, outputs)
    diff.check_gates(fail_above=options.get("fail_above"), expect=options.get("expect"))


def _save_all(diff: ActivationDiff, outputs: Sequence[str]) -> None:
    """Save what can be saved: an output that cannot be written does not cost the user the others."""
    from lazarus.render import text

    faults = []
    for path in outputs:
        try:
            files = diff.save(path)
        except LazarusError as fault:
            faults.append(fault)
        else:
            typer.echo("\n".join(map(text.saved, files)))
    for other in faults[:-1]:
        typer.echo(f"Error: {other}", err=True)
    if faults:
        raise faults[-1]


def _check_outputs(outputs: Sequence[str], inputs: Sequence[str]) -> None:
    if outputs:
        from lazarus.render.save import check_outputs

        check_outputs(outputs, inputs)


def _observer(quiet: bool, debug: bool) -> ConsoleObserver:
    from lazarus.console import ConsoleObserver, quieten
    from lazarus.ranks import find_rank

    leads = find_rank().leads
    show = sys.stderr.isatty() and not quiet and leads
    quieten(show_bars=show, show_logs=debug and not quiet)
    return ConsoleObserver(show=show, prints=leads)
