"""The page of series."""

from __future__ import annotations

from typing import IO, Any

import msgspec

from lazarus.render.base.cells import Heading, Row, Table, cell, plain, run_tables
from lazarus.render.base.escape import escaped
from lazarus.render.base.frame import Answer, Kit, unsaid, write_page
from lazarus.render.base.words import counted, short
from lazarus.render.series import grid, plots
from lazarus.render.series.summary import GLOSSARY, headline, kl, name, summary_lines, verdict, was_looked_at
from lazarus.results import SeriesMember, SeriesRecord

MOST_MAP_CELLS = 20_000


def write_html(record: SeriesRecord, stream: IO[bytes]) -> None:
    """Write the page: one file that needs no network, the same bytes for the same result.

    Its only script is that of the theme's button, and of numbers that show their digits.
    """
    kit = Kit("series/page.html", ("colours", "theme"), has_plots=False)
    write_page(kit, _context(record), {}, stream)


def _context(record: SeriesRecord) -> dict[str, Any]:
    n_members = len(record.members)
    has_room = n_members * max(n_members, len(record.members[0].layers)) <= MOST_MAP_CELLS
    models = {"Base": msgspec.structs.asdict(record.base)}
    return {
        "command": "series",
        "record": record,
        "names": (escaped(record.base.id), counted(n_members, "model")),
        "verdict": "none" if record.findings else "changed",
        "headline": headline(record),
        "answers": [_when(record), _where(record), _as_named(record)],
        "summary": unsaid(summary_lines(record)),
        "findings": [escaped(found.text) for found in record.findings],
        "notes": [escaped(note) for note in record.notes],
        "absent": [],
        "plots": plots.trajectory(record),
        "size": plots,
        "labels": grid.labels(record),
        "layers": grid.layer_rows(record) if has_room else [],
        "distances": grid.distance_rows(record) if has_room and was_looked_at(record) else [],
        "was_looked_at": was_looked_at(record),
        "members": members_table(record),
        "provenance": run_tables(record, models, {}),
        "metrics": list(GLOSSARY.values()),
    }


def members_table(record: SeriesRecord) -> Table:
    """Every member in numbers."""
    metrics = ("divergence", "kl_base_finetuned", "distance", "turn")
    headings = [
        Heading("Model"),
        Heading("Divergence", GLOSSARY["divergence"].source),
        Heading("Layer", "the most divergent one"),
        Heading("KL", GLOSSARY["kl_base_finetuned"].source),
        Heading("Distance", GLOSSARY["distance"].source),
        Heading("From the one before", "the distance of the step"),
        Heading("KL from the one before", "nats"),
        Heading("Cos to last step", GLOSSARY["turn"].source),
        Heading("Verdict"),
    ]
    forms = {metric: GLOSSARY[metric].format for metric in metrics}
    rows = [Row(escaped(m.model.id), _cells(record, m, forms)) for m in record.members]
    return Table("Each model against base, and against the one before", headings, rows)


def _cells(record: SeriesRecord, member: SeriesMember, forms: dict[str, str]) -> list[Any]:
    found, before = member.summary, member.previous
    return [
        cell(found.max_divergence, forms["divergence"], "divergence"),
        cell(found.most_divergent_layer),
        cell(kl(member), forms["kl_base_finetuned"]),
        cell(member.distance, forms["distance"]),
        cell(before.distance if before else None, forms["distance"]),
        cell(before.kl if before else None, forms["kl_base_finetuned"]),
        cell(member.turn, forms["turn"]),
        plain(verdict(record, member)),
    ]


def _when(record: SeriesRecord) -> Answer:
    question = "When did it change most?"
    if not was_looked_at(record):
        return Answer(question, "Not known", "No model was compared with the one before it.")
    steps = [(m.previous.distance or 0.0, i) for i, m in enumerate(record.members) if m.previous]
    steps += [(record.members[0].distance or 0.0, 0)]
    distance, member = max(steps, key=lambda each: (each[0], -each[1]))
    if not distance:
        return Answer(question, "Never", "No model differs from the one before it, as far as that is known.")
    before = "base" if not member else name(record, member - 1)
    return Answer(
        question, f"At {grid.labels(record)[member]}", f"A distance of {short(distance)} from {before}."
    )


def _where(record: SeriesRecord) -> Answer:
    question, last = "Where, in the end?", record.members[-1].summary
    if last.most_divergent_layer is None or not last.max_divergence:
        return Answer(question, "Nowhere", "The last model does not diverge from base.")
    told = f"Divergence {short(last.max_divergence)}, the largest of the last model."
    return Answer(question, f"Layer {last.most_divergent_layer}", told)


def _as_named(record: SeriesRecord) -> Answer:
    question = "Is each what its name says?"
    if not was_looked_at(record):
        return Answer(question, "Not known", "No states were kept: no two of them were compared.")
    odd = [found for found in record.findings if found.kind != "change_point"]
    if odd:
        return Answer(question, "No", escaped("; ".join(found.text for found in odd)) + ".")
    return Answer(question, "Nothing speaks against it", "No copies, and none out of order.")
