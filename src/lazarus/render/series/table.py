"""CSV, Parquet and Markdown of series: a row a member and layer, and a row a member."""

from __future__ import annotations

from typing import IO, Any

from lazarus.render.base.cells import shown
from lazarus.render.base.markdown import code, ending, page
from lazarus.render.base.rows import Kind
from lazarus.render.series.summary import GLOSSARY, kl, summary_lines, verdict
from lazarus.results import SeriesMember, SeriesRecord

_OF_LAYER = (
    "layer",
    "cosine_similarity",
    "divergence",
    "relative_l2",
    "norm_ratio",
    "noise_floor",
    "noise_floor_divergence",
    "cka",
)
KINDS: dict[str, Kind] = {
    "member": "int64",
    "model_id": "string",
    "step": "int64",
    "layer": "int64",
    **dict.fromkeys(_OF_LAYER[1:], "float64"),
    "kl_base_finetuned": "float64",
    "distance": "float64",
    "turn": "float64",
    "previous_distance": "float64",
    "previous_kl": "float64",
    "verdict": "string",
}
"""the types of the columns"""


def columns(record: SeriesRecord) -> dict[str, list[Any]]:
    """The layers of every member as columns, one row a member and layer; None where there is no number."""
    rows = [(i, member, layer) for i, member in enumerate(record.members) for layer in member.layers]
    found: dict[str, list[Any]] = {
        "member": [i for i, _, _ in rows],
        "model_id": [member.model.id for _, member, _ in rows],
        "step": [member.step for _, member, _ in rows],
    }
    for field in _OF_LAYER:
        found[field] = [getattr(layer, field) for _, _, layer in rows]
    found["kl_base_finetuned"] = [kl(member) for _, member, _ in rows]
    found["distance"] = [member.distance for _, member, _ in rows]
    found["turn"] = [member.turn for _, member, _ in rows]
    found["previous_distance"] = [getattr(member.previous, "distance", None) for _, member, _ in rows]
    found["previous_kl"] = [getattr(member.previous, "kl", None) for _, member, _ in rows]
    found["verdict"] = [member.summary.verdict for _, member, _ in rows]
    return found


def write_markdown(record: SeriesRecord, stream: IO[bytes]) -> None:
    """A row a member, with the findings, the summary and the notes below."""
    lines = [
        f"# {len(record.members)} models against {code(record.base.id)}",
        "",
        "| Model | Divergence | Layer | KL | Distance | From the one before | Verdict |",
        "|---|---:|---:|---:|---:|---:|---|",
        *(_markdown_row(record, member) for member in record.members),
        "",
        *ending(summary_lines(record), record.notes),
    ]
    stream.write(page(lines))


def _markdown_row(record: SeriesRecord, member: SeriesMember) -> str:
    found, before = member.summary, member.previous
    numbers = (
        _number(found.max_divergence, "divergence"),
        shown(found.most_divergent_layer),
        _number(kl(member), "kl_base_finetuned"),
        _number(member.distance, "distance"),
        "" if before is None else _number(before.distance, "distance"),
    )
    return "| " + " | ".join([code(member.model.id), *numbers, verdict(record, member)]) + " |"


def _number(value: float | None, metric: str) -> str:
    return "nan" if value is None else shown(value, GLOSSARY[metric].format)
