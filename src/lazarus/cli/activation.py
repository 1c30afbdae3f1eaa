"""activation-diff, and the same on the pair of models that ships."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lazarus.cli import arguments as a
from lazarus.cli.app import app, introspect
from lazarus.cli.imports import heavy_imports
from lazarus.cli.output import check_outputs, leads, print_and_save, print_estimate, set_up_libraries
from lazarus.cli.reporting import reported
from lazarus.options import Options

if TYPE_CHECKING:
    from lazarus.console import ConsoleObserver
    from lazarus.loading import Model
    from lazarus.prompts import PromptList


@introspect.command("activation-diff")
@a.takes(Options)
def activation_diff(
    base: a.Base,
    finetuned: a.Finetuned,
    prompts: a.PromptsOrRecorded = None,
    output: a.Outputs = None,
    *,
    estimate: a.Estimate = False,
    quiet: a.Quiet = False,
    debug: a.Debug = False,
    **options: Any,
) -> None:
    """Compare activation divergence between two models.

    Runs the same prompts through both and prints, for each layer, the cosine similarity of their hidden
    states. Layer i is the residual stream after block i; *** marks a divergence above the threshold.

    Example:

    lazarus introspect activation-diff -b org/base -f org/tuned -p "Hello,How are you" -o diff.json
    """
    with reported(debug):
        from lazarus.options import check_token_prompts
        from lazarus.prompts import check_chats, check_responses, parse_prompts, prompt_files
        from lazarus.recordings import check_brought

        # Made to be checked, before torch is imported.
        Options(**options)
        output = (output or []) if leads() else []
        check_brought(prompts, (base, finetuned))
        files = prompt_files(prompts or ())
        check_outputs(output, "activation-diff", [*files, options["chat_template"], base, finetuned])
        responses = options["position"] == "response"
        found = None
        if prompts is not None:
            found = parse_prompts(prompts, no_split=options["no_split"], responses=responses)
            check_chats(found.prompts, options["chat_template"])
            check_responses(found.prompts, options["position"])
            check_token_prompts(options["token_prompts"], len(found.prompts))
        observer = _observer(quiet, debug, saves=bool(output), anonymous=options["anonymous"])
        if estimate:
            from lazarus.activation import estimate_run

            print_estimate(partial(estimate_run, base, finetuned, found, **options))
        else:
            _compare(base, finetuned, found, output, observer, **options)


@app.command()
def demo(output: a.Outputs = None, quiet: a.Quiet = False, debug: a.Debug = False) -> None:
    """Run activation-diff on the pair of models that ships with the package, offline."""
    with reported(debug):
        from lazarus.demo import BASE, FINETUNED, PROMPTS
        from lazarus.prompts import parse_prompts

        check_outputs(output or [], "activation-diff", [])
        found = parse_prompts([f"@{PROMPTS}"])
        observer = _observer(quiet, debug, saves=bool(output))
        # After `_observer`, which imports torch the fast way.
        from lazarus.models import parse_model

        base, finetuned = (
            replace(parse_model(str(path)), name=f"demo/{path.name}") for path in (BASE, FINETUNED)
        )
        _compare(base, finetuned, found, output or [], observer)


def _compare(
    base: Model,
    finetuned: Model,
    found: PromptList | None,
    outputs: Sequence[str],
    observer: Any,
    **options: Any,
) -> None:
    """Run, print, save, and then hold the gate; of several processes, the first does so for all."""
    from lazarus.activation import activation_diff as run
    from lazarus.render.activation import text

    with observer:
        diff = run(base, finetuned, found, observer=observer, **options)
    if not leads():
        return
    print_and_save(f"\n{text.table(diff.record)}\n\n{text.summary(diff.record)}", diff, outputs)
    gates = {name: options[name] for name in ("fail_above", "expect", "only_compared") if name in options}
    diff.check_gates(**gates)


def _observer(quiet: bool, debug: bool, *, saves: bool, anonymous: bool = False) -> ConsoleObserver:
    """Return what shows how the run goes; from here on all that the run needs is imported."""
    with heavy_imports():
        show = set_up_libraries(quiet, debug)
        import lazarus.activation  # noqa: F401
        from lazarus.console import ConsoleObserver

    return ConsoleObserver(show=show, prints=leads(), saves=saves, anonymous=anonymous)
