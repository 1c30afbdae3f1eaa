"""Standard output: the header, the prompts, the table and the summary."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from lazarus.results import ActivationDiffRecord, LayerRecord

PROMPT_CHARACTERS = 50
PROMPTS_SHOWN = 20
HEADER = "Layer    Avg Cos Sim    Divergence"
RULE = "-" * 35
MARK = " ***"


def loading(role: str, name: str) -> str:
    """The line that is printed before a model is loaded; `role` is `base` or `finetuned`."""
    return f"Loading {'fine-tuned' if role == 'finetuned' else role} model: {escaped(name)}"


def prompts(texts: Sequence[str]) -> str:
    """How many prompts there are, and the first characters of the first ones."""
    count = "1 prompt" if len(texts) == 1 else f"{len(texts)} prompts"
    lines = [f"Testing {count}", ""]
    lines += [f"Prompt: {escaped(text[:PROMPT_CHARACTERS])}..." for text in texts[:PROMPTS_SHOWN]]
    if len(texts) > PROMPTS_SHOWN:
        lines.append(f"... and {len(texts) - PROMPTS_SHOWN} more")
    return "\n".join(lines)


def table(record: ActivationDiffRecord) -> str:
    """The table, a row a layer."""
    return "\n".join([HEADER, RULE, *(_row(layer) for layer in record.layers)])


def summary(record: ActivationDiffRecord) -> str:
    """What a reader needs besides the table: where it is largest, where it begins, and the notes."""
    found, threshold = record.summary, record.settings.threshold
    lines = []
    if found.most_divergent_layer is not None:
        lines.append(
            f"Most divergent layer: {found.most_divergent_layer} (divergence {_number(found.max_divergence)})"
        )
    if found.first_flagged_layer is None:
        lines.append(f"No layer above the threshold of {threshold:g}")
    else:
        lines.append(f"First layer above {threshold:g}: {found.first_flagged_layer}")
    lines += [*_spread(record), _what_was_compared(record)]
    lines += [f"Note: {escaped(note)}" for note in record.notes]
    return "\n".join(lines)


def saved(path: str) -> str:
    """The line that tells where a result is."""
    return f"Results saved to: {path}"


def page(record: ActivationDiffRecord) -> str:
    """All of it, as the command line prints it."""
    head = [loading("base", record.base.id), loading("finetuned", record.finetuned.id)]
    blocks = [
        "\n".join([*head, prompts([prompt.text for prompt in record.prompts])]),
        table(record),
        summary(record),
    ]
    return "\n\n".join(blocks)


def escaped(text: str) -> str:
    r"""The text with control characters written out, so that it stays on its line.

    >>> escaped("a\tb\x1b[0m")
    'a\\tb\\x1b[0m'
    """
    return "".join(_escape(character) if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    # Cc: control; Cs: half a surrogate; Zl, Zp: line breaks; the bidirectional marks reorder a line.
    is_marked = unicodedata.bidirectional(character) in {
        "LRE",
        "RLE",
        "LRO",
        "RLO",
        "PDF",
        "LRI",
        "RLI",
        "FSI",
        "PDI",
    }
    return unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} or is_marked


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _row(layer: LayerRecord) -> str:
    cosine, divergence = _nan(layer.cosine_similarity), _nan(layer.divergence)
    row = f"{layer.layer:<10}{cosine:>8.4f}{divergence:>14.4f}"
    return row + MARK if layer.flagged else row


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _number(value: float | None) -> str:
    """Four decimals, or as many digits as a small number needs to be told from zero."""
    value = _nan(value)
    return f"{value:.4f}" if value == 0 or value >= 0.0001 else f"{value:.1e}"


def _spread(record: ActivationDiffRecord) -> list[str]:
    """Between which prompts the mean of the most divergent layer lies."""
    layer = record.summary.most_divergent_layer
    if layer is None or len(record.prompts) == 1:
        return []
    values = record.results.column("divergence")[:, layer]
    ends = [int(np.nanargmin(values)), int(np.nanargmax(values))]
    least, most = (
        f"{_number(float(values[i]))} ({escaped(record.prompts[i].text[:PROMPT_CHARACTERS])}...)"
        for i in ends
    )
    return [f"Prompts at layer {layer}: from {least} to {most}"]


def _what_was_compared(record: ActivationDiffRecord) -> str:
    settings = record.settings
    tokens = {
        "last": "the last token of each prompt",
        "mean": "the mean over each prompt's tokens",
        "all": "every token, averaged within each prompt",
    }.get(settings.position, f"token {settings.position} of each prompt")
    return f"Compared: {tokens}, in {settings.dtype} on {settings.device}"
