"""The page of activation-diff: a result, and what it has no room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Any

from lazarus.render.activation import tables
from lazarus.render.activation.answers import answers, headline
from lazarus.render.activation.attribution import attribution_table, bars
from lazarus.render.activation.components import component_curves, components_table, experts_table
from lazarus.render.activation.payload import MOST_CURVES, payload
from lazarus.render.activation.sample import Sample, TokenSample, choose, choose_tokens, is_sampled
from lazarus.render.activation.scores import OUTPUTS
from lazarus.render.activation.series import LayerSeries, measured
from lazarus.render.activation.summary import summary_lines
from lazarus.render.activation.tensor_map import TensorMap
from lazarus.render.base.escape import escaped
from lazarus.render.base.frame import Kit, unsaid, write_page
from lazarus.results import METRICS, ActivationDiffRecord

__all__ = ["SCRIPTS", "is_sampled", "write_html"]

SCRIPTS = (
    "data",
    "colours",
    "dom",
    "lazy",
    "plot",
    "curve",
    "local",
    "groups",
    "heatmap",
    "pager",
    "explorer",
    "prompts",
    "tokentext",
    "tokens",
    "main",
)
"""in the order in which they stand in the page"""


def write_html(record: ActivationDiffRecord, stream: IO[bytes], rows_file: str | None = None) -> None:
    """Write the report: one file that needs no network, the same bytes for the same result.

    `rows_file` is the name of the file that has every row, where the page is a sample of the prompts
    (`is_sampled`); the page names it. At 1,000 prompts and 80 layers the file is below 3,000,000 bytes.
    """
    sample = choose(record)
    tokens = choose_tokens(record, len(sample.indexes))
    context = {
        **_context(record),
        "prompts_notes": _prompts_notes(sample, rows_file),
        "tokens_note": _tokens_note(tokens),
    }
    write_page(Kit("activation/page.html", SCRIPTS), context, payload(record, sample, tokens), stream)


@dataclass(frozen=True)
class Shown:
    """The parts of the page that there is something for."""

    divergence: bool
    local: bool
    cka: bool
    tokens: bool
    token_outputs: bool
    groups: bool
    output: bool
    readout: bool


def _context(record: ActivationDiffRecord) -> dict[str, Any]:
    """Return what the template says of the result, whatever part of it the page has."""
    return {
        "command": "activation difference",
        "record": record,
        "names": (escaped(record.base.id), escaped(record.finetuned.id)),
        "verdict": record.summary.verdict or "none",
        "headline": headline(record),
        "answers": answers(record),
        "summary": unsaid(summary_lines(record)),
        "notes": [escaped(note) for note in record.notes],
        "shown": _shown(record),
        "absent": _absent(record),
        "layers": tables.layers(record),
        "ranking": tables.ranking(record),
        "components": components_table(record),
        "experts": experts_table(record),
        "curves": component_curves(record),
        "attribution": attribution_table(record),
        "bars": bars(record),
        "tensor_map": TensorMap.of(record.attribution),
        "groups": tables.groups(record),
        "contrasts": tables.contrasts(record),
        "output": tables.output(record),
        "output_title": OUTPUTS[record.output.kind if record.output else "next_token"].capitalize(),
        "mined": tables.mined(record),
        "readout": tables.readout(record),
        "provenance": tables.provenance(record),
        "metrics": list(METRICS.values()),
        "groups_note": _groups_note(record),
    }


def _shown(record: ActivationDiffRecord) -> Shown:
    series = LayerSeries.of(record)
    divergence = measured(series.divergence)
    return Shown(
        divergence=divergence,
        local=measured(series.local),
        cka=not divergence and measured(series.cka),
        tokens=bool(record.tokens),
        token_outputs=any(trace.kl is not None for trace in record.tokens or []),
        groups=bool(record.groups and record.groups.curves),
        output=record.output is not None,
        readout=bool(record.readout),
    )


def _absent(record: ActivationDiffRecord) -> list[str]:
    """Return what was not measured, and what would measure it."""
    shown = _shown(record)
    reasons = (
        (shown.divergence, "the divergence (the two models have states of different width)"),
        (measured([layer.noise_floor for layer in record.layers]), "the noise floor"),
        (shown.local, "each block's own change (--localize)"),
        (record.components is not None, "what is inside the blocks (--sites all)"),
        (record.attribution is not None, "who caused the change, in nats (--attribute blocks)"),
        (shown.tokens, "single tokens (--position all or response)"),
        (shown.groups, "groups of prompts (give the prompts a group)"),
        (shown.output, "the output (no head that can be run by itself, or --align text)"),
        (shown.readout, "the readout as tokens (--readout auto)"),
    )
    return [reason for is_there, reason in reasons if not is_there]


def _prompts_notes(sample: Sample, rows_file: str | None) -> list[str]:
    notes = []
    if not sample.is_whole:
        drawn = len(sample.indexes) - sample.n_worst
        where = (
            f"All of them are in {rows_file}." if rows_file else "Save the result as .json for all of them."
        )
        notes.append(
            f"This page has room for {len(sample.indexes):,} of the {sample.n_prompts:,} prompts: the "
            f"{sample.n_worst:,} with the largest divergence at any layer, and {drawn:,} drawn at random "
            f"from the others (seed {sample.seed}). {where}"
        )
    if sample.n_cut:
        notes.append(
            f"{sample.n_cut:,} of the texts are longer than {sample.characters:,} characters and are cut "
            "there in this page. The result saved as .json has them whole."
        )
    return notes


def _tokens_note(tokens: TokenSample | None) -> str:
    if tokens is None or (len(tokens.traces) == tokens.n_traces and not tokens.n_tokens_cut):
        return ""
    note = f"This page has room for the tokens of {len(tokens.traces):,} of {tokens.n_traces:,} prompts"
    if tokens.n_tokens_cut:
        note += f", the last of them without its last {tokens.n_tokens_cut:,} tokens"
    return f"{note}. The result saved as .json has all of them."


def _groups_note(record: ActivationDiffRecord) -> str:
    count = len(record.groups.curves) if record.groups else 0
    if count <= MOST_CURVES:
        return ""
    return (
        f"The first {MOST_CURVES} of {count:,} groups are drawn. The result saved as .json has all of them."
    )
