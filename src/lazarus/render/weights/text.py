"""Standard output of weight-diff."""

from __future__ import annotations

from lazarus.results import TensorRecord, WeightDiffRecord

HEADER = "Layer    Component    Rel. Diff"
RULE = "-" * 35
MARK = " ***"


def detected(families: tuple[str, str], n_layers: int) -> str:
    """What the two models are, and how much there is to compare."""
    base, finetuned = families
    told = base if base == finetuned else f"{base} (base), {finetuned} (fine-tuned)"
    return f"Detected model family: {told}\n\nComparing {n_layers} layer{'' if n_layers == 1 else 's'}..."


def table(record: WeightDiffRecord) -> str:
    """The table, a row a tensor."""
    return "\n".join([HEADER, RULE, *(_row(row) for row in record.results)])


def _row(row: TensorRecord) -> str:
    layer = "-" if row.layer is None else row.layer
    relative = float("nan") if row.relative_change is None else row.relative_change
    return f"{layer:<9}{row.component:<12}{relative:>12.6f}" + (MARK if row.flagged else "")


def summary(record: WeightDiffRecord) -> str:
    """The most changed components, and what else a reader needs."""
    return "\n".join([verdict(record), *record.notes])


def place(row: TensorRecord) -> str:
    """Where a tensor is: `layer 11 mlp_down`, or `embed`."""
    return row.component if row.layer is None else f"layer {row.layer} {row.component}"


def verdict(record: WeightDiffRecord) -> str:
    """The verdict in a sentence."""
    return record.summary.verdict


def page(record: WeightDiffRecord) -> str:
    """All of it, as the command line prints it."""
    return verdict(record)
