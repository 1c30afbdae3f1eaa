"""The page of weight-diff: a result, and what it has no room for."""

from __future__ import annotations

from typing import IO, Any

from lazarus.render.base.cells import base_and_finetuned, run_tables
from lazarus.render.base.escape import escaped
from lazarus.render.base.frame import Kit, unsaid, write_page
from lazarus.render.weights import tables
from lazarus.render.weights.answers import answers, headline
from lazarus.render.weights.grid import Grid
from lazarus.render.weights.payload import PageSelection, payload
from lazarus.render.weights.summary import summary_lines
from lazarus.results import WeightDiffRecord
from lazarus.results.weight_glossary import WEIGHT_METRICS

OF_SPECTRUM = (
    "spectral_norm",
    "stable_rank",
    "effective_rank",
    "rank_90",
    "share_computed",
    "rounding_norm",
    "adapter_rank",
)
OF_QUANTISATION = ("relative_error", "nearest_relative_error", "error_ratio", "outlier_share")
KIT = Kit(
    "weights/page.html",
    ("data", "colours", "dom", "lazy", "heatmap", "pager", "tensors", "sorting", "told", "main"),
    has_plots=False,
)


def write_html(record: WeightDiffRecord, stream: IO[bytes]) -> None:
    """Write the report: one file that needs no network, the same bytes for the same result.

    48 layers of 128 experts are below 3,000,000 bytes; of more the page has the most changed, and says so.
    """
    grid = Grid.of(record)
    kept = PageSelection.of(record, grid)
    write_page(KIT, _context(record, grid, kept), payload(record, grid, kept), stream)


def _context(record: WeightDiffRecord, grid: Grid, kept: PageSelection) -> dict[str, Any]:
    """Return what the template says of the result, whatever part of it the page has."""
    is_quantised = any(row.quantisation for row in record.results)
    return {
        "command": "weight difference",
        "record": record,
        "names": (escaped(record.base.id), escaped(record.finetuned.id)),
        "verdict": record.summary.verdict,
        "headline": headline(record),
        "answers": answers(record),
        "summary": unsaid(summary_lines(record)),
        "notes": [escaped(note) for note in record.notes],
        "absent": [] if record.settings.spectrum else ["the spectrum of each change (--spectrum)"],
        "has_map": bool(grid.components and grid.layers),
        "left_out": _left_out(record, kept),
        "layers": tables.layers(record),
        "outside": tables.others(record),
        "unmatched": tables.unmatched(record),
        "updates": tables.updates(record),
        "quantisations": tables.quantisations(record),
        "provenance": run_tables(record, base_and_finetuned(record), {}),
        "metrics": [
            metric
            for metric in WEIGHT_METRICS.values()
            if (record.settings.spectrum or metric.name not in OF_SPECTRUM)
            and (is_quantised or metric.name not in OF_QUANTISATION)
        ],
    }


def _left_out(record: WeightDiffRecord, kept: PageSelection) -> list[str]:
    """Return what there is no room for; the most changed is there."""
    places = (
        (len(kept.components), kept.n_components, "components in the map"),
        (len(kept.tensors), len(record.results), "tensors in the table"),
        (len(kept.spectra), kept.n_spectra, "spectra"),
    )
    return [
        f"This page has room for {count:,} of the {whole:,} {what}: the most changed ones. The result saved "
        "as .json has all of them."
        for count, whole, what in places
        if count < whole
    ]
