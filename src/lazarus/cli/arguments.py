"""The parameters of the commands: models, prompts and outputs, and each option of a record.

An option is described in `lazarus.options`; here it becomes one of typer's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer

from lazarus.options import Options
from lazarus.options.option import RUN, Described, described

SHOW = "What it shows"


def _option(*names: str, panel: str | None = None, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **settings)


def as_option(found: Described, **settings: Any) -> Any:
    """Return an option as typer's, with its help."""
    option = found.option
    told = {"metavar": option.metavar, "help": option.help, "panel": option.panel}
    shown = {} if option.shown_default is None else {"show_default": option.shown_default}
    return _option(found.flag, **{**told, **shown, **settings})


def _typed(kind: Any) -> Any:
    """Return a type as typer takes it: what is neither a number nor a switch is text."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    plain = next((member for member in members if member in (bool, int, float)), str)
    plain = plain if set(members) <= {plain, type(None)} else str
    return plain | None if type(None) in members else plain


def takes(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a record, each in the place of `**options`."""

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [found for found in signature.parameters.values() if found.kind is not found.VAR_KEYWORD]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=found.default,
                annotation=Annotated[_typed(found.type), as_option(found)],
            )
            for name, found in described(kind).items()
        ]
        first = [found for found in own if found.kind is not found.KEYWORD_ONLY]
        last = own[len(first) :]
        # typer reads a command's parameters from its signature.
        setattr(command, "__signature__", signature.replace(parameters=[*first, *added, *last]))  # noqa: B010
        return command

    return with_options


Base = Annotated[
    str,
    _option(
        "-b", "--base", metavar="MODEL", help="Base model: Hub id, folder, .gguf, MODEL+ADAPTER, recording."
    ),
]
Finetuned = Annotated[
    str,
    _option(
        "-f",
        "--finetuned",
        metavar="MODEL",
        help="Fine-tuned model, or its recording; an adapter alone runs on top of BASE.",
    ),
]
Members = Annotated[
    list[str],
    _option(
        "-f",
        "--finetuned",
        metavar="MODEL",
        help='A model of the series, or several: "run/checkpoint-*" in natural order, '
        '"org/model@{step1000,step2000}". Repeatable.',
    ),
]
Prompts = Annotated[
    list[str],
    _option(
        "-p",
        "--prompts",
        metavar="PROMPTS",
        help='Prompts: "one,two,three", @FILE (.txt, .jsonl, .json, .csv, .tsv, .parquet) or @- for standard '
        "input. Repeatable.",
    ),
]
PromptsOrRecorded = Annotated[
    list[str] | None,
    _option(
        "-p",
        "--prompts",
        metavar="PROMPTS",
        help='Prompts: "one,two,three", @FILE (.txt, .jsonl, .json, .csv, .tsv, .parquet) or @- for standard '
        "input. Repeatable. Required, unless a recording brings them.",
    ),
]
Outputs = Annotated[
    list[str] | None,
    _option(
        "-o",
        "--output",
        metavar="FILE",
        help="Save the results; the suffix names the format (.json, .csv, .parquet, .md, .html, .png, "
        ".svg, .pdf; any other is JSON). Repeatable.",
    ),
]
Result = Annotated[str, typer.Argument(metavar="RESULT.json", help="What a command saved with -o FILE.json.")]
Quiet = Annotated[bool, _option("-q", "--quiet", panel=SHOW, help="No progress bars, no logs.")]
Debug = Annotated[bool, _option("--debug", panel=SHOW, help="Tracebacks and logs.")]
Estimate = Annotated[
    bool,
    _option(
        "--estimate",
        panel=RUN,
        help="Print what the run would take here (memory, time, operations, bytes read), without loading "
        "weights, and do nothing else.",
    ),
]
Model1 = Annotated[
    str,
    _option(
        "-m1",
        "--model1",
        "-b",
        "--base",
        metavar="MODEL",
        help="First model: Hub id, folder, .gguf, MODEL+ADAPTER, recording.",
    ),
]
Model2 = Annotated[
    str,
    _option(
        "-m2",
        "--model2",
        "-f",
        "--finetuned",
        metavar="MODEL",
        help="Second model, or its recording; an adapter alone runs on top of MODEL1.",
    ),
]
OnePromptOrRecorded = Annotated[
    list[str] | None,
    _option(
        "-p",
        "--prompt",
        metavar="PROMPT",
        help="The prompt, its commas kept; or @FILE (.txt, .jsonl, .json, .csv, .tsv, .parquet) with one "
        "prompt in it, or @- for standard input. Required, unless a recording brings it.",
    ),
]

_OF_RUN = described(Options)
AnotherThreshold = Annotated[float | None, as_option(_OF_RUN["threshold"], show_default="that of the run")]
FailAbove = Annotated[float | None, as_option(_OF_RUN["fail_above"])]
Expect = Annotated[str | None, as_option(_OF_RUN["expect"])]
OnlyCompared = Annotated[bool, as_option(_OF_RUN["only_compared"])]
