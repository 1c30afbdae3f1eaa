"""compare."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from lazarus.cli import arguments as a
from lazarus.cli.app import introspect
from lazarus.cli.imports import heavy_imports
from lazarus.cli.output import check_outputs, save_all, shows_progress
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
        from lazarus.render.lens import text

        make_compare_options(**options)
        files = [value[1:] for value in prompt if value[:1] == "@" and value[:2] != "@@"]
        check_outputs(output or [], "compare", [*files, chat_template, model1, model2])
        text_of_prompt = _one(prompt)
        with heavy_imports():
            show = shows_progress(quiet, debug)
            from lazarus.console import LensObserver
            from lazarus.lens import compare as run

        with LensObserver(show=show) as observer:
            comparison = run(model1, model2, text_of_prompt, observer=observer, **options)
        typer.echo(f"\n{text.body(comparison.record)}")
        save_all(comparison, output or [])


def _one(values: Sequence[str]) -> str:
    """The text of the one prompt that was given.

    Raises:
        PromptsError: there is none, or more than one, or it is a chat.
    """
    from lazarus.errors import PromptsError
    from lazarus.prompts import parse_prompts

    prompts = parse_prompts(values, no_split=True).prompts
    if len(prompts) > 1:
        raise PromptsError(
            f"-p: {len(prompts)} prompts are given, and compare takes one. Give one -p, or a file with one "
            "prompt in it."
        )
    if prompts[0].messages:
        raise PromptsError(
            "-p: this prompt is a chat (`messages`), and compare takes a text. Give the text of its last "
            "turn, and --chat-template to make it a user's."
        )
    return prompts[0].text
