"""Standard output of series: the header, a row a member, the findings and the summary."""

from __future__ import annotations

from lazarus.render.base.escape import escaped
from lazarus.render.base.words import counted, loading
from lazarus.render.series.summary import kl, summary_lines, verdict
from lazarus.results import SeriesMember, SeriesRecord

HEADER = "Model                                    Divergence  Layer         KL    Verdict"
RULE = "-" * 80


def comparing(n_members: int, n_prompts: int) -> str:
    """Return how many models are compared, and on how many prompts."""
    return f"Comparing {counted(n_members, 'model')}\nTesting {counted(n_prompts, 'prompt')}"


def table(record: SeriesRecord) -> str:
    """The table, a row a member."""
    return "\n".join([HEADER, RULE, *(_row(record, member) for member in record.members)])


def summary(record: SeriesRecord) -> str:
    """The findings, a line each, what else a reader needs, and the notes."""
    notes = [f"Note: {escaped(note)}" for note in record.notes]
    return "\n".join([*summary_lines(record), *notes])


def page(record: SeriesRecord) -> str:
    """All of it, as the command line prints it."""
    head = [loading("base", record.base.id), comparing(len(record.members), len(record.prompts))]
    return "\n\n".join(["\n".join(head), table(record), summary(record)])


def _row(record: SeriesRecord, member: SeriesMember) -> str:
    found = member.summary
    divergence = float("nan") if found.max_divergence is None else found.max_divergence
    layer = "-" if found.most_divergent_layer is None else found.most_divergent_layer
    nats = kl(member)
    nats = float("nan") if nats is None else nats
    name = escaped(member.model.id)
    return f"{name:<40} {divergence:>10.4f} {layer:>6} {nats:>10.4f}    {verdict(record, member)}"
