"""compare."""

from __future__ import annotations

import typer

from lazarus.cli import arguments as a
from lazarus.cli.app import introspect
from lazarus.cli.imports import heavy_imports
from lazarus.cli.output import check_outputs, leads, print_and_save, shows_progress
from lazarus.cli.reporting import reported


@introspect.command("compare")
def compare(
    context: typer.Context,
    model1: a.Model1,
    model2: a.Model2,
    prompt: a.OnePrompt,
    output: a.Outputs = None,
    top_k: a.TopK = 5,
    track: a.Track = None,
    chat_template: a.LensChatTemplate = "none",
    truncate: a.LensTruncate = False,
    dtype: a.Dtype = "auto",
    device: a.Device = "auto",
    layers_path: a.LayersPath = None,
    seed: a.Seed = 0,
    trust_remote_code: a.TrustRemoteCode = False,
    quiet: a.Quiet = False,
    debug: a.Debug = False,
) -> None:
    """Compare what two models are about to say, layer by layer.

    Reads the state after each block at the prompt's last token through the model's own final norm and head
    (the logit lens). Prints what each model ends with, and the layer at which tokens emerge: the first from
    which a token is the first choice at every later layer.

    Example:

    lazarus introspect compare -m1 org/base -m2 org/tuned -p "The answer is" --track 42 -o lens.html
    """
    from lazarus.options import CompareArguments

    options = {name: context.params[name] for name in CompareArguments.__annotations__}
    with reported(debug):
        from lazarus.options import make_compare_options
        from lazarus.prompts import check_chats, parse_prompts
        from lazarus.render.lens import text

        make_compare_options(**options)
        files = [value[1:] for value in prompt if value[:1] == "@" and value[:2] != "@@"]
        output = (output or []) if leads() else []
        check_outputs(output, "compare", [*files, chat_template, model1, model2])
        found = parse_prompts(prompt, no_split=True)
        check_chats(found.prompts, chat_template)
        with heavy_imports():
            show = shows_progress(quiet, debug)
            from lazarus.console import LensObserver
            from lazarus.lens import compare as run

        with LensObserver(show=show, prints=leads(), saves=bool(output)) as observer:
            comparison = run(model1, model2, found, observer=observer, **options)
        if leads():
            print_and_save(f"\n{text.body(comparison.record)}", comparison, output)
