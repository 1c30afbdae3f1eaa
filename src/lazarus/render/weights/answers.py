"""Four questions of a reader in a hurry, each with its answer."""

from __future__ import annotations

from lazarus.render.base.escape import escaped
from lazarus.render.base.frame import Answer
from lazarus.render.base.words import counted, short
from lazarus.render.weights.grid import kind_of, pooled_change
from lazarus.render.weights.summary import cut, differ, spectra, update, verdict, without_counterpart
from lazarus.results import TensorRecord, WeightDiffRecord, differing
from lazarus.results import told as outside


def headline(record: WeightDiffRecord) -> str:
    """The verdict as a sentence of its own."""
    said = verdict(record)
    return said[0].upper() + said[1:]


def answers(record: WeightDiffRecord) -> list[Answer]:
    """Did anything change, where, which components, and does it look like an adapter."""
    return [_whether(record), _where(record), _which(record), _adapter(record)]


def _whether(record: WeightDiffRecord) -> Answer:
    question, found = "Did anything change?", record.summary
    others = outside(differing(record.base.not_compared, record.finetuned.not_compared))
    if found.verdict == "identical" and others:
        return Answer(question, "Not in what was compared", f"But {escaped(others)}.")
    if found.verdict == "identical":
        causes = "; ".join(found.causes)
        told = f" Likely cause: {escaped(causes)}." if causes else ""
        return Answer(question, "No", f"Bit for bit the same in {counted(found.n_tensors, 'tensor')}.{told}")
    if found.verdict == "rounding":
        causes = "; ".join(found.causes)
        but = f" But {escaped(others)}." if others else ""
        return Answer(question, "Only by rounding", f"{differ(record)}: {escaped(causes)}.{but}")
    told = f"{differ(record)} in at least one bit."
    if found.n_unmatched:
        told += f" {without_counterpart(found.n_unmatched)}."
    return Answer(question, "Yes", told)


def _where(record: WeightDiffRecord) -> Answer:
    question = "Where?"
    if not record.summary.n_changed_tensors:
        return Answer(question, "Nowhere", "No tensor that both have differs.")
    known = [(layer.relative_change, layer.layer) for layer in record.layers if layer.relative_change]
    if not known:
        is_inside = record.summary.first_changed_layer is not None
        place = f"From layer {record.summary.first_changed_layer}" if is_inside else "Outside the layers"
        told = "No layer has a relative change; see the notes." if is_inside else "No layer changed."
        return Answer(question, place, told)
    change, layer = max(known, key=lambda pair: (pair[0] or 0.0, -pair[1]))
    n_changed = sum(found.n_changed_tensors > 0 for found in record.layers)
    reason = f"Relative change {short(change)} of all its tensors together, the largest of "
    reason += f"{counted(len(known), 'layer')}; {n_changed:,} of {len(record.layers):,} changed."
    return Answer(question, f"Layer {layer}", reason)


def _which(record: WeightDiffRecord) -> Answer:
    question = "Which components?"
    groups: dict[str, list[TensorRecord]] = {}
    for row in record.results:
        groups.setdefault(kind_of(row.component), []).append(row)
    changes = {name: pooled_change(rows) for name, rows in groups.items()}
    known = {name: change for name, change in changes.items() if change}
    if not record.summary.n_changed_tensors:
        return Answer(question, "None", "No component changed.")
    if not known:
        return Answer(question, "Not known", "No component has a relative change; see the notes.")
    most = max(known, key=lambda name: known[name])
    n_changed = sum(any(row.n_changed for row in rows) for rows in groups.values())
    own = sum(row.n_changed > 0 for row in groups[most])
    reason = f"Relative change {short(known[most])} over its {counted(own, 'changed tensor')}, the largest; "
    return Answer(
        question, cut(most), f"{reason}{n_changed:,} of {counted(len(groups), 'component')} changed."
    )


def _adapter(record: WeightDiffRecord) -> Answer:
    question, found = "Does it look like an adapter?", spectra(record)
    if not record.settings.spectrum:
        return Answer(
            question, "Not measured", "Run with --spectrum: it takes the singular values of each change."
        )
    if not found:
        return Answer(question, "No", "No matrix changed.")
    if all(spectrum.rounding_norm is None for spectrum in found):
        return Answer(
            question, "Not known", "The changed matrices are quantised: what that adds is not known."
        )
    ranks = [spectrum.adapter_rank for spectrum in found if spectrum.adapter_rank is not None]
    told = update(record)
    reason = f"{told[0].upper()}{told[1:]}."
    if not ranks:
        return Answer(question, "No", reason)
    if len(ranks) < len(found):
        return Answer(question, "In part", reason)
    return Answer(question, f"Yes, rank {max(ranks)}", reason)
