"""The command line: parse, call, print, exit code. No formula and no formatting here."""

from __future__ import annotations

import errno
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazarus.errors import LazarusError
from lazarus.version import __version__

if TYPE_CHECKING:
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

_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

RUN, COMPARE, READ, SHOW = "How it runs", "What is compared", "How prompts are read", "What it shows"


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


def _option(*names: str, panel: str | None = None, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **settings)


Base = Annotated[
    str, _option("-b", "--base", metavar="MODEL", help="Base model: Hub id, folder, .gguf, MODEL+ADAPTER.")
]
Finetuned = Annotated[
    str,
    _option(
        "-f",
        "--finetuned",
        metavar="MODEL",
        help="Fine-tuned model; an adapter alone runs on top of BASE.",
    ),
]
Prompts = Annotated[
    list[str],
    _option(
        "-p",
        "--prompts",
        metavar="PROMPTS",
        help='Prompts: "one,two,three", @FILE (.txt, .jsonl, .csv, .parquet) or @- for standard input. '
        "Repeatable.",
    ),
]
Outputs = Annotated[
    list[str] | None,
    _option(
        "-o",
        "--output",
        metavar="FILE",
        help="Save the results; the suffix names the format (.json, .csv, .parquet, .md; any other is "
        "JSON). Repeatable.",
    ),
]
Position = Annotated[
    str,
    _option(
        panel=COMPARE,
        metavar="auto|last|mean|all|N",
        help="Which tokens are compared: the last one; the mean of the hidden states; every token, averaged "
        "within a prompt; or index N. auto is last for a causal model, mean for an encoder.",
    ),
]
Threshold = Annotated[float, _option(panel=COMPARE, metavar="X", help="The divergence that *** marks.")]
Align = Annotated[
    str,
    _option(
        panel=COMPARE,
        metavar="ids|text",
        help="The same token ids for both, refused where the tokenizers differ on these prompts; or each "
        "model reads the text with its own tokenizer, compared where the text ends.",
    ),
]
Localize = Annotated[
    bool,
    _option(
        "--localize",
        panel=COMPARE,
        help="Also measure what each block itself adds, apart from what it inherits.",
    ),
]
ReadoutLayers = Annotated[
    str | None,
    _option(
        "--readout",
        panel=COMPARE,
        metavar="auto|all|LAYERS",
        help="Read the mean difference at these layers (7,15,-1) as the tokens that it promotes and "
        "suppresses.",
        show_default="off",
    ),
]
NoNoiseFloor = Annotated[
    bool,
    _option("--no-noise-floor", panel=COMPARE, help="Leave out the measurement of the numerical noise."),
]
Expect = Annotated[
    str | None,
    _option(
        panel=COMPARE,
        metavar="identical|changed",
        help="Exit 3 where the two models are not that, beyond the noise.",
        show_default="off",
    ),
]
FailAbove = Annotated[
    float | None,
    _option(
        panel=COMPARE, metavar="X", help="Exit 3 where a layer's divergence is above X.", show_default="off"
    ),
]
ChatTemplate = Annotated[
    str,
    _option(
        panel=READ,
        metavar="none|base|finetuned|FILE",
        help="Wrap each prompt as a user turn, the same text for both models.",
    ),
]
NoSplit = Annotated[bool, _option("--no-split", panel=READ, help="Each -p is one prompt.")]
Truncate = Annotated[
    bool,
    _option("--truncate", panel=READ, help="Cut prompts at the models' context instead of refusing them."),
]
Dtype = Annotated[
    str,
    _option(
        panel=RUN,
        metavar="auto|float32|bfloat16|float16",
        help="What the models run in; auto is float32 on a CPU, the stored type on a GPU.",
    ),
]
Device = Annotated[str, _option(panel=RUN, metavar="auto|cpu|cuda[:N]|mps", help="Where the models run.")]
BatchTokens = Annotated[
    int | None, _option(panel=RUN, metavar="N", help="Tokens in one batch.", show_default="auto")
]
Memory = Annotated[
    str,
    _option(
        panel=RUN,
        metavar="auto|resident|stream",
        help="Both models in memory, or a block of each at a time, read from disk.",
    ),
]
LayersPath = Annotated[
    str | None,
    _option(
        panel=RUN,
        metavar="PATH",
        help="Where the blocks are, such as model.layers, when they cannot be found.",
        show_default="found",
    ),
]
Seed = Annotated[int, _option(panel=RUN, metavar="N", help="Of every random choice.")]
TrustRemoteCode = Annotated[
    bool, _option("--trust-remote-code", panel=RUN, help="Allow a model's own Python code.")
]
WorkDir = Annotated[
    str | None,
    _option(
        panel=RUN,
        metavar="DIR",
        help="Keep what is done in this folder, so that an interrupted run goes on where it was, and several "
        "processes share the work.",
        show_default="off",
    ),
]
Quiet = Annotated[bool, _option("-q", "--quiet", panel=SHOW, help="No progress bars, no logs.")]
Debug = Annotated[bool, _option("--debug", panel=SHOW, help="Tracebacks and logs.")]


