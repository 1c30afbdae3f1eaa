"""compare with a recording in place of a model: its states, through the live model's norm and LM head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lazarus.blame import MemoryFaults
from lazarus.engine import Conventions, broken_weights, learn, note_of_weights
from lazarus.errors import RecordingError, ShapeMismatchError, UsageError
from lazarus.lens.lens import Lens
from lazarus.lens.live import Observer, look_at
from lazarus.lens.reading import RecordedToken, read_recorded
from lazarus.lens.record import LensFacts, make_record
from lazarus.lens.vocabulary import Vocabulary
from lazarus.loading import Model, Role, Work, less_memory, load_alone
from lazarus.messages import option
from lazarus.models import LoadedModel, tokenizer_digest
from lazarus.notes import Notes
from lazarus.options import CompareOptions, Options, read_template
from lazarus.prompts import PromptList
from lazarus.reading import Asked, Reading, read_prompts
from lazarus.recorded import (
    Side,
    dtype_beside,
    first_difference,
    how_recorded,
    id_text,
    read_brought,
    recorded_info,
)
from lazarus.recordings import FINAL_NORM, LOGITS, RecordedPrompt, Recording, site_name
from lazarus.result_classes import Comparison
from lazarus.tokens import TokenizedPrompt, listed


@dataclass(frozen=True)
class AskedOfRecording:
    """The arguments of a comparison with a recording, beside the two."""

    prompts: PromptList | None
    """one prompt; None for that of the recording"""
    options: CompareOptions
    tokenizer: Any | None
    device: torch.device


def compare_recorded(sides: tuple[Side, Side], asked: AskedOfRecording, watcher: Observer) -> Comparison:
    """Compare a live model with a recording, whichever of the two is model 1.

    Raises:
        UsageError: both are recordings, an option needs two models, or the recording has several prompts.
        RecordingError: the recording lacks the prompt, or the states of its last token.
        LazarusError: as `compare`.
    """
    model, recording, role = _told_apart(sides)
    if asked.options.at == "parting":
        raise UsageError(
            f"{option('at', 'parting')} needs what both models say after every token, and {recording.name} "
            f"is a recording. Use {option('at', 'last')}, or name the model.",
            option="at",
        )
    notes = Notes(asked.prompts.notes if asked.prompts else ())
    options = asked.options.of_pair()
    options = replace(options, dtype=dtype_beside(recording, options.dtype))
    helps = less_memory(options.dtype, asked.device, can_stream=False)
    if role == "finetuned":
        watcher.loading("base", recording.name)
    with MemoryFaults(helps):
        live = load_alone(model, role, options, Work(asked.device), watcher.loading, notes)
    if role == "base":
        watcher.loading("finetuned", recording.name)
    with MemoryFaults([*helps, "a shorter prompt"]):
        reading, recorded = _read(recording, live, asked, options, notes)
        known = learn(live, reading.samples[0], reading.pad_ids[0])
        _check_width(recording, live, known)
        watcher.running(known.n_layers + recording.contents.model.n_layers)
        tokenizer = reading.tokenizers[0]
        theirs = _look_at_recorded((recording, recorded), (live, known), tokenizer, watcher)
        ours = look_at(live, known, reading.base[0], tokenizer, watcher.advanced)
        if broken := broken_weights(live):
            notes.extend([note_of_weights(live, broken)])
        lenses = (ours, theirs) if role == "base" else (theirs, ours)
        facts = LensFacts(reading.prompts[0].text, asked.options, asked.device)
        return Comparison(make_record(lenses, facts, notes))


def _told_apart(sides: tuple[Side, Side]) -> tuple[Model, Recording, Role]:
    """Return the live model, the recording, and which of the two the live one is."""
    one, other = sides
    if isinstance(one, Recording):
        if isinstance(other, Recording):
            raise UsageError(
                f"{one.name} and {other.name} are recordings, and compare reads states through the LM head "
                "of a live model. Name the model that one of them is of; activation-diff compares two "
                "recordings."
            )
        return other, one, "finetuned"
    assert isinstance(other, Recording)
    return one, other, "base"


def _read(
    recording: Recording, live: LoadedModel, asked: AskedOfRecording, options: Options, notes: Notes
) -> tuple[Reading, RecordedPrompt]:
    """Return the prompt as the live model reads it, and the same one in the recording."""
    if asked.prompts is None:
        if len(recording.prompts) != 1:
            raise UsageError(
                f"{recording.name} has {len(recording.prompts)} prompts, and compare takes one. Give the "
                "text of one of them as the prompt."
            )
        trusts = options.trust_remote_code
        reading = read_brought(recording, live, asked.tokenizer, notes, trust_remote_code=trusts)
        return reading, _checked(recording, recording.prompts[0])
    given = Asked(asked.prompts.prompts, asked.tokenizer, read_template(options))
    reading = read_prompts((live, live), given, options, notes)
    known, digest = recording.contents.tokenizer, tokenizer_digest(reading.tokenizers[0])
    if known is not None and known.sha256 != digest:
        text = f"the tokenizer of {recording.name} is another than that of {live.name}"
        notes.add("tokenizers-differ", f"{text}; they give the same ids for this prompt")
    return reading, _checked(recording, _same_ids(recording, reading.base[0].ids))


def _same_ids(recording: Recording, ids: Sequence[int]) -> RecordedPrompt:
    """Return the prompt of a recording that has these ids."""
    nearest, furthest = "", -1
    for prompt in recording.prompts:
        difference = first_difference(prompt.ids, ids)
        if difference is None:
            return prompt
        place, theirs, ours = difference
        if place > furthest:
            furthest = place
            found, given = id_text(theirs), id_text(ours)
            nearest = f"prompt {prompt.index} has {found} at token {place}, and the one given {given}"
    which = "it" if len(recording.prompts) == 1 else f"the nearest of {len(recording.prompts)}"
    raise RecordingError(
        f"{recording.name} does not hold this prompt: {which}, {nearest}. Record this prompt, or give one "
        "that was recorded."
    )


def _checked(recording: Recording, prompt: RecordedPrompt) -> RecordedPrompt:
    """Refuse a prompt whose last token was not recorded."""
    last = len(prompt.ids) - 1
    if last not in prompt.kept:
        raise RecordingError(
            f"{recording.name} has no states of the last token of prompt {prompt.index}, which is {last}: it "
            f"has those of {listed(list(prompt.kept))}. Record with {option('position', 'last')} or "
            f"{option('position', 'all')}.",
            option="position",
        )
    return prompt


def _check_width(recording: Recording, live: LoadedModel, known: Conventions) -> None:
    width = recording.contents.model.hidden_size
    if width != known.width:
        raise ShapeMismatchError(
            f"{recording.name} holds states of {width} features, and the final norm and the LM head of "
            f"{live.name} read {known.width}. Name the model that was recorded, or one of that width."
        )


def _look_at_recorded(
    recorded: tuple[Recording, RecordedPrompt],
    live: tuple[LoadedModel, Conventions],
    tokenizer: Any,
    watcher: Observer,
) -> Lens:
    """Return what the live model's head reads from the states of a recording."""
    (recording, prompt), (model, known) = recorded, live
    row = prompt.kept.index(len(prompt.ids) - 1)

    def at(site: str) -> Tensor | None:
        if site not in recording.sites:
            return None
        return torch.from_numpy(recording.rows(prompt.index, site, row, row + 1))

    n_layers = recording.contents.model.n_layers
    token = RecordedToken([at(site_name(layer)) for layer in range(n_layers)], at(FINAL_NORM), at(LOGITS))
    logits = read_recorded(model, known, prompt.ids, token, watcher.advanced)
    notes = Notes()
    _note_end(recording, model, token, logits, notes)
    missing = _note_missing(recording, token, notes)
    return Lens(
        recorded_info(recording),
        lambda: None,
        Vocabulary(tokenizer, logits.shape[-1]),
        TokenizedPrompt(0, prompt.ids, prompt.rendered),
        logits,
        notes,
        missing,
    )


