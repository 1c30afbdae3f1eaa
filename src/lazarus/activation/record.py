"""Make the record of a comparison from what was accumulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import msgspec
import numpy as np

from lazarus.activation.accumulation import Accumulation
from lazarus.activation.findings import Findings
from lazarus.activation.limits import limits
from lazarus.activation.traces import Read, trace_tokens
from lazarus.errors import NoDataError
from lazarus.faces import ActivationDiff
from lazarus.facts import NOTHING_KNOWN, WeightFacts
from lazarus.provenance import environment, now, tool
from lazarus.results import (
    SCHEMA_VERSION,
    ActivationDiffRecord,
    Environment,
    LayerRecord,
    Readout,
    SiteRecord,
)
from lazarus.tokens import listed


@dataclass(frozen=True)
class About:
    """Facts on a comparison that its record tells beside the numbers; by default none."""

    environment: Environment | None = None
    """the software and the hardware; None for those of this process"""
    notes: Sequence[str] = ()
    breaks: Sequence[str] = ()
    """why states of a model are not finite, where they are not"""
    readout: list[Readout] | None = None
    read: Read | None = None
    """the tokens of a prompt, where every token of some is kept"""
    chooses_prompts: bool = False
    """whether of the traced prompts only the most divergent are told"""


NOTHING_TO_SAY = About()


def conclude(
    seen: Accumulation, weights: WeightFacts = NOTHING_KNOWN, about: About = NOTHING_TO_SAY
) -> ActivationDiff:
    """Return the result of a comparison.

    Raises:
        NoDataError: no layer has one finite pair of states.
    """
    found, pair, plan = Findings(seen, weights), seen.facts, seen.plan
    if pair.same_width and not any(seen.sites[layer].means.n_rows.any() for layer in found.layers):
        raise NoDataError(_why_no_data(list(dict.fromkeys(about.breaks))))
    layers = [_layer(found, layer) for layer in found.layers]
    notes = [*about.notes, *_exclusions(seen), *about.breaks, *limits(found, layers)]
    return ActivationDiff(
        ActivationDiffRecord(
            schema_version=SCHEMA_VERSION,
            command="activation-diff",
            tool=tool(),
            created=now(),
            base=pair.base.info,
            finetuned=pair.finetuned.info,
            settings=msgspec.structs.replace(plan.settings, noise_floor=bool(seen.noise)),
            environment=about.environment or environment(),
            prompts=list(plan.prompts),
            layers=layers,
            sites=[
                SiteRecord(name=site, **found.measures(site))
                for site in ("embedding", "final_norm")
                if site in pair.sites
            ],
            results=found.rows(),
            summary=found.summary(),
            output=found.output,
            readout=about.readout,
            groups=found.groups(),
            tokens=trace_tokens(found, about.read, choose=about.chooses_prompts) if about.read else None,
            notes=list(dict.fromkeys(notes)),
        )
    )


def _layer(found: Findings, layer: int) -> LayerRecord:
    matched = found.pair.matched[layer]
    return LayerRecord(
        layer=layer, finetuned_layer=None if matched == layer else matched, **found.measures(layer)
    )


def _exclusions(seen: Accumulation) -> list[str]:
    """Return what was left out because a state was zero or not finite: which layers, which prompts."""
    notes = []
    left_out = [
        (str(site), tuple(np.flatnonzero(seen.sites[site].means.n_excluded))) for site in seen.facts.sites
    ]
    for prompts, places in groupby(left_out, key=lambda item: item[1]):
        names = [name for name, _ in places]
        if prompts:
            where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            notes.append(
                f"layer {where}: states that are zero or not finite were left out, in "
                f"{len(prompts)} of {seen.n_prompts} prompts: {listed([int(p) for p in prompts])}"
            )
    return notes


def _why_no_data(broken: Sequence[str]) -> str:
    start = "No layer has one pair of states that are finite and not zero."
    if not broken:
        return f"{start} The states of one of the models are all zero: fetch or train it again."
    return f"{start} {'. '.join(broken)}."
