"""The change of scores and embeddings: a line, an answer, and a table."""

from __future__ import annotations

from lazarus.render.base.cells import Cell, Heading, Row, Table, cell
from lazarus.render.base.escape import escaped
from lazarus.render.base.words import short
from lazarus.results import METRICS, Output, Scores

OUTPUTS = {
    "next_token": "the next token",
    "scores": "the scores",
    "token_scores": "the tokens' scores",
    "embedding": "the embeddings",
}
"""what each kind of output is called"""
_CAPTIONS = {
    "scores": "The scores of each prompt, over prompts",
    "token_scores": "The scores of the compared tokens, as a mean over prompts",
    "embedding": "The embedding of each prompt, over prompts",
}


def score_line(output: Output, scores: Scores) -> str:
    """Return what became of the scores or the embeddings, in a line."""
    parts = []
    if scores.agreement is not None:
        what = "tokens" if output.kind == "token_scores" else "prompts"
        parts.append(
            f"the first label agrees on {scores.agreement:.0%} of {what}{_to(scores.agreement_interval)}"
        )
    if scores.divergence is not None:
        parts.append(f"divergence {short(scores.divergence)}{_to(scores.divergence_interval)}")
    elif scores.mean_absolute_difference is not None:
        size, interval = scores.mean_absolute_difference, scores.mean_absolute_difference_interval
        parts.append(f"mean difference {short(size)}{_to(interval)}")
    if scores.rank_correlation is not None:
        of = "similarities" if output.kind == "embedding" else "prompts"
        interval = scores.rank_correlation_interval
        parts.append(f"rank correlation of {of} {_signed(scores.rank_correlation)}{_to(interval)}")
    start = OUTPUTS[output.kind].removeprefix("the ")
    return f"{start[0].upper()}{start[1:]}: {'; '.join(parts)}"


def score_table(output: Output, scores: Scores) -> Table:
    """Every number of the scores or the embeddings that was measured."""
    found = [
        ("agreement", scores.agreement_interval),
        ("rank_correlation", scores.rank_correlation_interval),
        ("divergence", scores.divergence_interval),
        ("mean_absolute_difference", scores.mean_absolute_difference_interval),
    ]
    rows = [
        _row(METRICS[n].heading, getattr(scores, n), METRICS[n].format, interval, METRICS[n].formula)
        for n, interval in found
        if getattr(scores, n) is not None
    ]
    rows += [
        _row("Rel. L2", scores.relative_l2, ".4g", None, "√(Σ‖f − b‖² / Σ‖b‖²) over prompts"),
        _row("Noise Floor", output.noise_floor, ".1e", None, "what numerical noise alone may reach, in that"),
    ]
    labels = f": {', '.join(escaped(label) for label in scores.labels)}" if scores.labels else ""
    return Table(
        caption=_CAPTIONS[output.kind] + labels,
        headings=[Heading("Measure"), Heading("Value"), Heading("95 % interval"), Heading("What it is")],
        rows=rows,
    )


def _row(
    heading: str, value: float | None, form: str, interval: tuple[float, float] | None, meaning: str
) -> Row:
    between = "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"
    return Row(heading, [cell(value, form), Cell(between, between), Cell(meaning, meaning)])


def _to(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({_signed(interval[0])} to {_signed(interval[1])})"


def _signed(value: float) -> str:
    return short(value) if value >= 0 else f"-{short(-value)}"
