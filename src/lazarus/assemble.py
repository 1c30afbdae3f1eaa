"""From what a run measured to the record that comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import torch

from lazarus import provenance
from lazarus.engine import ModelPair, Site
from lazarus.errors import NoDataError
from lazarus.findings import Findings, break_notes, broken_parts, limits, trace_tokens
from lazarus.measure import Measured
from lazarus.metrics import SiteMeasures
from lazarus.options import Options
from lazarus.reading import Reading
from lazarus.results import (
    SCHEMA_VERSION,
    ActivationDiffRecord,
    LayerRecord,
    NotCompared,
    PromptRecord,
    Readout,
    Settings,
    SiteRecord,
)
from lazarus.tokens import listed


@dataclass(frozen=True)
class RunFacts:
    """The options, what their `auto` came to, and what was noted on the way."""

    options: Options
    device: torch.device
    position: Literal["last", "mean", "all"] | int
    batch_tokens: int
    notes: Sequence[str]
    matmul: Literal["default", "onednn"] | None = None
    outside: tuple[Sequence[NotCompared], Sequence[NotCompared]] = ((), ())
    """what base and the fine-tuned model hold besides what was compared"""


def assemble(
    pair: ModelPair,
    facts: RunFacts,
    reading: Reading,
    measured: Measured,
    readout: list[Readout] | None,
) -> ActivationDiffRecord:
    """The whole record of a run.

    Raises:
        NoDataError: no layer has one finite pair of states.
    """
    options, prompts = facts.options, reading.prompts
    broken, broken_notes = broken_parts(pair)
    outside = [*facts.outside[0], *broken[0]], [*facts.outside[1], *broken[1]]
    groups = [p.group for p in prompts]
    found = Findings(pair, measured, options.threshold, groups, options.seed, outside)
    if pair.same_width and not any(measured.sites[layer].means.n_rows.any() for layer in found.layers):
        raise NoDataError(
            _why_no_data(list(dict.fromkeys([*broken_notes, *break_notes(pair, measured, reading)])))
        )
    layers = [_layer(found, layer) for layer in found.layers]
    return ActivationDiffRecord(
        schema_version=SCHEMA_VERSION,
        command="activation-diff",
        tool=provenance.tool(),
        created=provenance.now(),
        base=provenance.model_info(pair.base, pair.base_conventions, outside[0]),
        finetuned=provenance.model_info(pair.finetuned, pair.finetuned_conventions, outside[1]),
        settings=_settings(pair, facts, measured),
        environment=provenance.environment(facts.device, facts.matmul),
        prompts=_prompts(reading),
        layers=layers,
        sites=[
            SiteRecord(name=site, **found.measures(site))
            for site in ("embedding", "final_norm")
            if site in pair.sites
        ],
        results=found.rows([prompt.text for prompt in prompts]),
        summary=found.summary(),
        output=found.output,
        readout=readout,
        groups=found.groups(),
        tokens=trace_tokens(found, reading, facts.position, choose=options.token_prompts == "auto"),
        notes=list(
            dict.fromkeys(
                [
                    *facts.notes,
                    *pair.common_notes(),
                    *measured.notes,
                    *_exclusions(pair, measured.sites),
                    *broken_notes,
                    *break_notes(pair, measured, reading),
                    *limits(found, layers),
                ]
            )
        ),
    )


def _layer(found: Findings, layer: int) -> LayerRecord:
    matched = found.pair.matched[layer]
    return LayerRecord(
        layer=layer, finetuned_layer=None if matched == layer else matched, **found.measures(layer)
    )


def _prompts(reading: Reading) -> list[PromptRecord]:
    apart = reading.align == "text"
    return [
        PromptRecord(
            index=index,
            text=prompt.text,
            group=prompt.group,
            n_tokens=len(base.ids),
            rendered=base.rendered,
            finetuned_n_tokens=len(finetuned.ids) if apart else None,
        )
        for index, (prompt, base, finetuned) in enumerate(
            zip(reading.prompts, reading.base, reading.finetuned, strict=True)
        )
    ]


def _exclusions(pair: ModelPair, sites: Mapping[Site, SiteMeasures]) -> list[str]:
    """Return what was left out because a state was zero or not finite: which layers, which prompts."""
    notes = []
    left_out = [(str(site), tuple(np.flatnonzero(sites[site].means.n_excluded))) for site in pair.sites]
    for prompts, places in groupby(left_out, key=lambda item: item[1]):
        names = [name for name, _ in places]
        if prompts:
            where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            notes.append(
                f"layer {where}: states that are zero or not finite were left out, in "
                f"{len(prompts)} of {sites['embedding'].means.n_rows.size} prompts: "
                f"{listed([int(p) for p in prompts])}"
            )
    return notes


def _why_no_data(broken: Sequence[str]) -> str:
    start = "No layer has one pair of states that are finite and not zero."
    if not broken:
        return f"{start} The states of one of the models are all zero: fetch or train it again."
    return f"{start} {'. '.join(broken)}."


def _settings(pair: ModelPair, facts: RunFacts, measured: Measured) -> Settings:
    options = facts.options
    return Settings(
        position=str(facts.position),
        threshold=options.threshold,
        dtype=pair.base.run_dtype,
        device=str(facts.device),
        batch_tokens=facts.batch_tokens,
        chat_template=options.chat_template,
        memory="resident" if pair.base.pager is None else "stream",
        align=pair.align,
        localize=options.localize,
        readout=options.readout,
        noise_floor=bool(measured.noise),
        fail_above=options.fail_above,
        expect=options.expect,
        only_compared=options.only_compared,
        no_split=options.no_split,
        truncate=options.truncate,
        layers_path=options.layers_path,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
        work_dir=options.work_dir,
        token_prompts=options.token_prompts if facts.position == "all" else None,
    )
