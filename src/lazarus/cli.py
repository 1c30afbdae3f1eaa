"""The command line: parse, call, print, exit code. No formula and no formatting here."""

from __future__ import annotations

import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazarus.errors import LazarusError
from lazarus.version import __version__

if TYPE_CHECKING:
    from lazarus.console import ConsoleObserver
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

RUN, COMPARE, PROMPTS, OUTPUT = "How it runs", "What is compared", "How prompts are read", "Output"


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


Outputs = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Save the results; the suffix names the format (.json, .csv, .parquet, .md; any other is "
        "JSON). Repeatable.",
    ),
]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="No progress bars, no logs.", rich_help_panel=OUTPUT)
]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks and logs.", rich_help_panel=OUTPUT)]


@introspect.command("activation-diff")
def activation_diff(
    base: Annotated[
        str,
        typer.Option(
            "-b",
            "--base",
            metavar="MODEL",
            help="Base model: Hub id, folder, .gguf, MODEL+ADAPTER.",
        ),
    ],
    finetuned: Annotated[
        str,
        typer.Option(
            "-f",
            "--finetuned",
            metavar="MODEL",
            help="Fine-tuned model; an adapter alone runs on top of BASE.",
        ),
    ],
    prompts: Annotated[
        list[str],
        typer.Option(
            "-p",
            "--prompts",
            metavar="PROMPTS",
            help='Prompts: "one,two,three", @FILE (.txt, .jsonl, .csv, .parquet) or @-. Repeatable.',
        ),
    ],
    output: Outputs = None,
    position: Annotated[
        str,
        typer.Option(
            metavar="auto|last|mean|all|N",
            help="Which tokens are compared; auto is last for a causal model, mean for an encoder.",
            rich_help_panel=COMPARE,
        ),
    ] = "auto",
    threshold: Annotated[
        float, typer.Option(help="The divergence that *** marks.", rich_help_panel=COMPARE)
    ] = 0.1,
    align: Annotated[
        str,
        typer.Option(metavar="ids", help="The same token ids for both models.", rich_help_panel=COMPARE),
    ] = "ids",
    fail_above: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Exit 3 where a layer's divergence is above X.",
            rich_help_panel=COMPARE,
        ),
    ] = None,
    chat_template: Annotated[
        str,
        typer.Option(
            metavar="none|base|finetuned|FILE",
            help="Wrap each prompt as a user turn, the same text for both models.",
            rich_help_panel=PROMPTS,
        ),
    ] = "none",
    no_split: Annotated[
        bool, typer.Option("--no-split", help="Each -p is one prompt.", rich_help_panel=PROMPTS)
    ] = False,
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate",
            help="Cut prompts at the models' context instead of refusing them.",
            rich_help_panel=PROMPTS,
        ),
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|float32|bfloat16|float16",
            help="What the models run in; auto is float32 on a CPU, the stored type on a GPU.",
            rich_help_panel=RUN,
        ),
    ] = "auto",
    device: Annotated[
        str,
        typer.Option(metavar="auto|cpu|cuda[:N]|mps", help="Where the models run.", rich_help_panel=RUN),
    ] = "auto",
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens in one batch.",
            show_default="auto",
            rich_help_panel=RUN,
        ),
    ] = None,
    memory: Annotated[
        str,
        typer.Option(metavar="auto|resident", help="Both models in memory.", rich_help_panel=RUN),
    ] = "auto",
    layers_path: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Where the blocks are, such as model.layers, when they cannot be found.",
            rich_help_panel=RUN,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.", rich_help_panel=RUN)] = 0,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Allow a model's own Python code.", rich_help_panel=RUN),
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare activation divergence between two models.

    Runs the same prompts through both and prints, for each layer, the cosine similarity of their hidden
    states. Layer i is the residual stream after block i; *** marks a divergence above the threshold.

    Example:

    lazarus introspect activation-diff -b org/base -f org/tuned -p "Hello,How are you" -o diff.json
    """
    with _reported(debug):
        from lazarus.prompts import parse_prompts

        files = [value[1:] for value in prompts if value[:1] == "@" and value[:2] != "@@"]
        _check_outputs(output or [], files)
        found = parse_prompts(prompts, no_split=no_split)
        _compare(
            base,
            finetuned,
            found,
            output or [],
            _observer(quiet, debug),
            position=position,
            threshold=threshold,
            align=align,
            fail_above=fail_above,
            chat_template=chat_template,
            no_split=no_split,
            truncate=truncate,
            dtype=dtype,
            device=device,
            batch_tokens=batch_tokens,
            memory=memory,
            layers_path=layers_path,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )


@app.command()
def demo(output: Outputs = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Run activation-diff on the pair of models that ships with the package, offline."""
    with _reported(debug):
        from lazarus.demo import BASE, FINETUNED, PROMPTS
        from lazarus.prompts import parse_prompts

        _check_outputs(output or [], [])
        found = parse_prompts([f"@{PROMPTS}"])
        _compare(str(BASE), str(FINETUNED), found, output or [], _observer(quiet, debug))


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
            sys.excepthook = _unexpected


def _compare(
    base: str,
    finetuned: str,
    found: PromptList,
    outputs: Sequence[str],
    observer: Any,
    **options: Any,
) -> None:
    """Check what can be checked, run, print, save, and then hold the gate."""
    from lazarus.options import make_options
    from lazarus.prompts import check_chats

    check_chats(found.prompts, make_options(**options).chat_template)
    from lazarus.activation import activation_diff as run
    from lazarus.render import text

    with observer:
        diff = run(base, finetuned, found, observer=observer, **options)
    typer.echo(f"\n{text.table(diff.record)}\n\n{text.summary(diff.record)}")
    for path in outputs:
        diff.save(path)
        typer.echo(text.saved(path))
    diff.check_gates()


def _check_outputs(outputs: Sequence[str], inputs: Sequence[str]) -> None:
    if outputs:
        from lazarus.render.save import check_outputs

        check_outputs(outputs, inputs)


def _observer(quiet: bool, debug: bool) -> ConsoleObserver:
    from lazarus.console import ConsoleObserver, quieten

    show = sys.stderr.isatty() and not quiet
    quieten(show_bars=show, show_logs=debug and not quiet)
    return ConsoleObserver(show=show)


@contextmanager
def _reported(debug: bool) -> Iterator[None]:
    """Every error that is meant becomes one message on standard error and its exit code."""
    if debug:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        sys.excepthook = sys.__excepthook__
    else:
        warnings.simplefilter("ignore")
    try:
        yield
    except LazarusError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        typer.echo("Interrupted.", err=True)
        raise typer.Exit(130) from error


def _unexpected(kind: type[BaseException], error: BaseException, _traceback: TracebackType | None) -> None:
    text = " ".join(str(error).split())
    sys.stderr.write(
        f"Error: unexpected {kind.__name__}: {text}. This is a fault of lazarus: run again with --debug "
        "and report what it prints.\n"
    )
