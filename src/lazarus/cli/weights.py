"""weight-diff."""

from __future__ import annotations

from typing import Any

from lazarus.cli import arguments as a
from lazarus.cli.app import introspect
from lazarus.cli.imports import heavy_imports
from lazarus.cli.output import check_outputs, leads, print_and_save, set_up_libraries
from lazarus.cli.reporting import reported
from lazarus.options import WeightOptions


@introspect.command("weight-diff")
@a.takes(WeightOptions)
def weight_diff(
    base: a.Base,
    finetuned: a.Finetuned,
    output: a.Outputs = None,
    *,
    quiet: a.Quiet = False,
    debug: a.Debug = False,
    **options: Any,
) -> None:
    """Compare the weights of two models, tensor by tensor.

    Reads both checkpoints from disk, without loading the models, and prints for each layer and component the
    relative change of its weights: the Frobenius norm of the difference over that of the base.

    Example:

    lazarus introspect weight-diff -b org/base -f org/tuned -o weights.html
    """
    with reported(debug):
        from lazarus.render.weights import text

        # Made to be checked, before torch is imported.
        WeightOptions(**options)
        output = (output or []) if leads() else []
        check_outputs(output, "weight-diff", [base, finetuned])
        with heavy_imports():
            show = set_up_libraries(quiet, debug)
            from lazarus.console import WeightObserver
            from lazarus.weights import weight_diff as run

        anonymous = options["anonymous"]
        with WeightObserver(show=show, prints=leads(), saves=bool(output), anonymous=anonymous) as observer:
            diff = run(base, finetuned, observer=observer, **options)
        if leads():
            print_and_save(f"\n{text.table(diff.record)}\n\n{text.summary(diff.record)}", diff, output)
        diff.check_gates(**{name: options[name] for name in ("fail_above", "expect", "only_compared")})
