"""CSV, Parquet and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from lazarus.render.activation.summary import summary_lines
from lazarus.render.base.markdown import code, ending, page, prose
from lazarus.render.base.rows import Kind
from lazarus.results import METRICS, ActivationDiffRecord, LayerRecord, ResultRows

SHOWN = ("cosine_similarity", "divergence", "relative_l2", "norm_ratio")
MAYBE_SHOWN = ("noise_floor", "normalized_divergence", "local_relative_l2", "cka")


def columns(record: ActivationDiffRecord) -> dict[str, Any]:
    """The rows, one a prompt and layer, as columns; NaN where a value was not measured."""
    rows, groups = record.results, [prompt.group for prompt in record.prompts]
    return {
        "prompt_index": np.repeat(np.arange(rows.n_prompts), rows.n_layers),
        "prompt": [text for text in rows.prompts for _ in range(rows.n_layers)],
        "group": [group for group in groups for _ in range(rows.n_layers)],
        "layer": np.tile(np.arange(rows.n_layers), rows.n_prompts),
        **{name: rows.column(name).ravel() for name in ResultRows.COLUMNS},
    }


KINDS: dict[str, Kind] = {"prompt": "string", "group": "string"}
"""the types of the columns that are lists"""


def write_markdown(record: ActivationDiffRecord, stream: IO[bytes]) -> None:
    """The table of the layers, with what was compared above it and the notes below."""
    names = shown_names(record)
    head = ["Layer", *(METRICS[name].heading for name in names), ""]
    lines = [
        f"# {code(record.base.id)} against {code(record.finetuned.id)}",
        "",
        f"{len(record.prompts)} prompts, position {prose(str(record.settings.position))}, "
        f"{prose(record.settings.dtype)}; `***` marks a divergence above {record.settings.threshold:g}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---:|" * (len(head) - 1) + "---|",
        *(_markdown_row(layer, names) for layer in record.layers),
    ]
    lines += ["", *ending(summary_lines(record), record.notes)]
    stream.write(page(lines))


def shown_names(record: ActivationDiffRecord) -> list[str]:
    """The metrics that a table of layers shows: the usual ones, and of the others what was measured."""
    measured = (
        name for name in MAYBE_SHOWN if any(layer_value(layer, name) is not None for layer in record.layers)
    )
    return [*SHOWN, *measured]


def layer_value(layer: LayerRecord, name: str) -> float | None:
    """A metric of a layer by its name; None where it was not measured."""
    if name == "local_relative_l2":
        return layer.local.relative_l2 if layer.local else None
    value: float | None = getattr(layer, name)
    return value


def _markdown_row(layer: LayerRecord, names: Sequence[str]) -> str:
    values = [layer_value(layer, name) for name in names]
    cells = ["nan" if v is None else format(v, METRICS[n].format) for n, v in zip(names, values, strict=True)]
    return "| " + " | ".join([str(layer.layer), *cells, "***" if layer.flagged else ""]) + " |"
