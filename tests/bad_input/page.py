"""docs/errors.md, from the kinds and what comes of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from bad_input.kind import BadInput
from bad_input.outcome import Outcome

BAR = "\\|"

INTRODUCTION = """\
# Errors

When something is wrong, Lazarus says so once, in one line on standard error: what was wrong, where, with
which values, and what to do about it. (An option that is missing or misspelt is told with a line of usage.)
There is no traceback; `--debug` shows it. Standard output carries results and nothing else.

Where memory runs out, on a CPU as on a GPU, the message names the options with which less of it is needed.
What another library raises is told as a fault of the model or of its files. What Lazarus itself gets wrong is
told as its own fault (`This is a fault of lazarus`): the message names a file with the traceback, to be
reported.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | the run failed: a model, a prompt that does not fit it, the disk on the way |
| 2 | the command line is wrong, prompts or a saved result cannot be read, or an output cannot be written |
| 3 | a gate (`--fail-above`, `--expect`) was not met; the results are saved first |
| 130 | interrupted (Ctrl-C) |
| 143, 129 | ended by SIGTERM or SIGHUP; nothing is left behind, as after Ctrl-C |

Options, prompts and outputs are checked before a model is loaded. A failed run leaves no file behind, and an
older file at the path of an output stays as it was.

Below is every mistake that the tests make, with what the command says to it. In all of them `base` and
`finetuned` are models in the current folder, `damaged` is a copy of `base` with one thing broken, and the
rest of the command line is right:

    lazarus introspect activation-diff -b base -f finetuned -p Hello -o diff.json

What is said of models, adapters, tokenizers and outputs holds for `weight-diff` and `compare` as well; their
own mistakes are in the last two tables. What is said where the Hub refuses, limits or fails is on
[its own page](hub.md).

This page is written by `make docs-reference` from the tests (`tests/bad_input`), which run every line of it.
"""


def page(subjects: Mapping[str, Sequence[BadInput]], outcome_of: Callable[[BadInput], Outcome]) -> str:
    """The whole page, a table a subject."""
    tables = [_table(subject, kinds, outcome_of) for subject, kinds in subjects.items()]
    return "\n".join([INTRODUCTION, *tables])


def _table(subject: str, kinds: Sequence[BadInput], outcome_of: Callable[[BadInput], Outcome]) -> str:
    lines = [f"## {subject}", "", "| what you did | exit | what it says |", "|---|---|---|"]
    for kind in kinds:
        outcome = outcome_of(kind)
        cells = (kind.did, str(outcome.exit_code), _abridged(outcome.message))
        lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    return "\n".join([*lines, ""])


def _abridged(message: str) -> str:
    """Without the digits that depend on the machine, and without a hundred times the same letter."""
    message = re.sub(r"(\d\.\d\d)\d+", r"\1…", message)
    message = re.sub(r"[\d,.]+ times the noise", "… times the noise", message)
    return re.sub(r"(\w)\1{20,}", r"\1\1\1…", message)
