"""compare."""

from __future__ import annotations

from typing import Any

from lazarus.cli import arguments as a
from lazarus.cli.app import introspect
from lazarus.cli.imports import heavy_imports
from lazarus.cli.output import check_outputs, leads, print_and_save, set_up_libraries
from lazarus.cli.reporting import reported
from lazarus.options import CompareOptions


@introspect.command("compare")
@a.takes(CompareOptions)
def compare(
    model1: a.Model1,
    model2: a.Model2,
    prompt: a.OnePromptOrRecorded = None,
    output: a.Outputs = None,
    *,
    quiet: a.Quiet = False,
    debug: a.Debug = False,
    **options: Any,
) -> None:
    """Compare what two models are about to say, layer by layer.

    Reads the state after each block at the prompt's last token through the model's own final norm and head
    (the logit lens). Prints what each model ends with, and the layer at which tokens emerge: the first from
    which a token is the first choice at every later layer. The states of a recording are read through the
    norm and head of the other model.

    Example:

    lazarus introspect compare -m1 org/base -m2 org/tuned -p "The answer is" --track 42 -o lens.html
    """
    with reported(debug):
        from lazarus.prompts import check_chats, parse_prompts, prompt_files
        from lazarus.recordings import check_brought
        from lazarus.render.lens import text

        # Made to be checked, before torch is imported.
        CompareOptions(**options)
        check_brought(prompt, (model1, model2))
        files = prompt_files(prompt or ())
        output = (output or []) if leads() else []
        check_outputs(output, "compare", [*files, options["chat_template"], model1, model2])
        found = None
        if prompt is not None:
            found = parse_prompts(prompt, no_split=True, responses=options["at"] == "parting")
            check_chats(found.prompts, options["chat_template"])
        with heavy_imports():
            show = set_up_libraries(quiet, debug)
            from lazarus.console import LensObserver
            from lazarus.lens import compare as run

        anonymous = options["anonymous"]
        with LensObserver(show=show, prints=leads(), saves=bool(output), anonymous=anonymous) as observer:
            comparison = run(model1, model2, found, observer=observer, **options)
        if leads():
            print_and_save(f"\n{text.body(comparison.record)}", comparison, output)
