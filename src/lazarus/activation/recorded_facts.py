"""Facts of a recorded model, beside its states; and what cannot be asked of it."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from lazarus.activation.limits import ranges
from lazarus.errors import RecordingError, ShapeMismatchError
from lazarus.facts import ModelFacts, PairFacts, note_dtypes
from lazarus.messages import option
from lazarus.metrics import FEWEST_FOR_CKA
from lazarus.notes import Notes
from lazarus.recorded import how_recorded, recorded_info
from lazarus.recordings import EMBEDDING, FINAL_NORM, LOGITS, TOP_IDS, Recording, site_name
from lazarus.results import NotCompared


def live_facts(facts: ModelFacts, recorded: ModelFacts) -> ModelFacts:
    """Return the facts of a live model: of what it holds besides, the recording tells nothing."""
    outside = [msgspec.structs.replace(part, differs=None) for part in facts.info.not_compared]
    outside += recorded.info.not_compared
    return replace(facts, info=msgspec.structs.replace(facts.info, not_compared=outside))


def recorded_facts(recording: Recording, live: ModelFacts | None) -> ModelFacts:
    """Return the facts of a recorded model; what its file does not tell is taken from the live one."""
    model = recording.contents.model
    info = recorded_info(recording, _not_recorded(recording))
    causal, layer_norm = model.causal, model.layer_norm
    if causal is None:
        causal = live.is_causal if live else True
    if layer_norm is None:
        layer_norm = live.uses_layer_norm if live else False
    has_output = LOGITS in recording.sites or TOP_IDS in recording.sites
    why = None if has_output else f"{recording.name} was recorded without logits"
    return ModelFacts(info, None, causal, layer_norm, FINAL_NORM in recording.sites, why)


def _not_recorded(recording: Recording) -> list[NotCompared]:
    """Return what a recording says nothing of."""
    n_layers, known = recording.contents.model.n_layers, set(recording.sites)
    parts = ["whatever the models hold besides what was recorded"]
    if EMBEDDING not in known:
        parts.append("what enters the first block, which was not recorded")
    missing = [layer for layer in range(n_layers) if site_name(layer) not in known]
    if missing:
        parts.append(f"layers {ranges(missing)}, which were not recorded")
    if FINAL_NORM not in known:
        parts.append("what leaves the final norm, which was not recorded")
    return [NotCompared(what=what, n_tensors=0, differs=None) for what in parts]


def check_recorded(facts: PairFacts, recording: Recording, n_prompts: int, *, localize: bool) -> None:
    """Refuse a pair that cannot be compared in the way that was asked for.

    Raises:
        ShapeMismatchError: widths differ and there are too few prompts for CKA, or blocks cannot be put
            beside each other.
        RecordingError: blocks are to run on the recorded states, and not all of these are there.
    """
    names = " and ".join(facts.names)
    if not facts.same_width and n_prompts < FEWEST_FOR_CKA:
        raise ShapeMismatchError(
            f"{names} have {facts.widths[0]} and {facts.widths[1]} features in the residual stream, so their "
            f"states have no cosine. CKA compares them from {FEWEST_FOR_CKA} prompts on, and these are "
            f"{n_prompts}: record more prompts."
        )
    if not localize:
        return
    if not facts.same_shape:
        raise ShapeMismatchError(
            f"{option('localize')} runs each block of one model on the states of the other, and {names} have "
            f"{facts.n_layers[0]} blocks of {facts.widths[0]} features and {facts.n_layers[1]} of "
            f"{facts.widths[1]}. Leave {option('localize')} out.",
            option="localize",
        )
    needed = [EMBEDDING, *(site_name(layer) for layer in range(facts.n_layers[0]))]
    missing = [name for name in needed if name not in recording.sites]
    if missing or recording.contents.positions != "all":
        lacks = f"no {', '.join(missing[:3])}" if missing else "states of some tokens alone"
        raise RecordingError(
            f"{option('localize')} runs blocks on the states of every token, and {recording.name} has "
            f"{lacks}. Record with {option('position', 'all')}, or leave {option('localize')} out.",
            option="localize",
        )


def note_recorded(recording: Recording, facts: PairFacts, notes: Notes, *, components: bool = False) -> None:
    """Note what ran a recorded model, and what is not known because of it."""
    if components and not any(site.startswith("mlp_out") for site in recording.sites):
        told = f"{recording.name} was recorded without what is inside the blocks ({option('sites', 'all')})"
        notes.add("components-left-out", f"{told}: it was not compared")
    told = f"{how_recorded(recording)}; its weights were not looked into"
    notes.add("recorded", told, model=recording.name)
    if TOP_IDS in recording.sites and LOGITS not in recording.sites:
        notes.add(
            "likeliest-tokens",
            f"{recording.name} has the likeliest tokens alone: next tokens were compared over these and one "
            "outcome for all others, so KL and JS divergence are at least what is given, and logits have no "
            "distance",
        )
    note_dtypes(facts.names, (facts.base.info.run_dtype, facts.finetuned.info.run_dtype), notes)
    facts.note_shapes(facts.names, notes)
