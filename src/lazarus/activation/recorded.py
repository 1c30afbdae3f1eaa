"""activation-diff with a recording in place of a model, or of both: the same numbers, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import msgspec

from lazarus.activation.accumulation import Accumulation, Plan
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
from lazarus.activation.recorded_facts import check_recorded, live_facts, note_recorded, recorded_facts
from lazarus.activation.recorded_prompts import check_same_ids, compared, read_recorded
from lazarus.activation.recorded_rows import Pairing, RecordedRows, recorded_pairs
from lazarus.activation.result import About, conclude
from lazarus.activation.runplan import RunPlan
from lazarus.errors import RecordingError, UsageError
from lazarus.facts import PairFacts
from lazarus.foreign import user_path
from lazarus.loading import Model, Role
from lazarus.messages import option
from lazarus.notes import Notes
from lazarus.options import EACH_TOKEN, parse_position
from lazarus.provenance import environment
from lazarus.reading import Reading
from lazarus.recorded import Side, as_reading, dtype_beside, how_recorded
from lazarus.recordings import Recording
from lazarus.result_classes import ActivationDiff
from lazarus.results import note_outside
from lazarus.sites import Position
from lazarus.tokens import OnlyIds

_NEEDS_WEIGHTS = {"attribute": "the gradients", "readout": "the LM heads"}


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
    if given.options.align == "text":
        raise UsageError(
            f"{option('align', 'text')} lets each model read the text with its own tokenizer, and beside a "
            "recording the other side reads its ids. Leave it out, or name the model.",
            option="align",
        )
    _check_noise(given, [side for side in (base, finetuned) if isinstance(side, Recording)])
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
    recorded = recorded_facts(recording, prepared.facts.base)
    live = live_facts(prepared.facts.base, recorded)
    sides = (live, recorded) if is_base else (recorded, live)
    facts = PairFacts(*sides, replays=localize and is_base)
    check_recorded(facts, recording, len(reading.prompts), localize=localize)
    # The noise is base's own, so it is known where base runs; rounding to another type is no part of it.
    measures = prepared.run.noise_floor and is_base and facts.same_width
    has_noise = measures and live.info.run_dtype == recorded.info.run_dtype
    # Blocks run on the states of each prompt, and a recording has its own for each.
    run = replace(prepared.run, noise_floor=has_noise, localize=False, each_runs=localize)
    average = run.position == "mean"
    rows = RecordedRows(recording, compared(recording, reading, run.position), average=average)
    settings = msgspec.structs.replace(prepared.plan.settings, noise_floor=has_noise, localize=localize)
    plan = replace(prepared.plan, repeats=None, settings=settings, traced=run.traced)
    seen = Accumulation(facts, plan)
    noise = _noise_rows(given, facts, reading, run.position, notes)
    # The same path may hold other recordings at other times.
    digests = {"recording": recording.digest()} | ({"noise": noise.recording.digest()} if noise else {})
    take_up(prepared, run, digests)
    states = rows.every if localize else None
    pair = prepared.pair if rows.has_output else prepared.pair.without_output()
    paired = Pairing(facts, rows, not is_base, run.repeats, noise if is_base else None)
    job = Job(pair, run, watcher.advanced, states, lambda found: given.tap(paired(found)))
    notes.extend(measure(job, given.folder, seen, watcher.running))
    if noise is not None and not is_base:
        seen.take(recorded_pairs(facts, rows, noise, lambda _: None, trial=0))
    if facts.replays and measures:
        again = noise.every if noise and noise.has_every_state(facts) else None
        sampled = replace(job, plan=replace(run, noise_floor=True))
        seen.take(local_noise(sampled, recording.contents.model.run_dtype, again))
    run.note(notes)
    note_recorded(recording, facts, notes, components=given.options.sites == "all")
    note_outside(facts.base.info.not_compared, facts.finetuned.info.not_compared, notes)
    reader = TokenReader(reading, run.position)
    chooses = given.options.token_prompts == "auto"
    about = About(environment(given.device), notes, reader=reader, chooses_prompts=chooses)
    return conclude(seen, about=about)


def _compare_two(given: Given, base: Recording, finetuned: Recording, watcher: Observer) -> ActivationDiff:
    """Compare two recordings: nothing runs."""
    options = given.options
    if options.localize or given.prompts.prompts:
        what = option("localize", True) if options.localize else "reading prompts"
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
    facts = PairFacts(recorded_facts(base, None), recorded_facts(finetuned, None))
    check_recorded(facts, base, len(reading.prompts), localize=False)
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
    seen.take(given.tap(recorded_pairs(facts, sides[0], sides[1], watcher.advanced)))
    noise = _noise_rows(given, facts, reading, position, notes)
    if noise is not None:
        seen.take(recorded_pairs(facts, sides[0], noise, lambda _: None, trial=0))
    run.note(notes)
    for recording in (base, finetuned):
        note_recorded(recording, facts, notes, components=given.options.sites == "all")
    note_outside(facts.base.info.not_compared, facts.finetuned.info.not_compared, notes)
    reader, chooses = TokenReader(reading, position), options.token_prompts == "auto"
    return conclude(seen, about=About(notes=notes, reader=reader, chooses_prompts=chooses))


def _check_noise(given: Given, recordings: Sequence[Recording]) -> None:
    """Refuse noise that is what is compared: the difference would be its own measure, or nothing would be.

    Raises:
        UsageError: `noise_from` is one of the recordings that are compared.
    """
    named = given.options.noise_from
    path = None if named is None else user_path(named).resolve()
    if any(recording.path.resolve() == path for recording in recordings):
        raise UsageError(
            f"{option('noise_from', named)} is itself compared, and the noise is measured from a second "
            "recording of base. Record base once more, and name that.",
            option="noise_from",
        )


def _noise_rows(
    given: Given, facts: PairFacts, reading: Reading, position: Position, notes: Notes
) -> RecordedRows | None:
    """Open the other recording of base, from which the noise is measured; None where none is given.

    Raises:
        RecordingError: it is no recording, of other prompts, or of a model of another shape.
        PositionError: it lacks tokens that are compared.
    """
    if given.options.noise_from is None:
        return None
    found = Recording.open(given.options.noise_from)
    check_same_ids(found, [prompt.ids for prompt in reading.base], "this run")
    model, ours = found.contents.model, facts.base.info
    if (model.n_layers, model.hidden_size) != (ours.n_layers, facts.widths[0]):
        raise RecordingError(
            f"{option('noise_from', found.name)} is another recording of base, and it has {model.n_layers} "
            f"layers of {model.hidden_size} features, and base {ours.n_layers} of {facts.widths[0]}. Name "
            "one of the same model.",
            option="noise_from",
        )
    told = f"{how_recorded(found)}; what it differs from base by is taken for noise"
    notes.add("recorded", told, model=found.name)
    return RecordedRows(found, compared(found, reading, position), average=position == "mean")


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
    dtype = dtype_beside(recording, given.options.dtype)
    return replace(given, options=replace(given.options, dtype=dtype))
