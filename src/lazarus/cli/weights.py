"""weight-diff."""

from __future__ import annotations

import typer

from lazarus.cli import arguments as a
from lazarus.cli.app import introspect
from lazarus.cli.imports import heavy_imports
from lazarus.cli.output import check_outputs, leads, print_and_save, shows_progress
from lazarus.cli.reporting import reported


@introspect.command("weight-diff")
def weight_diff(
    context: typer.Context,
    base: a.Base,
    finetuned: a.Finetuned,
    output: a.Outputs = None,
    threshold: a.WeightThreshold = 0.1,
    spectrum: a.SpectrumOption = False,
    fail_above: a.WeightFailAbove = None,
    expect: a.WeightExpect = None,
    only_compared: a.OnlyCompared = False,
    layers_path: a.LayersPath = None,
    seed: a.Seed = 0,
    allow_pickle: a.AllowPickle = False,
    trust_remote_code: a.TrustRemoteCode = False,
    quiet: a.Quiet = False,
    debug: a.Debug = False,
) -> None:
    """Compare the weights of two models, tensor by tensor.

    Reads both checkpoints from disk, without loading the models, and prints for each layer and component the
    relative change of its weights: the Frobenius norm of the difference over that of the base.

    Example:

    lazarus introspect weight-diff -b org/base -f org/tuned -o weights.html
    """
    from lazarus.options import WeightArguments

    options = {name: context.params[name] for name in WeightArguments.__annotations__}
    with reported(debug):
        from lazarus.options import WeightOptions
        from lazarus.render.weights import text

        WeightOptions(**options)
        output = (output or []) if leads() else []
        check_outputs(output, "weight-diff", [base, finetuned])
        with heavy_imports():
            show = shows_progress(quiet, debug)
            from lazarus.console import WeightObserver
            from lazarus.weights import weight_diff as run

        with WeightObserver(show=show, prints=leads(), saves=bool(output)) as observer:
            diff = run(base, finetuned, observer=observer, **options)
        if leads():
            print_and_save(f"\n{text.table(diff.record)}\n\n{text.summary(diff.record)}", diff, output)
        diff.check_gates(fail_above=fail_above, expect=expect, only_compared=only_compared)
