"""Notes on the numbers themselves: too few prompts, a cosine that one dimension carries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lazarus.activation.findings import Findings
from lazarus.metrics import MOST_KEPT
from lazarus.results import LayerRecord
from lazarus.statistics import MIN_PROMPTS
from lazarus.tokens import listed

FEW_PROMPTS = 30
LITTLE_LOST = 0.05
"""A share of an adapter's update that may be lost in the rounding of a merge without a note."""


def limits(found: Findings, layers: Sequence[LayerRecord]) -> list[str]:
    """Notes on what could not be measured, and on numbers that say less than they seem to."""
    return [
        *_few_prompts(found),
        *_baseline(found, layers),
        *_shares(layers),
        *_noise(found),
        *_rounding(found),
        *_output(found),
        *_outputs_left_out(found),
        *_cka(found),
    ]


def _few_prompts(found: Findings) -> list[str]:
    n_prompts = found.n_prompts
    if n_prompts < MIN_PROMPTS:
        return [f"no interval and no onset: they need {MIN_PROMPTS} prompts"]
    if n_prompts < FEW_PROMPTS:
        return [
            f"{n_prompts} prompts: intervals of so few are rough; from {FEW_PROMPTS} on they can be trusted"
        ]
    return []


def _baseline(found: Findings, layers: Sequence[LayerRecord]) -> list[str]:
    if found.n_prompts < 2 or not found.pair.same_width:
        return []
    close = [
        r.layer for r in layers if r.unrelated_similarity is not None and r.normalized_divergence is None
    ]
    if not close:
        return []
    return [
        f"layer {ranges(close)}: unrelated prompts are all but the same at the compared tokens, so no "
        "normalised divergence is given there"
    ]


def _shares(layers: Sequence[LayerRecord]) -> list[str]:
    heavy = [layer.layer for layer in layers if (layer.top1_share or 0) > 0.5]
    if not heavy:
        return []
    return [
        f"layer {ranges(heavy)}: one dimension carries more than half of the mean cosine, which says little "
        "of the others; see normalized_divergence"
    ]


def _noise(found: Findings) -> list[str]:
    if not found.pair.same_width:
        return []
    if not found.floors:
        return ["the noise floor was not measured: no verdict but identical can be given, and no onset"]
    unknown = [str(site) for site in found.pair.sites if site not in found.floors]
    if not unknown:
        return []
    return [
        f"the noise could not be measured at {', '.join(unknown)} (states that are zero or not finite, in "
        "every trial): differences there make no verdict"
    ]


def _rounding(found: Findings) -> list[str]:
    """The part of an adapter's update that a merge in 16 bits kept, or that it was not looked into."""
    pair = found.pair
    if found.verdict == "changed" and found.settings.memory == "stream":
        if (pair.base.info.adapter is None) == (pair.finetuned.info.adapter is None):
            return []
        return [
            "whether one is the other one merged and rounded was not looked into: that takes both in memory. "
            "weight-diff tells it from the files"
        ]
    if found.rounding is None or found.rounding.kept is None:
        return []
    if abs(found.rounding.kept - 1) < LITTLE_LOST:
        return []
    return [
        f"rounding to {found.rounding.dtype} has kept {found.rounding.kept:.0%} of the adapter's update: the "
        "rest is below half a unit in the last place of the weights. A merge in float32 keeps all of it"
    ]


def _output(found: Findings) -> list[str]:
    pair = found.pair
    if found.output is not None:
        kinds = {
            "KL(base‖fine-tuned)": (found.output.kl_base_finetuned, "fine-tuned"),
            "KL(fine-tuned‖base)": (found.output.kl_finetuned_base, "base"),
        }
        infinite = [(name, model) for name, (value, model) in kinds.items() if value is None]
        return [
            f"{name} is infinite, and null in JSON: {model} gives the probability 0 to tokens that the "
            "other can give"
            for name, model in infinite
            if found.output.js is not None
        ]
    if pair.align == "text" or not (pair.base.is_causal and pair.finetuned.is_causal):
        return []
    return [f"{_why_no_output(found)}: the effect on the output was not measured"]


def _why_no_output(found: Findings) -> str:
    pair, counts = found.pair, found.seen.n_logits_not_finite
    broken = [name for name, count in zip(pair.names, counts, strict=True) if count.any()]
    if broken:
        return f"the logits of {' and '.join(broken)} are not finite"
    whys = (pair.base.why_no_head, pair.finetuned.why_no_head)
    return next((why for why in whys if why is not None), "no logits were given")


def _outputs_left_out(found: Findings) -> list[str]:
    left_out = found.seen.output.n_excluded.nonzero()[0].tolist()
    if found.output is None or not left_out:
        return []
    return [
        f"logits that are not finite were left out, in {len(left_out)} of {found.n_prompts} "
        f"prompts: {listed(left_out)}"
    ]


def _cka(found: Findings) -> list[str]:
    n_prompts = found.n_prompts
    return [f"CKA is of {MOST_KEPT} of the {n_prompts} prompts"] if n_prompts > MOST_KEPT else []


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
