"""The words of a series: verdicts, findings, and what the numbers say together."""

from __future__ import annotations

from lazarus.render.base.escape import escaped
from lazarus.render.base.words import counted, short
from lazarus.results import METRICS, SERIES_METRICS, SeriesMember, SeriesRecord, differing

GLOSSARY = {name: METRICS[name] for name in ("divergence", "kl_base_finetuned")} | SERIES_METRICS
"""the metrics that the renderers show"""
_VERDICTS = {
    "identical": "identical",
    "within_noise": "within noise",
    "within_rounding": "within rounding",
    "changed": "changed",
    None: "not known",
}


def verdict(record: SeriesRecord, member: SeriesMember) -> str:
    """Return a member's verdict in a word or two; it claims no more than was compared."""
    found = _VERDICTS[member.summary.verdict]
    is_partial = differing(record.base.not_compared, member.model.not_compared)
    return f"{found} in what was compared" if found != "changed" and is_partial else found


def kl(member: SeriesMember) -> float | None:
    """Return KL(base‖member) of the next token."""
    return None if member.output is None else member.output.kl_base_finetuned


def name(record: SeriesRecord, member: int) -> str:
    """Return a member's name on one line."""
    return escaped(record.members[member].model.id)


def was_looked_at(record: SeriesRecord) -> bool:
    """Return whether the members were compared with one another, as far as there are several."""
    rows = enumerate(record.distances)
    known = [value for i, row in rows for j, value in enumerate(row) if i != j and value is not None]
    return bool(known) or len(record.members) == 1


def finding_lines(record: SeriesRecord) -> list[str]:
    """Return the findings, a line each; one line where there are none."""
    if not was_looked_at(record):
        return ["Findings: not looked for, since no states of these models were kept"]
    if not record.findings:
        return ["Findings: none"]
    return [f"Finding: {escaped(found.text)}" for found in record.findings]


def summary_lines(record: SeriesRecord) -> list[str]:
    """Return the findings, and what else a reader needs."""
    lines = finding_lines(record)
    lines += [*_largest_step(record), *_onset(record)]
    return [escaped(line) for line in (*lines, _what_was_compared(record))]


def headline(record: SeriesRecord) -> str:
    """Return what was found, in a sentence."""
    n_changed = sum(member.summary.verdict == "changed" for member in record.members)
    told = f"{n_changed} of {len(record.members)} models changed"
    if not was_looked_at(record):
        return f"{told}."
    found = counted(len(record.findings), "finding") if record.findings else "no findings"
    return f"{told}; {found}."


def _largest_step(record: SeriesRecord) -> list[str]:
    steps = [(m.previous.distance, i) for i, m in enumerate(record.members) if m.previous]
    known = [(distance, i) for distance, i in steps if distance is not None]
    if not known:
        return []
    distance, member = max(known, key=lambda each: (each[0], -each[1]))
    return [f"Largest step: to {name(record, member)}, a distance of {short(distance)} from the one before"]


def _onset(record: SeriesRecord) -> list[str]:
    """Return which member is the first that is above the threshold, and where."""
    threshold = record.settings.threshold
    for i, member in enumerate(record.members):
        if member.summary.first_flagged_layer is not None:
            layer = member.summary.first_flagged_layer
            return [f"First above {threshold:g}: {name(record, i)}, from layer {layer} on"]
    return [f"No layer of any model has a divergence above {threshold:g}"]


def _what_was_compared(record: SeriesRecord) -> str:
    n_prompts, settings = len(record.prompts), record.settings
    prompts = counted(n_prompts, "prompt")
    return f"Compared: {prompts}, position {settings.position}, {settings.dtype} on {settings.device}"
