"""Which of the two models has states or logits that are not finite, from where on, and why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lazarus.engine import ModelPair, Site, broken_weights, find_break, told_of_weights
from lazarus.measure import Measured
from lazarus.models import LoadedModel
from lazarus.reading import Reading
from lazarus.results import BROKEN, NotCompared


def break_notes(pair: ModelPair, measured: Measured, reading: Reading) -> list[str]:
    """Return a sentence on each model that gave states or logits that are not finite.

    The first prompt that shows it runs again through that model, alone.
    """
    counts: dict[Site, np.ndarray] = {site: measured.sites[site].n_not_finite for site in pair.sites}
    counts["logits"] = measured.n_logits_not_finite
    base, finetuned = told_apart(pair)
    models = (
        (base, pair.base_conventions, reading.base),
        (finetuned, pair.finetuned_conventions, reading.finetuned),
    )
    notes = []
    for side, (model, conventions, prompts) in enumerate(models):
        first = next((site for site, found in counts.items() if found[side].any()), None)
        if first is None:
            continue
        prompt = int(np.flatnonzero(counts[first][side])[0])
        found = find_break(model, prompts[prompt].ids, conventions.axes[1], conventions.head_reads)
        if found is not None:
            notes.append(found.told(model, f"prompt {prompt}"))
            continue
        if broken_weights(model):
            continue  # which is told already
        what = "logits are" if first == "logits" else f"states are, from {_place(first)} on,"
        notes.append(
            f"{model.name}: its {what} not finite in a batch, and are where prompt {prompt} runs alone: try "
            "another --batch-tokens, or --dtype float32"
        )
    return notes


def broken_parts(pair: ModelPair) -> tuple[tuple[list[NotCompared], list[NotCompared]], list[str]]:
    """Return the weights that hold NaN or infinity, as what was not compared of each model, and notes.

    Some kernels leave NaN out, and others do not: numbers that come of such weights are no measure.
    """
    parts: tuple[list[NotCompared], list[NotCompared]] = ([], [])
    notes = []
    for side, model in zip(parts, told_apart(pair), strict=True):
        if names := broken_weights(model):
            what = f"{BROKEN} ({names[0]})" if len(names) == 1 else f"{BROKEN} ({names[0]} and others)"
            side.append(NotCompared(what=what, n_tensors=len(names), differs=None))
            notes.append(told_of_weights(model, names))
    return parts, notes


def told_apart(pair: ModelPair) -> tuple[LoadedModel, LoadedModel]:
    """Return both models with names of their own: in memory, both may go by the name of one class."""
    if pair.base.name != pair.finetuned.name:
        return pair.base, pair.finetuned
    roles = ("base", pair.base), ("fine-tuned", pair.finetuned)
    base, finetuned = (replace(model, name=f"{role} ({model.name})") for role, model in roles)
    return base, finetuned


def _place(site: Site) -> str:
    return f"layer {site}" if isinstance(site, int) else str(site).replace("_", " ")
