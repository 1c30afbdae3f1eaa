"""activation-diff with a recording in place of a model, or of both: the same numbers, without weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

from lazarus.activation.accumulation import Accumulation, Plan
from lazarus.activation.limits import ranges
from lazarus.activation.local_noise import local_noise
from lazarus.activation.measure import Job, measure
from lazarus.activation.prepare import (
    Given,
    Observer,
    Prepared,
    prepare_alone,
    prompt_records,
    take_up,
    token_prompts,
)
from lazarus.activation.readers import TokenReader
from lazarus.activation.recorded_prompts import as_reading, check_same_ids, compared, read_recorded
from lazarus.activation.recorded_rows import Pairing, RecordedRows, recorded_pairs
from lazarus.activation.result import About, conclude
from lazarus.activation.runplan import RunPlan
from lazarus.errors import RecordingError, ShapeMismatchError, UsageError
from lazarus.facts import ModelFacts, PairFacts
from lazarus.loading import Model, Role
from lazarus.messages import option
from lazarus.metrics import FEWEST_FOR_CKA
from lazarus.notes import Notes
from lazarus.options import EACH_TOKEN, parse_position
from lazarus.provenance import environment
from lazarus.reading import Reading
from lazarus.recordings import EMBEDDING, FINAL_NORM, LOGITS, Recording, is_recording, site_name
from lazarus.result_classes import ActivationDiff
from lazarus.results import ModelInfo, NotCompared, note_outside
from lazarus.tokens import OnlyIds

Side = Model | Recording

_RUNS_IN = ("float32", "bfloat16", "float16")
_NEEDS_WEIGHTS = {"attribute": "the gradients", "readout": "the LM heads"}


def opened(model: Model) -> Side:
    """Return the recording that a MODEL names; any other MODEL as it is.

    Raises:
        RecordingError: it is one, and cannot be read.
    """
    return Recording.open(model) if isinstance(model, str | Path) and is_recording(model) else model


def compare_recorded(given: Given, base: Side, finetuned: Side, watcher: Observer) -> ActivationDiff:
    """Compare a model with a recording, or two recordings.

    Raises:
        UsageError: an option asks for weights that a recording does not have.
        RecordingError: the recordings are of other prompts, or lack what is compared.
        LazarusError: as `activation_diff`.
    """
    for name, what in _NEEDS_WEIGHTS.items():
        if getattr(given.options, name) is not None:
            raise UsageError(
                f"{option(name)} needs {what} of both models, and a recording has none. Leave it out, or "
                "name the model.",
                option=name,
            )
    if isinstance(base, Recording) and isinstance(finetuned, Recording):
        return _compare_two(given, base, finetuned, watcher)
    if isinstance(base, Recording):
        assert not isinstance(finetuned, Recording)
        return _compare_live(given, finetuned, base, "finetuned", watcher)
    assert isinstance(finetuned, Recording)
    return _compare_live(given, base, finetuned, "base", watcher)


def _compare_live(
    given: Given, model: Model, recording: Recording, role: Role, watcher: Observer
) -> ActivationDiff:
    """Compare a live model, which is `role`, with a recording of the other one."""
    given = _in_type_of(recording, given)
    if role == "finetuned":
        watcher.loading("base", recording.name)
    read = partial(read_recorded, recording, given=given)
    prepared = prepare_alone(given, model, role, watcher, read)
    if role == "base":
        watcher.loading("finetuned", recording.name)
    watcher.testing(prepared.reading.prompts)
    with given.running():
        return _compare_prepared(prepared, recording, role, watcher)


def _compare_prepared(
    prepared: Prepared, recording: Recording, role: Role, watcher: Observer
) -> ActivationDiff:
    given, reading, notes = prepared.given, prepared.reading, Notes(prepared.notes)
    is_base, localize = role == "base", given.options.localize
    recorded = _facts(recording, prepared.facts.base)
    live = _live_facts(prepared.facts.base, recorded)
    sides = (live, recorded) if is_base else (recorded, live)
    facts = PairFacts(*sides, replays=localize and is_base)
    _check(facts, recording, len(reading.prompts), localize=localize)
    # The noise is base's own, so it is known where base runs.
    has_noise = prepared.run.noise_floor and is_base and facts.same_width
    run = replace(prepared.run, noise_floor=has_noise, localize=False, each_runs=True)
    average = run.position == "mean"
    rows = RecordedRows(recording, compared(recording, reading, run.position), average=average)
    settings = msgspec.structs.replace(prepared.plan.settings, noise_floor=has_noise, localize=localize)
    plan = replace(prepared.plan, repeats=None, settings=settings, traced=run.traced)
    seen = Accumulation(facts, plan)
    take_up(prepared, run, {"recording": recording.digest()})
    states = rows.every if localize else None
    pair = prepared.pair if LOGITS in recording.sites else prepared.pair.without_output()
    job = Job(pair, run, watcher.advanced, states, Pairing(facts, rows, not is_base))
    notes.extend(measure(job, given.folder, seen, watcher.running))
    if facts.replays and has_noise:
        seen.take(local_noise(job, recording.contents.model.run_dtype))
    run.note(notes)
    _note(recording, facts, notes)
    note_outside(facts.base.info.not_compared, facts.finetuned.info.not_compared, notes)
    reader = TokenReader(reading, run.position)
    chooses = given.options.token_prompts == "auto"
    about = About(environment(given.device), notes, reader=reader, chooses_prompts=chooses)
    return conclude(seen, about=about)


def _compare_two(given: Given, base: Recording, finetuned: Recording, watcher: Observer) -> ActivationDiff:
    """Compare two recordings: nothing runs."""
    options = given.options
    if options.localize or given.prompts.prompts:
        what = option("localize", True) if options.localize else option("prompts")
        raise UsageError(
            f"{what} needs a model, and both are recordings: no block runs, and no tokenizer. Leave it out, "
            "or name the model that one of them is of.",
            option="localize" if options.localize else None,
        )
    check_same_ids(base, [prompt.ids for prompt in finetuned.prompts], finetuned.name)
    watcher.loading("base", base.name)
    watcher.loading("finetuned", finetuned.name)
    reading, notes = as_reading(base, given.tokenizer or OnlyIds()), Notes(given.prompts.notes)
    watcher.testing(reading.prompts)
    facts = PairFacts(_facts(base, None), _facts(finetuned, None))
    _check(facts, base, len(reading.prompts), localize=False)
    position = parse_position(options.position)
    if position == "auto":
        position = "last" if facts.base.is_causal else "mean"
    sides = [
        RecordedRows(each, compared(each, reading, position), average=position == "mean")
        for each in (base, finetuned)
    ]
    run = RunPlan(
        reading.base,
        reading.finetuned,
        reading.pad_ids,
        batch_tokens=0,
        position=position,
        localize=False,
        noise_floor=False,
        seed=options.seed,
        token_prompts=token_prompts(options, position) if facts.same_width else (),
        each_runs=True,
    )
    seen = Accumulation(facts, _plan(given, reading, run, facts))
    watcher.running(sum(len(prompt.ids) for prompt in reading.base))
    seen.take(recorded_pairs(facts, sides[0], sides[1], watcher.advanced))
    run.note(notes)
    for recording in (base, finetuned):
        _note(recording, facts, notes)
    note_outside(facts.base.info.not_compared, facts.finetuned.info.not_compared, notes)
    reader, chooses = TokenReader(reading, position), options.token_prompts == "auto"
    return conclude(seen, about=About(notes=notes, reader=reader, chooses_prompts=chooses))


def _plan(given: Given, reading: Reading, run: RunPlan, facts: PairFacts) -> Plan:
    options = given.options
    known = Plan.of(
        facts,
        [prompt.text for prompt in reading.prompts],
        position=str(run.position),
        threshold=options.threshold,
        fail_above=options.fail_above,
        expect=options.expect,
        only_compared=options.only_compared,
        seed=options.seed,
        token_prompts=options.token_prompts if run.position in EACH_TOKEN else None,
    )
    return replace(known, prompts=prompt_records(reading), traced=run.traced)


def _in_type_of(recording: Recording, given: Given) -> Given:
    """Return what was given, with the dtype of a recording where none was chosen."""
    dtype = recording.contents.model.run_dtype
    if given.options.dtype != "auto" or dtype not in _RUNS_IN:
        return given
    return replace(given, options=replace(given.options, dtype=dtype))


def _live_facts(facts: ModelFacts, recorded: ModelFacts) -> ModelFacts:
    """Return the facts of a live model: of what it holds besides, the recording tells nothing."""
    outside = [msgspec.structs.replace(part, differs=None) for part in facts.info.not_compared]
    outside += recorded.info.not_compared
    return replace(facts, info=msgspec.structs.replace(facts.info, not_compared=outside))


def _facts(recording: Recording, live: ModelFacts | None) -> ModelFacts:
    """Return the facts of a recorded model; what its file does not tell is taken from the live one."""
    model = recording.contents.model
    info = ModelInfo(
        id=recording.name,
        revision=model.revision,
        kind="recording",
        architecture=model.architecture,
        n_layers=model.n_layers,
        hidden_size=model.hidden_size,
        stored_dtype=model.stored_dtype,
        run_dtype=model.run_dtype,
        attention=model.attention,
        adapter=model.adapter,
        not_compared=_not_recorded(recording),
        runtime=str(recording.contents.runtime),
    )
    causal, layer_norm = model.causal, model.layer_norm
    if causal is None:
        causal = live.is_causal if live else True
    if layer_norm is None:
        layer_norm = live.uses_layer_norm if live else False
    has_logits = LOGITS in recording.sites
    why = None if has_logits else f"{recording.name} was recorded without logits"
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


def _check(facts: PairFacts, recording: Recording, n_prompts: int, *, localize: bool) -> None:
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


def _note(recording: Recording, facts: PairFacts, notes: Notes) -> None:
    """Note what ran a recorded model, and what is not known because of it."""
    model, runtime = recording.contents.model, recording.contents.runtime
    where = f" on {runtime.device}" if runtime.device else ""
    told = f"{recording.name} is a recording of {model.id}: run by {runtime}{where} in {model.run_dtype}"
    if runtime.details:
        told += f" ({', '.join(f'{key} {value}' for key, value in runtime.details.items())})"
    notes.add("recorded", f"{told}; its weights were not looked into", model=recording.name)
    ours, theirs = facts.base.info.run_dtype, facts.finetuned.info.run_dtype
    if ours != theirs:
        notes.add(
            "run-dtypes",
            f"{facts.names[0]} ran in {ours}, {facts.names[1]} in {theirs}: part of the divergence is the "
            "rounding of the narrower type",
        )
    if facts.n_layers[0] != facts.n_layers[1]:
        notes.add(
            "depths-differ",
            f"{facts.names[0]} has {facts.n_layers[0]} layers, {facts.names[1]} has {facts.n_layers[1]}: "
            "they are matched by relative depth (finetuned_layer in JSON)",
        )
    if not facts.same_width:
        notes.add(
            "widths-differ",
            f"residual streams of {facts.widths[0]} and {facts.widths[1]} features have no cosine: CKA is "
            "given instead",
        )
