"""record."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lazarus.cli import arguments as a
from lazarus.cli.app import introspect
from lazarus.cli.imports import heavy_imports
from lazarus.cli.output import leads, print_estimate, set_up_libraries
from lazarus.cli.reporting import reported
from lazarus.options import RecordOptions
from lazarus.render.base.escape import escaped
from lazarus.terminal import say

RecordedModel = Annotated[
    str, typer.Option("-m", "--model", metavar="MODEL", help="Model: Hub id, folder, .gguf, MODEL+ADAPTER.")
]
Folder = Annotated[
    str,
    typer.Option("-o", "--output", metavar="FOLDER", help="The folder of the recording; it is made."),
]


@introspect.command("record")
@a.takes(RecordOptions)
def record(
    model: RecordedModel,
    prompts: a.Prompts,
    output: Folder,
    *,
    estimate: a.Estimate = False,
    quiet: a.Quiet = False,
    debug: a.Debug = False,
    **options: Any,
) -> None:
    """Record a model's hidden states, to be compared without it.

    Runs the prompts and writes the state after each block to a folder, which takes the place of MODEL in
    activation-diff and compare: on another machine, in another version of the software, or years later.

    Example:

    lazarus introspect record -m org/model -p @prompts.txt -o recording
    """
    with reported(debug):
        from lazarus.prompts import check_chats, check_responses, parse_prompts
        from lazarus.recordings import make_folder

        # Made to be checked, before torch is imported.
        chosen = RecordOptions(**options).of_pair()
        if not estimate:
            make_folder(output, taken_up=chosen.work_dir is not None)
        responses = chosen.position == "response"
        found = parse_prompts(prompts, no_split=chosen.no_split, responses=responses)
        check_chats(found.prompts, chosen.chat_template)
        check_responses(found.prompts, chosen.position)
        with heavy_imports():
            show = set_up_libraries(quiet, debug)
            from lazarus.activation import estimate_record
            from lazarus.activation import record as run
            from lazarus.console import RecordObserver

        if estimate:
            print_estimate(partial(estimate_record, model, found, **options))
            return
        anonymous = options["anonymous"]
        with RecordObserver(show=show, prints=leads(), saves=True, anonymous=anonymous) as observer:
            recording = run(model, found, output, observer=observer, **options)
        if leads():
            say(f"\n{recording.summary()}\nRecording saved to: {escaped(str(Path(output)))}")
