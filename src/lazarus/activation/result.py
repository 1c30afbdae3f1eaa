"""Make the record of a comparison from what was accumulated."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import msgspec
import numpy as np
from numpy.typing import NDArray

from lazarus.activation.accumulation import Accumulation
from lazarus.activation.attributed import Attributed
from lazarus.activation.findings import Findings
from lazarus.activation.limits import note_limits
from lazarus.activation.traces import Reader, trace_tokens
from lazarus.errors import NoDataError
from lazarus.facts import NOTHING_KNOWN, WeightFacts
from lazarus.notes import Notes
from lazarus.provenance import environment, now, tool
from lazarus.result_classes import ActivationDiff
from lazarus.results import (
    SCHEMA_VERSION,
    ActivationDiffRecord,
    ComponentRecord,
    Environment,
    LayerRecord,
    Mined,
    Readout,
    SiteRecord,
)
from lazarus.tokens import listed

MOST_NAMED = 6
"""Components that a note names."""


@dataclass(frozen=True)
class About:
    """Facts on a comparison that its record tells beside the numbers; by default none."""

    environment: Environment | None = None
    """the software and the hardware; None for those of this process"""
    notes: Notes = field(default_factory=Notes)
    breaks: Notes = field(default_factory=Notes)
    """why states of a model are not finite, where they are not, with options as errors have them"""
    mined: Mined | None = None
    readout: list[Readout] | None = None
    attributed: Attributed | None = None
    reader: Reader | None = None
    """the text of tokens, where every token of some prompts is kept"""
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
    # Of two widths no rows are measured, and CKA is all there is.
    if pair.same_width and not any(seen.sites[layer].means.n_rows.any() for layer in found.layers):
        raise NoDataError(_why_no_data(about.breaks.texts))
    layers = [_layer(found, layer) for layer in found.layers]
    notes = Notes(about.notes)
    _note_exclusions(seen, notes)
    _note_components(seen, notes)
    notes.extend(about.breaks)
    note_limits(found, layers, notes)
    return ActivationDiff(
        ActivationDiffRecord(
            schema_version=SCHEMA_VERSION,
            command="activation-diff",
            tool=tool(),
            created=now(),
            base=pair.base.info,
            finetuned=pair.finetuned.info,
            # What was measured, not what was asked for.
            settings=msgspec.structs.replace(plan.settings, noise_floor=bool(seen.noise)),
            environment=about.environment or environment(),
            prompts=list(plan.prompts),
            layers=layers,
            sites=[
                SiteRecord(name=site, **found.measures(site))
                for site in ("embedding", "final_norm")
                if site in pair.sites
            ],
            components=_components(seen),
            results=found.rows(about.attributed),
            summary=found.summary(),
            output=found.output,
            attribution=None if about.attributed is None else about.attributed.record(plan.settings.seed),
            mined=about.mined,
            readout=about.readout,
            groups=found.groups(about.attributed),
            tokens=trace_tokens(found, about.reader, choose=about.chooses_prompts) if about.reader else None,
            notes=notes.texts,
            note_codes=notes.codes,
        ),
        _vectors(seen) if pair.same_width else None,
    )


def _components(seen: Accumulation) -> list[ComponentRecord] | None:
    if seen.plan.settings.sites != "all":
        return None
    return seen.components.records(seen.facts.base.info.run_dtype)


def _vectors(seen: Accumulation) -> dict[str, NDArray[np.float32]]:
    """Return the mean difference of every layer that has one, by the name of its tensor."""
    found = {site: measures.directions for site, measures in seen.sites.items() if isinstance(site, int)}
    return {
        f"resid_post.{layer}": directions.mean_difference().astype(np.float32)
        for layer, directions in found.items()
        if directions.n_prompts
    }


def _layer(found: Findings, layer: int) -> LayerRecord:
    matched = found.pair.matched[layer]
    return LayerRecord(
        layer=layer, finetuned_layer=None if matched == layer else matched, **found.measures(layer)
    )


def _note_exclusions(seen: Accumulation, notes: Notes) -> None:
    """Note what was left out because a state was zero or not finite: which layers, which prompts."""
    left_out = [
        (site, tuple(np.flatnonzero(seen.sites[site].means.n_excluded).tolist())) for site in seen.facts.sites
    ]
    # Neighbouring sites that lost the same prompts share a note.
    for prompts, places in groupby(left_out, key=lambda item: item[1]):
        sites = [site for site, _ in places]
        if prompts:
            where = str(sites[0]) if len(sites) == 1 else f"{sites[0]} to {sites[-1]}"
            notes.add(
                "states-left-out",
                f"layer {where}: states that are zero or not finite were left out, in "
                f"{len(prompts)} of {seen.n_prompts} prompts: {listed(prompts)}",
                layers=[site for site in sites if isinstance(site, int)],
                prompts=prompts,
            )


def _note_components(seen: Accumulation, notes: Notes) -> None:
    """Note which components were left out because they are zero or not finite in one of the models."""
    for prompts, sites in seen.components.left_out().items():
        names = ", ".join(f"{site.name} of block {site.layer}" for site in sites[:MOST_NAMED])
        more = f" and {len(sites) - MOST_NAMED} more" if len(sites) > MOST_NAMED else ""
        notes.add(
            "states-left-out",
            f"{names}{more}: zero or not finite, and left out of the means, in {len(prompts)} of "
            f"{seen.n_prompts} prompts: {listed(prompts)}",
            layers=sorted({site.layer for site in sites}),
            prompts=prompts,
        )


def _why_no_data(broken: list[str]) -> str:
    start = "No layer has one pair of states that are finite and not zero."
    if not broken:
        return f"{start} The states of one of the models are all zero: fetch or train it again."
    return f"{start} {'. '.join(broken)}."