def _note_end(
    recording: Recording, live: LoadedModel, token: RecordedToken, logits: Tensor, notes: Notes
) -> None:
    """Note through what the layers were read, and what the last one is."""
    if token.logits is not None and token.logits.shape == logits[-1:].shape:
        last = "the last one is its recorded logits"
    elif token.final_norm is not None:
        last = "the last one is its recorded state after its own final norm, through that head"
        if token.logits is not None:
            last += f" (its logits are of {token.logits.shape[1]} tokens, not {logits.shape[1]})"
    else:
        last = "so is the last one, as neither logits nor what leaves its own final norm were recorded"
    told = f"its layers are read through the final norm and the LM head of {live.name}, and {last}"
    notes.add("recorded", f"{how_recorded(recording)}; {told}", model=recording.name)


def _note_missing(recording: Recording, token: RecordedToken, notes: Notes) -> tuple[int, ...]:
    """Return the layers of which there are no states, and note them."""
    n_layers = len(token.blocks)
    has_end = token.logits is not None or token.final_norm is not None
    missing = [layer for layer, rows in enumerate(token.blocks) if rows is None]
    missing = [layer for layer in missing if layer < n_layers - 1 or not has_end]
    if missing:
        notes.add(
            "recorded",
            f"{recording.name} has no states after blocks {listed(missing)} ({len(missing)} of {n_layers}): "
            "nothing is read there",
            model=recording.name,
            layers=missing,
        )
    return tuple(missing)