@introspect.command("activation-diff")
def activation_diff(
    context: typer.Context,
    base: Base,
    finetuned: Finetuned,
    prompts: Prompts,
    output: Outputs = None,
    position: Position = "auto",
    threshold: Threshold = 0.1,
    align: Align = "ids",
    localize: Localize = False,
    readout: ReadoutLayers = None,
    no_noise_floor: NoNoiseFloor = False,
    fail_above: FailAbove = None,
    expect: Expect = None,
    chat_template: ChatTemplate = "none",
    no_split: NoSplit = False,
    truncate: Truncate = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_tokens: BatchTokens = None,
    memory: Memory = "auto",
    layers_path: LayersPath = None,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    work_dir: WorkDir = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare activation divergence between two models.

    Runs the same prompts through both and prints, for each layer, the cosine similarity of their hidden
    states. Layer i is the residual stream after block i; *** marks a divergence above the threshold.

    Example:

    lazarus introspect activation-diff -b org/base -f org/tuned -p "Hello,How are you" -o diff.json
    """
    from lazarus.options import OptionArguments

    options = {name: context.params[name] for name in OptionArguments.__annotations__}
    with _reported(debug):
        from lazarus.options import make_options
        from lazarus.prompts import check_chats, parse_prompts
        from lazarus.ranks import find_rank

        make_options(**options)
        output = (output or []) if find_rank().leads else []
        files = [value[1:] for value in prompts if value[:1] == "@" and value[:2] != "@@"]
        _check_outputs(output, [*files, chat_template, base, finetuned])
        found = parse_prompts(prompts, no_split=no_split)
        check_chats(found.prompts, chat_template)
        _compare(base, finetuned, found, output, _observer(quiet, debug), **options)


@app.command()
def demo(output: Outputs = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Run activation-diff on the pair of models that ships with the package, offline."""
    with _reported(debug):
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
    faults = []
    for path in outputs:  # one that cannot be written does not cost the user the others
        try:
            diff.save(path)
        except LazarusError as fault:
            faults.append(fault)
        else:
            typer.echo(text.saved(path))
    for other in faults[:-1]:
        typer.echo(f"Error: {other}", err=True)
    if faults:
        raise faults[-1]
    diff.check_gates()


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
    except OSError as error:
        if error.errno not in _DISK_FAULTS:
            raise
        typer.echo(
            f"Error: standard output cannot be written: {error.strerror}. Make room, or send it elsewhere.",
            err=True,
        )
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo("Interrupted.", err=True)
        raise typer.Exit(130) from error


def _unexpected(kind: type[BaseException], error: BaseException, _traceback: TracebackType | None) -> None:
    text = " ".join(str(error).split())
    sys.stderr.write(
        f"Error: unexpected {kind.__name__}: {text}. This is a fault of lazarus: run again with --debug "
        "and report what it prints.\n"
    )
