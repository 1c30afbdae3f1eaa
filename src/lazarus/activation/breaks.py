"""States and logits that are not finite: in which of the two models, from where on, and why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lazarus.activation.accumulation import Accumulation
from lazarus.engine import (
    ModelPair,
    broken_weights,
    faulty_weights,
    find_break,
    note_of_absurd,
    note_of_weights,
)
from lazarus.facts import Site
from lazarus.messages import option
from lazarus.notes import Notes
from lazarus.reading import Reading
from lazarus.results import BROKEN, NotCompared


def note_breaks(pair: ModelPair, seen: Accumulation, reading: Reading, notes: Notes) -> None:
    """Note each model that gave states or logits that are not finite, and why.

    The first prompt that shows it runs again through that model, alone.
    """
    counts: dict[Site, np.ndarray] = {site: seen.sites[site].n_not_finite for site in pair.sites}
    counts["logits"] = seen.n_logits_not_finite
    names = seen.facts.names
    # Under the names of the result: by role as well, where both models have one name.
    models = (
        (replace(pair.base, name=names[0]), pair.base_conventions, reading.base),
        (replace(pair.finetuned, name=names[1]), pair.finetuned_conventions, reading.finetuned),
    )
    for side, (model, conventions, prompts) in enumerate(models):
        # `counts` is in the order in which the states pass the sites: what is not finite begins at the first.
        first = next((site for site, found in counts.items() if found[side].any()), None)
        if first is None:
            continue
        prompt = int(np.flatnonzero(counts[first][side])[0])
        found = find_break(model, prompts[prompt].ids, conventions.axes[1], conventions.head_reads)
        if found is not None:
            notes.extend([found.note(model, f"prompt {prompt}")])
            continue
        if broken_weights(model):
            continue  # which is told already
        if first == "logits" and seen.plan.scored is not None:
            notes.add(
                "not-finite",
                f"{model.name}: its head makes of prompt {prompt} what is not finite, though the states are: "
                f"try {option('dtype', 'float32')}",
                model=model.name,
                prompts=[prompt],
            )
            continue
        what = "logits are" if first == "logits" else f"states are, from {_place(first)} on,"
        notes.add(
            "not-finite",
            f"{model.name}: its {what} not finite in a batch, and are where prompt {prompt} runs alone: try "
            f"another {option('batch_tokens')}, or {option('dtype', 'float32')}",
            model=model.name,
            prompts=[prompt],
        )


def broken_parts(
    pair: ModelPair, names: tuple[str, str], notes: Notes
) -> tuple[list[NotCompared], list[NotCompared]]:
    """Return the weights that hold NaN or infinity, as what was not compared of each model, and note them.

    Weights of absurd magnitudes are noted too.

    Some kernels pass over NaN and others do not, so a result from such weights measures nothing.
    """
    parts: tuple[list[NotCompared], list[NotCompared]] = ([], [])
    for side, name, model in zip(parts, names, (pair.base, pair.finetuned), strict=True):
        faulty = faulty_weights(model)
        if absurd := [each for each, fault in faulty.items() if fault == "absurd"]:
            notes.extend([note_of_absurd(replace(model, name=name), absurd)])
        if broken := [each for each, fault in faulty.items() if fault == "not finite"]:
            what = f"{BROKEN} ({broken[0]})" if len(broken) == 1 else f"{BROKEN} ({broken[0]} and others)"
            side.append(NotCompared(what=what, n_tensors=len(broken), differs=None))
            notes.extend([note_of_weights(replace(model, name=name), broken)])
    return parts


def _place(site: Site) -> str:
    return f"layer {site}" if isinstance(site, int) else str(site).replace("_", " ")
