"""The prompts of a recording, as what a live model reads; and whether two sides read the same."""

from __future__ import annotations

from collections.abc import Sequence

from lazarus.activation.prepare import Given, read_asked
from lazarus.errors import PositionError, RecordingError
from lazarus.messages import option
from lazarus.models import LoadedModel
from lazarus.notes import Notes
from lazarus.reading import Reading
from lazarus.recorded import first_difference, id_text, read_brought
from lazarus.recordings import Recording
from lazarus.sites import Position, tokens_of


def read_recorded(recording: Recording, model: LoadedModel, given: Given, notes: Notes) -> Reading:
    """Return the prompts of a recording for a live model to read.

    Where the caller gives prompts as well, these are read, and they must have the same ids.

    Raises:
        TokenizerMismatchError: the model's tokenizer gives other ids for a text of the recording.
        PromptDataError: an id has no embedding in the model, or a prompt is longer than its context.
    """
    if given.prompts.prompts:
        reading = read_asked(given, (model, model), notes)
        check_same_ids(recording, [prompt.ids for prompt in reading.base], "the prompts that were given")
        return reading
    trusts = given.options.trust_remote_code
    reading = read_brought(recording, model, given.tokenizer, notes, trust_remote_code=trusts)
    if given.options.position == "response":
        _check_responses(recording, reading)
    return reading


def compared(recording: Recording, reading: Reading, position: Position) -> list[list[int]]:
    """Return which tokens of each prompt are compared, all of which the recording has.

    Raises:
        PositionError: it has not, or responses are compared and it does not tell where they are.
    """
    if position == "response":
        _check_responses(recording, reading)
    found = []
    for prompt, recorded in zip(reading.base, recording.prompts, strict=True):
        tokens = list(tokens_of(prompt, position))
        missing = sorted(set(tokens) - set(recorded.kept))
        if missing:
            raise PositionError(
                f"{recording.name} has no states of token {missing[0]} of prompt {prompt.index}, which "
                f"{option('position', position)} compares: it has {len(recorded.kept)} of "
                f"{len(recorded.ids)}. Record with {option('position', 'all')}, or choose another "
                f"{option('position')}.",
                option="position",
            )
        found.append(tokens)
    return found


def _check_responses(recording: Recording, reading: Reading) -> None:
    for prompt in reading.base:
        if not prompt.response:
            raise PositionError(
                f"{recording.name} does not tell where the response of prompt {prompt.index} is. Record it "
                f"with {option('position', 'response')}, or choose another {option('position')}.",
                option="position",
            )


def check_same_ids(recording: Recording, ids: Sequence[Sequence[int]], other: str) -> None:
    """Refuse a recording of other token ids.

    Raises:
        RecordingError: it names the first prompt and token that differ.
    """
    if len(ids) != len(recording.prompts):
        raise RecordingError(
            f"{recording.name} has {len(recording.prompts)} prompts, and {other} {len(ids)}. States are "
            "compared on the same prompts: leave the prompts out, or record these."
        )
    for prompt, theirs in zip(recording.prompts, ids, strict=True):
        difference = first_difference(prompt.ids, theirs)
        if difference is not None:
            place, ours, their = difference
            raise RecordingError(
                f"Prompt {prompt.index}: at token {place} {recording.name} has {id_text(ours)}, and {other} "
                f"{id_text(their)}. States are compared on the same ids: leave the prompts out, or record "
                "these."
            )
