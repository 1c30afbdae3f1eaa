"""Notes on the numbers themselves: too few prompts, a cosine that one dimension carries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lazarus.activation.findings import Findings
from lazarus.metrics import MOST_KEPT
from lazarus.notes import Notes
from lazarus.results import LayerRecord
from lazarus.statistics import MIN_PROMPTS
from lazarus.tokens import listed

FEW_PROMPTS = 30
LITTLE_LOST = 0.05
"""A share of an adapter's update that may be lost in the rounding of a merge without a note."""


def note_limits(found: Findings, layers: Sequence[LayerRecord], notes: Notes) -> None:
    """Note what could not be measured, and numbers that say less than they seem to."""
    _few_prompts(found, notes)
    _baseline(found, layers, notes)
    _shares(layers, notes)
    _noise(found, notes)
    _rounding(found, notes)
    _output(found, notes)
    _outputs_left_out(found, notes)
    if found.n_prompts > MOST_KEPT:
        notes.add("cka-sample", f"CKA is of {MOST_KEPT} of the {found.n_prompts} prompts")


def _few_prompts(found: Findings, notes: Notes) -> None:
    n_prompts = found.n_prompts
    if n_prompts < MIN_PROMPTS:
        notes.add("few-prompts", f"no interval and no onset: they need {MIN_PROMPTS} prompts")
    elif n_prompts < FEW_PROMPTS:
        notes.add(
            "few-prompts",
            f"{n_prompts} prompts: intervals of so few are rough; from {FEW_PROMPTS} on they can be trusted",
        )


def _baseline(found: Findings, layers: Sequence[LayerRecord], notes: Notes) -> None:
    if found.n_prompts < 2 or not found.pair.same_width:
        return
    # A baseline without a normalised divergence: 1 − A was too small to divide by.
    close = [
        r.layer for r in layers if r.unrelated_similarity is not None and r.normalized_divergence is None
    ]
    if close:
        notes.add(
            "alike-prompts",
            f"layer {ranges(close)}: unrelated prompts are all but the same at the compared tokens, so no "
            "normalised divergence is given there",
            layers=close,
        )


def _shares(layers: Sequence[LayerRecord], notes: Notes) -> None:
    heavy = [layer.layer for layer in layers if (layer.top1_share or 0) > 0.5]
    if heavy:
        notes.add(
            "dominant-dimension",
            f"layer {ranges(heavy)}: one dimension carries more than half of the mean cosine, which says "
            "little of the others; see normalized_divergence",
            layers=heavy,
        )


def _noise(found: Findings, notes: Notes) -> None:
    if not found.pair.same_width:
        return
    if not found.floors:
        text = "the noise floor was not measured: no verdict but identical can be given, and no onset"
        notes.add("noise-not-measured", text)
        return
    unknown = [site for site in found.pair.sites if site not in found.floors]
    if unknown:
        notes.add(
            "noise-not-measured",
            f"the noise could not be measured at {', '.join(map(str, unknown))} (states that are zero or not "
            "finite, in every trial): differences there make no verdict",
            layers=[site for site in unknown if isinstance(site, int)],
        )


def _rounding(found: Findings, notes: Notes) -> None:
    """Note the part of an adapter's update that a merge in 16 bits kept, or that it was not looked into."""
    pair = found.pair
    if found.verdict == "changed" and found.settings.memory == "stream":
        # An adapter on both, or on none: no merge is held against its parts.
        if (pair.base.info.adapter is None) == (pair.finetuned.info.adapter is None):
            return
        notes.add(
            "rounded-merge",
            "whether one is the other one merged and rounded was not looked into: that takes both in memory. "
            "weight-diff tells it from the files",
        )
        return
    kept = None if found.rounding is None else found.rounding.kept
    if found.rounding is None or kept is None or abs(kept - 1) < LITTLE_LOST:
        return
    notes.add(
        "rounded-merge",
        f"rounding to {found.rounding.dtype} has kept {kept:.0%} of the adapter's update: the rest is below "
        "half a unit in the last place of the weights. A merge in float32 keeps all of it",
    )


def _output(found: Findings, notes: Notes) -> None:
    pair = found.pair
    if found.output is not None:
        kinds = {
            "KL(base‖fine-tuned)": (found.output.kl_base_finetuned, "fine-tuned"),
            "KL(fine-tuned‖base)": (found.output.kl_finetuned_base, "base"),
        }
        for name, (value, model) in kinds.items():
            # JSON has no ∞, so it is None here; a JS divergence, always finite, tells that there were rows.
            if value is None and found.output.js is not None:
                notes.add(
                    "infinite-kl",
                    f"{name} is infinite, and null in JSON: {model} gives the probability 0 to tokens that "
                    "the other can give",
                )
    elif (
        found.scored
        or pair.why_no_scores
        or (pair.align == "ids" and pair.base.is_causal and pair.finetuned.is_causal)
    ):
        why = _why_no_output(found)
        notes.add("output-not-measured", f"{why}: the effect on the output was not measured")


def _why_no_output(found: Findings) -> str:
    pair, counts = found.pair, found.seen.n_logits_not_finite
    broken = [name for name, count in zip(pair.names, counts, strict=True) if count.any()]
    if pair.why_no_scores is not None:
        return pair.why_no_scores
    if broken:
        return f"the logits of {' and '.join(broken)} are not finite"
    whys = (pair.base.why_no_head, pair.finetuned.why_no_head)
    return next((why for why in whys if why is not None), "no logits were given")


def _outputs_left_out(found: Findings, notes: Notes) -> None:
    left_out = found.seen.output.n_excluded.nonzero()[0].tolist()
    if found.output is not None and left_out:
        notes.add(
            "logits-left-out",
            f"logits that are not finite were left out, in {len(left_out)} of {found.n_prompts} "
            f"prompts: {listed(left_out)}",
            prompts=left_out,
        )


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as ranges.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0 to 2, 5, 7 to 8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
