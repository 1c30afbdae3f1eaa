"""Standard output of weight-diff: the header, the table, the most changed components and the summary."""

from __future__ import annotations

from lazarus.render.base.escape import escaped
from lazarus.render.base.words import loading
from lazarus.render.weights.summary import place, summary_lines, verdict
from lazarus.results import TensorRecord, WeightDiffRecord

__all__ = ["detected", "page", "place", "summary", "table", "verdict"]

HEADER = "Layer    Component    Rel. Diff"
RULE = "-" * 35
MARK = " ***"
TOP = "Top 5 divergent components:"


def detected(families: tuple[str, str], n_layers: int) -> str:
    """Return what the two models are, and how much there is to compare."""
    base, finetuned = map(escaped, families)
    told = base if base == finetuned else f"{base} (base), {finetuned} (fine-tuned)"
    return f"Detected model family: {told}\n\nComparing {n_layers} layer{'' if n_layers == 1 else 's'}..."


def table(record: WeightDiffRecord) -> str:
    """The table, a row a tensor."""
    return "\n".join([HEADER, RULE, *(_row(row) for row in record.results)])


def summary(record: WeightDiffRecord) -> str:
    """The most changed components, what else a reader needs in at most eight lines, and then the notes."""
    notes = [f"Note: {escaped(note)}" for note in record.notes]
    return "\n".join([TOP, *_top(record), "", *summary_lines(record), *notes])


def page(record: WeightDiffRecord) -> str:
    """All of it, as the command line prints it."""
    families = (record.base.family, record.finetuned.family)
    n_layers = max(record.base.n_layers, record.finetuned.n_layers)
    head = [loading("base", record.base.id), loading("finetuned", record.finetuned.id)]
    blocks = [
        "\n".join([*head, detected(families, n_layers)]),
        table(record),
        summary(record),
    ]
    return "\n\n".join(blocks)


def _row(row: TensorRecord) -> str:
    layer = "-" if row.layer is None else row.layer
    relative = float("nan") if row.relative_change is None else row.relative_change
    return f"{layer:<9}{escaped(row.component):<12}{relative:>12.6f}" + (MARK if row.flagged else "")


def _top(record: WeightDiffRecord) -> list[str]:
    rows = [record.results[i] for i in record.summary.most_changed]
    if rows:
        return [f"  {_capital(place(row))}: {row.relative_change:.6f}" for row in rows]
    if record.summary.n_changed_tensors:
        return ["  none: what changed has no relative change"]
    return [f"  none: nothing differs{' in what both have' if record.unmatched else ''}"]


def _capital(place: str) -> str:
    """`Layer 11 mlp_down`; what is outside the layers keeps its name."""
    return place.replace("layer", "Layer", 1) if place.startswith("layer ") else place
