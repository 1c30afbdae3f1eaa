"""The summary under the table: what the numbers say together, in at most eight plain lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from lazarus.render.base.escape import escaped
from lazarus.render.base.words import counted, short
from lazarus.results import Spectrum, TensorRecord, UnmatchedTensor, WeightDiffRecord, differing, told

MOST_LINES = 8
NAMED = 3
NAME_CHARACTERS = 80
ROW_DECIMALS = 6
ACCEPTED = "accepted by --expect identical"
_MANY = "changed matrices"


def summary_lines(record: WeightDiffRecord) -> list[str]:
    """At most eight lines, the most important ones; the JSON has all of it."""
    lines = [
        f"Verdict: {verdict(record)}",
        *_most_changed(record),
        *_threshold(record),
        *_numbers(record),
        *_unmatched(record),
        *_quantised(record),
        *_update(record),
        *_unmeasured(record),
        *_too_small(record),
    ]
    return [escaped(line) for line in lines]


def verdict(record: WeightDiffRecord) -> str:
    """The verdict in a sentence or two, and for what reason nothing may have changed."""
    found = record.summary
    others = told(differing(record.base.not_compared, record.finetuned.not_compared))
    causes = escaped("; ".join(found.causes))
    match found.verdict:
        case "identical" if others:
            return f"identical in what was compared: {_the_same(found.n_tensors)}; {others}"
        case "identical":
            likely = f". Likely cause: {causes}" if causes else ""
            return f"IDENTICAL, nothing changed: {_the_same(found.n_tensors)}{likely}"
        case "rounding" if others:
            return f"rounding in what was compared: {differ(record)}, by rounding alone: {causes}; {others}"
        case "rounding":
            return f"rounding: {differ(record)}, by rounding alone: {causes} ({ACCEPTED})"
    if not found.n_changed_tensors:
        same = _the_same(found.n_tensors) if found.n_tensors else "no tensor is in both"
        return f"changed: {same}, but {_reasons(record)}"
    overall = found.relative_change
    how_much = "" if overall is None else f", relative change {short(overall)} overall"
    return f"changed: {differ(record)}{how_much}"


def _reasons(record: WeightDiffRecord) -> str:
    """Return why two models whose tensors have the same bits are not the same."""
    found = record.summary
    have = "has" if found.n_moved_tokens == 1 else "have"
    moved = [f"{counted(found.n_moved_tokens, 'token')} {have} another id"] if found.n_moved_tokens else []
    parted = [without_counterpart(found.n_unmatched)] if found.n_unmatched or not moved else []
    return " and ".join([*moved, *parted])


def differ(record: WeightDiffRecord) -> str:
    """Return how many tensors differ: `3 of 272 tensors differ`."""
    changed, whole = record.summary.n_changed_tensors, record.summary.n_tensors
    return f"{changed:,} of {counted(whole, 'tensor')} differ{'s' if changed == 1 else ''}"


def place(row: TensorRecord | UnmatchedTensor) -> str:
    """Return where a tensor is: `layer 11 mlp_down`, or `embed`."""
    component = cut(row.component)
    return component if row.layer is None else f"layer {row.layer} {component}"


def cut(name: str) -> str:
    """A name of a tensor or component that stays on its line, cut where it is very long.

    >>> cut("mlp_down"), cut("x" * 100) == "x" * 79 + "…"
    ('mlp_down', True)
    """
    text = escaped(name)
    return text if len(text) <= NAME_CHARACTERS else f"{text[: NAME_CHARACTERS - 1]}…"


def without_counterpart(count: int) -> str:
    """Return how many tensors could not be compared, or not in full."""
    return f"{counted(count, 'tensor')} {'has' if count == 1 else 'have'} no counterpart of the same shape"


def n_elements(row: TensorRecord) -> int:
    """Return how many elements a tensor has."""
    return math.prod(row.shape)


def spectra(record: WeightDiffRecord) -> list[Spectrum]:
    """The spectra of the changed matrices, in the model's order."""
    return [row.spectrum for row in record.results if row.spectrum is not None]


def update(record: WeightDiffRecord) -> str:
    """Return whether the changed matrices look like a low-rank adapter's; there is at least one spectrum."""
    known = [s for s in spectra(record) if s.rounding_norm is not None]
    n_quantised = len(spectra(record)) - len(known)
    if not known:
        return f"not known whether it looks like an adapter's: the {_MANY} are quantised"
    return _looks(known) + (f"; not known of {n_quantised:,} quantised ones" if n_quantised else "")


def _looks(found: Sequence[Spectrum]) -> str:
    low = [s.adapter_rank for s in found if s.adapter_rank is not None]
    count = len(found)
    if not low:
        who = "the one changed matrix does not look" if count == 1 else f"none of the {count:,} {_MANY} looks"
        return f"{who} like a low-rank adapter's"
    ranks = f"rank {max(low)}" if min(low) == max(low) else f"ranks {min(low)} to {max(low)}"
    if count == 1:
        return f"the one changed matrix looks like a low-rank adapter's, {ranks}"
    many = f"all {count:,}" if len(low) == count else f"{len(low):,} of {count:,}"
    return f"{many} {_MANY} look{'s' if len(low) == 1 else ''} like a low-rank adapter's, {ranks}"


def _the_same(count: int) -> str:
    if not count:
        return "there is no tensor to compare"
    return "the one tensor has the same bits" if count == 1 else f"all {count:,} tensors have the same bits"


