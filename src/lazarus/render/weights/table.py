"""CSV, Parquet and Markdown of weight-diff: a row a tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import IO, Any

from lazarus.render.base.cells import shown
from lazarus.render.base.markdown import code, ending, page
from lazarus.render.base.rows import Kind
from lazarus.render.base.words import counted
from lazarus.render.weights.summary import shape_text, summary_lines
from lazarus.results import Quantisation, Spectrum, TensorRecord, WeightDiffRecord
from lazarus.results.weight_glossary import WEIGHT_METRICS

MOST_MARKDOWN_ROWS = 400
"""A comment on a pull request takes no more than 65,536 characters."""
INTEGERS = (
    "layer",
    "spectrum_n_singular_values",
    "spectrum_rank_90",
    "spectrum_adapter_rank",
    "quantisation_bits",
)
"""columns of whole numbers that may be empty"""

_QUANTISATION = ("quantisation_role", "quantisation_scheme", "quantisation_block")
_KINDS: dict[Kind, Sequence[str]] = {
    "int64": (*INTEGERS, "n_changed"),
    "string": (
        "component",
        "name",
        "shape",
        "base_dtype",
        "finetuned_dtype",
        "spectrum_method",
        *_QUANTISATION,
    ),
    "bool_": ("flagged", "rounding"),
}
KINDS: Mapping[str, Kind] = defaultdict(
    lambda: "float64", {name: kind for kind, names in _KINDS.items() for name in names}
)
"""the types of the columns"""
_SHOWN = ("relative_change", "cosine_similarity", "max_abs_change", "share_changed")
_OF_SPECTRUM = ("effective_rank", "rank_90", "adapter_rank")


def columns(record: WeightDiffRecord) -> dict[str, list[Any]]:
    """Every field of every tensor as columns, those of its spectrum and its quantisation with
    `spectrum_` and `quantisation_` before them; None where none is.

    The singular values themselves are in the JSON only.
    """
    rows = record.results
    plain = [field for field in TensorRecord.__struct_fields__ if field not in ("spectrum", "quantisation")]
    table: dict[str, list[Any]] = {field: [getattr(row, field) for row in rows] for field in plain}
    table["shape"] = [shape_text(row.shape) for row in rows]
    for field in Spectrum.__struct_fields__:
        if field != "singular_values":
            table[f"spectrum_{field}"] = [getattr(row.spectrum, field, None) for row in rows]
    for field in Quantisation.__struct_fields__:
        table[f"quantisation_{field}"] = [getattr(row.quantisation, field, None) for row in rows]
    blocks = (row.quantisation.block if row.quantisation else None for row in rows)
    table["quantisation_block"] = [None if block is None else shape_text(block) for block in blocks]
    return table


def write_markdown(record: WeightDiffRecord, stream: IO[bytes]) -> None:
    """The table of the tensors, with what was compared above it and the summary and the notes below."""
    rows, names = _markdown_rows(record), shown_names(record)
    left = len(record.results) - len(rows)
    lines = [
        f"# {code(record.base.id)} against {code(record.finetuned.id)}",
        "",
        f"{counted(len(record.results), 'tensor')} in {counted(len(record.layers), 'layer')}; "
        f"`***` marks a relative change above {record.settings.threshold:g}.",
        "",
    ]
    if left:
        lines += [f"The {len(rows)} most changed of them; the other {left:,} are in the JSON.", ""]
    head = ["Layer", "Component", *(WEIGHT_METRICS[name].heading for name in names), ""]
    lines += [
        "| " + " | ".join(head) + " |",
        "|---:|---|" + "---:|" * len(names) + "---|",
        *(_markdown_row(row, names) for row in rows),
        "",
        *ending(summary_lines(record), record.notes),
    ]
    stream.write(page(lines))


def value_of(row: TensorRecord, name: str) -> float | int | None:
    """A number of a tensor, of its spectrum or its quantisation, by the name that the glossary has for it."""
    holders = (holder for holder in (row, row.spectrum, row.quantisation) if hasattr(holder, name))
    value: float | int | None = getattr(next(holders, None), name, None)
    return value


def shown_names(record: WeightDiffRecord) -> list[str]:
    """The metrics that a table of tensors shows: the usual ones, and the spectrum's where there is one."""
    has_spectrum = any(row.spectrum for row in record.results)
    return [*_SHOWN, *(_OF_SPECTRUM if has_spectrum else ())]


def most_changed_first(rows: Sequence[TensorRecord]) -> list[int]:
    """The rows by their relative change, the largest first; those without one come before all others.

    A tensor that is not finite, or was all zero, must not be what is left out.
    """
    return sorted(range(len(rows)), key=lambda i: (-_rank(rows[i]), i))


def _rank(row: TensorRecord) -> float:
    if row.relative_change is None:
        return float("inf") if row.n_changed else 0.0
    return row.relative_change


def _markdown_rows(record: WeightDiffRecord) -> list[TensorRecord]:
    kept = sorted(most_changed_first(record.results)[:MOST_MARKDOWN_ROWS])
    return [record.results[i] for i in kept]


def _markdown_row(row: TensorRecord, names: Sequence[str]) -> str:
    cells = [_cell(value_of(row, name), WEIGHT_METRICS[name].format, name) for name in names]
    layer = "-" if row.layer is None else str(row.layer)
    return "| " + " | ".join([layer, code(row.component), *cells, "***" if row.flagged else ""]) + " |"


def _cell(value: float | int | None, form: str, name: str) -> str:
    if value is None:
        return "nan" if name in _SHOWN else ""
    return shown(value, form)
