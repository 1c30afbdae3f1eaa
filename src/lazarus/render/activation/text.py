"""Standard output: the header, the prompts, the table and the summary."""

from __future__ import annotations

from collections.abc import Sequence

from lazarus.render.activation.attribution import nats_by_layer
from lazarus.render.activation.summary import summary_lines
from lazarus.render.base.escape import PROMPT_CHARACTERS, escaped
from lazarus.render.base.words import loading
from lazarus.results import ActivationDiffRecord, LayerRecord

PROMPTS_SHOWN = 20
HEADER = "Layer    Avg Cos Sim    Divergence"
RULE = "-" * 35
MARK = " ***"


def prompts(texts: Sequence[str], verb: str = "Testing") -> str:
    """Return how many prompts there are, and the first characters of the first ones."""
    count = "1 prompt" if len(texts) == 1 else f"{len(texts)} prompts"
    lines = [f"{verb} {count}", ""]
    lines += [f"Prompt: {escaped(text[:PROMPT_CHARACTERS])}..." for text in texts[:PROMPTS_SHOWN]]
    if len(texts) > PROMPTS_SHOWN:
        lines.append(f"... and {len(texts) - PROMPTS_SHOWN} more")
    return "\n".join(lines)


def table(record: ActivationDiffRecord) -> str:
    """The table, a row a layer; with columns of local change, of nats and of CKA where there are any."""
    extra: dict[str, list[float | None]] = {}
    if record.settings.localize:
        extra["Local"] = [layer.local.relative_l2 if layer.local else None for layer in record.layers]
    if record.attribution is not None:
        extra["Nats"] = list(nats_by_layer(record))
    if record.base.hidden_size != record.finetuned.hidden_size:
        extra["CKA"] = [layer.cka for layer in record.layers]
    header = HEADER + "".join(f"{name:>12}" for name in extra)
    rows = [_row(layer, [values[i] for values in extra.values()]) for i, layer in enumerate(record.layers)]
    return "\n".join([header, RULE + "-" * 12 * len(extra), *rows])


def summary(record: ActivationDiffRecord) -> str:
    """Return what a reader needs besides the table, in at most ten lines, and then the notes."""
    lines = [*summary_lines(record), *(f"Note: {escaped(note)}" for note in record.notes)]
    return "\n".join(lines)


def page(record: ActivationDiffRecord) -> str:
    """All of it, as the command line prints it."""
    head = [loading("base", record.base.id), loading("finetuned", record.finetuned.id)]
    blocks = [
        "\n".join([*head, prompts([prompt.text for prompt in record.prompts])]),
        table(record),
        summary(record),
    ]
    return "\n\n".join(blocks)


def _row(layer: LayerRecord, extra: Sequence[float | None]) -> str:
    cosine, divergence = _nan(layer.cosine_similarity), _nan(layer.divergence)
    row = f"{layer.layer:<10}{cosine:>8.4f}{divergence:>14.4f}"
    row += "".join(f"{_nan(value):>12.6f}" for value in extra)
    return row + MARK if layer.flagged else row


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