def _most_changed(record: WeightDiffRecord) -> list[str]:
    found = record.summary
    first = found.first_changed_layer
    if not found.most_changed:
        return [] if first is None else [f"First changed layer: {first}"]
    row = record.results[found.most_changed[0]]
    line = f"Most changed: {place(row)} (relative change {short(row.relative_change)})"
    return [line if first is None else f"{line}; first changed layer: {first}"]


def _threshold(record: WeightDiffRecord) -> list[str]:
    threshold, found = record.settings.threshold, record.summary
    if not found.n_changed_tensors:
        return []
    if not found.n_flagged_tensors:
        return [f"No tensor above the threshold of {threshold:g}"]
    return [f"Above {threshold:g}: {found.n_flagged_tensors:,} of {counted(found.n_tensors, 'tensor')}"]


def _numbers(record: WeightDiffRecord) -> list[str]:
    changed, total = sum(row.n_changed for row in record.results), sum(map(n_elements, record.results))
    if not changed:
        return []
    return [f"Numbers changed: {changed:,} of {total:,} ({percent(changed, total)})"]


def percent(part: int, whole: int) -> str:
    """A share that is never shown as nothing or as all of it where it is not.

    >>> percent(1, 10**9), percent(10**9 - 1, 10**9), percent(7, 7), percent(1, 3)
    ('below 0.01 %', 'above 99.99 %', '100 %', '33.33 %')
    """
    share = 100 * part / whole
    if part == whole:
        return "100 %"
    if part and share < 0.01:
        return "below 0.01 %"
    return "above 99.99 %" if share > 99.99 else f"{share:.2f} %"


def _unmatched(record: WeightDiffRecord) -> list[str]:
    if not record.unmatched:
        return []
    told = without_counterpart(len(record.unmatched))
    named = [f"{cut(found.name)} ({_why(found)})" for found in record.unmatched]
    return [f"Not compared in full: {told}: {_listed(named)}"]


def _why(found: UnmatchedTensor) -> str:
    if found.base_shape is None:
        return "only in fine-tuned"
    if found.finetuned_shape is None:
        return "only in base"
    if found.rows_alone is not None and found.base_shape == found.finetuned_shape:
        ours, theirs = found.rows_alone
        return f"{counted(ours, 'row')} only in base, {theirs:,} only in fine-tuned"
    return f"{shape_text(found.base_shape)} in base, {shape_text(found.finetuned_shape)} in fine-tuned"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as text.

    >>> shape_text([576, 1536]), shape_text([])
    ('576x1536', 'scalar')
    """
    return "x".join(map(str, shape)) or "scalar"


def _update(record: WeightDiffRecord) -> list[str]:
    found = spectra(record)
    if not found:
        return []
    line = f"Update: {update(record)}"
    effective = [s.effective_rank for s in found if s.effective_rank is not None]
    if effective:
        line += f"; median effective rank {median(effective):.1f}"
    ranks = [s.rank_90 for s in found if s.rank_90 is not None]
    if ranks:
        line += f"; 90 % of the change in rank {median(ranks):g} (median)"
    return [line]


def _quantised(record: WeightDiffRecord) -> list[str]:
    """Return what the quantisation did: the error of all, and the tensors of which it is largest."""
    known = [(row, q) for row in record.results if (q := row.quantisation) is not None]
    errors = [q.relative_error for _, q in known if q.relative_error is not None]
    if not errors:
        return []
    bits = sorted({q.bits for _, q in known})
    said = f"{bits[0]} bits" if len(bits) == 1 else f"{bits[0]} to {bits[-1]} bits"
    worst = sorted(known, key=lambda each: -(each[1].relative_error or 0.0))[:NAMED]
    named = ", ".join(f"{place(row)} ({short(q.relative_error)})" for row, q in worst)
    ratios = [q.error_ratio for _, q in known if q.error_ratio is not None]
    of_nearest = f", {median(ratios):.2f} of rounding to nearest" if ratios else ""
    tensors = counted(len(known), "tensor")
    return [
        f"Quantised: {tensors} in {said}, error {short(median(errors))} (median){of_nearest}; most in {named}"
    ]


def _unmeasured(record: WeightDiffRecord) -> list[str]:
    """Rows that print nan, and why."""
    rows = [row for row in record.results if row.relative_change is None]
    if not rows:
        return []
    zero = sum(row.base_norm == 0 for row in rows)
    reasons = {"base is all zero": zero, "not finite": len(rows) - zero}
    why = ", ".join(
        reason if count == len(rows) else f"{reason} in {count:,}"
        for reason, count in reasons.items()
        if count
    )
    told = f"Without a relative change, printed as nan: {counted(len(rows), 'tensor')} ({why})"
    return [f"{told}: {_listed([place(row) for row in rows])}"]


def _too_small(record: WeightDiffRecord) -> list[str]:
    """Rows that a reader of six decimals would take for unchanged."""
    rows = [row for row in record.results if row.n_changed and _prints_as_zero(row)]
    if not rows:
        return []
    return [f"Changed nonetheless, though printed as 0.000000: {counted(len(rows), 'row')}"]


def _prints_as_zero(row: TensorRecord) -> bool:
    return row.relative_change is not None and float(f"{row.relative_change:.{ROW_DECIMALS}f}") == 0


def _listed(names: Sequence[str]) -> str:
    others = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {others:,} more" if others > 0 else "")
