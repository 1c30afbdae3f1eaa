"""series."""

from __future__ import annotations

from functools import partial
from typing import Any

from lazarus.cli import arguments as a
from lazarus.cli.app import introspect
from lazarus.cli.imports import heavy_imports
from lazarus.cli.output import check_outputs, leads, print_and_save, print_estimate, set_up_libraries
from lazarus.cli.reporting import reported
from lazarus.options import SeriesOptions


@introspect.command("series")
@a.takes(SeriesOptions)
def series(
    base: a.Base,
    finetuned: a.Members,
    prompts: a.PromptsOrRecorded = None,
    output: a.Outputs = None,
    *,
    estimate: a.Estimate = False,
    quiet: a.Quiet = False,
    debug: a.Debug = False,
    **options: Any,
) -> None:
    """Compare many models with one base: the checkpoints of a run of training.

    Runs the same prompts through base once and through each model, compares each with base and with the one
    before it, and tells what they show together: copies, models out of order, a change of the training.

    Example:

    lazarus introspect series -b org/base -f "run/checkpoint-*" -p @prompts.txt -o series.html
    """
    with reported(debug):
        from lazarus.prompts import check_chats, check_responses, parse_prompts, prompt_files
        from lazarus.render.series import text

        # Made to be checked, before torch is imported.
        SeriesOptions(**options)
        values = prompts or []
        files = prompt_files(values)
        output = (output or []) if leads() else []
        check_outputs(output, "series", [*files, options["chat_template"], base, *finetuned])
        found = None
        if values:
            responses = options["position"] == "response"
            found = parse_prompts(values, no_split=options["no_split"], responses=responses)
            check_chats(found.prompts, options["chat_template"])
            check_responses(found.prompts, options["position"])
        with heavy_imports():
            show = set_up_libraries(quiet, debug)
            from lazarus.console import SeriesObserver
            from lazarus.trajectory import estimate_series
            from lazarus.trajectory import series as run

        if estimate:
            print_estimate(partial(estimate_series, base, finetuned, found, **options))
            return

        anonymous = options["anonymous"]
        with SeriesObserver(show=show, prints=leads(), saves=bool(output), anonymous=anonymous) as observer:
            result = run(base, finetuned, found, observer=observer, **options)
        print_and_save(f"\n{text.table(result.record)}\n\n{text.summary(result.record)}", result, output)
        gates = ("fail_above", "expect", "only_compared", "expect_path")
        result.check_gates(**{name: options[name] for name in gates})
