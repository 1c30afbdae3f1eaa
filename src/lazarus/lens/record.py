"""Make the record from both lenses, with all that a reader needs to repeat the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lazarus import provenance
from lazarus.errors import NoDataError, UsageError
from lazarus.facts import matched_layers
from lazarus.lens.distance import find_outcomes, lens_pair, note_distances
from lazarus.lens.lens import Lens
from lazarus.lens.tracking import Lenses, Tracked, evolution, find_tracked, note_tracking
from lazarus.messages import option
from lazarus.notes import Notes
from lazarus.options import CompareOptions, parse_track
from lazarus.results import (
    SCHEMA_VERSION,
    CompareRecord,
    LensLayer,
    LensModel,
    LensPair,
    LensSettings,
    LensSummary,
    LensToken,
)
from lazarus.tokens import listed


@dataclass(frozen=True)
class LensFacts:
    """The prompt, the options, and what their `auto` came to."""

    prompt: str
    options: CompareOptions
    device: torch.device


def make_record(lenses: Lenses, facts: LensFacts, notes: Notes) -> CompareRecord:
    """Return the whole record of a run; `notes` are those on what came before.

    Raises:
        UsageError: more tokens a layer are asked for than a model has.
        NoDataError: the logits of one of the models are finite at no layer.
    """
    for lens in lenses:
        _check(lens, facts.options)
    outcomes = find_outcomes(lenses[0].vocabulary, lenses[1].vocabulary, notes)
    words = parse_track(facts.options.track)
    tracked = find_tracked(lenses, words, same_ids=outcomes.same_ids)
    pairs = [lens_pair(lenses, outcomes, layers) for layers in _matched(lenses)]
    _note_lenses(lenses, notes)
    note_distances(pairs, notes)
    note_tracking(lenses, tracked, notes)
    one, other = (_model(lens, facts, tracked, side) for side, lens in enumerate(lenses))
    return CompareRecord(
        schema_version=SCHEMA_VERSION,
        command="compare",
        tool=provenance.tool(),
        created=provenance.now(),
        model1=one,
        model2=other,
        settings=_settings(lenses, facts, words),
        environment=provenance.environment(facts.device),
        prompt=facts.prompt,
        tracked=[each.text for each in tracked],
        layers=pairs,
        position=_position(lenses),
        summary=_summary(pairs, same_vocabulary=outcomes.same_ids),
        notes=notes.texts,
        note_codes=notes.codes,
    )


def _position(lenses: Lenses) -> int | None:
    """Return the token that is read; None where two tokenizers count it differently."""
    ours, theirs = (len(lens.prompt.ids) - 1 for lens in lenses)
    return ours if ours == theirs else None


def _check(lens: Lens, options: CompareOptions) -> None:
    name, n_tokens = lens.info.id, lens.vocabulary.n_tokens
    if options.top_k > n_tokens:
        raise UsageError(
            f"{option('top_k', options.top_k)}: {name} has {n_tokens} tokens. Give a number of at most "
            f"{n_tokens}.",
            option="top_k",
        )
    if not any(lens.valid):
        found, dtype = lens.why_not_finite(), lens.info.run_dtype
        reason = found.text if found else f"{name} runs in {dtype}: try {option('dtype', 'float32')}"
        raise NoDataError(
            f"{name}: the logits are finite at no layer, so there is nothing to read. {reason}."
        )


def _matched(lenses: Lenses) -> list[tuple[int, int]]:
    """Each layer of model 1, and the layer of model 2 at the same relative depth."""
    one, other = (len(lens.logits) for lens in lenses)
    return list(enumerate(matched_layers(one, other)))


def _model(lens: Lens, facts: LensFacts, tracked: Sequence[Tracked], side: int) -> LensModel:
    vocabulary = lens.vocabulary
    return LensModel(
        info=lens.info,
        n_vocabulary=vocabulary.n_tokens,
        prompt_tokens=[vocabulary.text(i) for i in lens.prompt.ids],
        rendered=lens.prompt.rendered,
        layers=[_layer(lens, layer, facts.options.top_k) for layer in range(len(lens.logits))],
        tracked=[evolution(lens, each.text, each.ids[side]) for each in tracked],
    )


def _layer(lens: Lens, layer: int, top_k: int) -> LensLayer:
    return LensLayer(
        layer=layer,
        top=[
            LensToken(token=lens.vocabulary.text(i), token_id=i, probability=probability)
            for i, probability in lens.top(layer, top_k)
        ],
    )


def _settings(lenses: Lenses, facts: LensFacts, words: list[str] | None) -> LensSettings:
    options = facts.options
    return LensSettings(
        top_k=options.top_k,
        track=words,
        dtype=lenses[0].info.run_dtype,
        device=str(facts.device),
        chat_template=options.chat_template,
        truncate=options.truncate,
        layers_path=options.layers_path,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
        dequantize=options.dequantize,
        at=options.at,
        anonymous=options.anonymous,
    )


def _summary(pairs: Sequence[LensPair], *, same_vocabulary: bool) -> LensSummary:
    measured = {pair.layer: pair.js for pair in pairs if pair.js is not None}
    largest = max(measured, key=lambda layer: measured[layer], default=None)
    return LensSummary(
        same_first_choice=pairs[-1].same_first_choice,
        most_divergent_layer=largest,
        max_js=None if largest is None else measured[largest],
        same_vocabulary=same_vocabulary,
    )


def _note_lenses(lenses: Lenses, notes: Notes) -> None:
    """Note what a reader must know of how the two ran, and of the layers where nothing is read."""
    one, other = (lens.info for lens in lenses)
    depths = [len(lens.logits) for lens in lenses]
    for lens in lenses:
        notes.extend(lens.notes)
    if one.run_dtype != other.run_dtype:
        notes.add(
            "run-dtypes",
            f"{one.id} ran in {one.run_dtype}, {other.id} in {other.run_dtype}: part of what differs is "
            "the rounding of the narrower type",
        )
    if depths[0] != depths[1]:
        notes.add(
            "depths-differ",
            f"{one.id} has {depths[0]} layers, {other.id} has {depths[1]}: they are matched by relative "
            "depth (model2_layer in JSON)",
        )
    for lens in lenses:
        absent = set(lens.not_recorded)
        broken = [layer for layer, valid in enumerate(lens.valid) if not valid and layer not in absent]
        if broken:
            notes.add(
                "not-finite",
                f"{lens.info.id}: logits that are not finite, so nothing is read, at layers "
                f"{listed(broken)} ({len(broken)} of {len(lens.valid)})",
                model=lens.info.id,
                layers=broken,
            )
            reason = lens.why_not_finite()
            notes.extend([reason] if reason else [])
