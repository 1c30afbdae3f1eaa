"""The prompts of a recording, as what a live model reads; and whether two sides read the same."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from lazarus.activation.prepare import Given, read_asked
from lazarus.errors import PositionError, PromptTooLongError, RecordingError, TokenizerMismatchError
from lazarus.messages import option
from lazarus.models import LoadedModel, load_tokenizer, tokenizer_digest
from lazarus.notes import Notes
from lazarus.prompts import Prompt
from lazarus.reading import Reading, check_vocabulary
from lazarus.recordings import RecordedPrompt, Recording
from lazarus.sites import Position, tokens_of
from lazarus.tokens import OnlyIds, TokenizedPrompt, encode, listed


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
    tokenizer = given.tokenizer
    if tokenizer is None:
        tokenizer = load_tokenizer(model, trust_remote_code=given.options.trust_remote_code)
    _check_tokenizer(recording, model, tokenizer, notes)
    reading = as_reading(recording, tokenizer or OnlyIds())
    check_vocabulary(model, reading.base)
    context = model.anatomy.context
    for prompt in reading.base:
        if context is not None and len(prompt.ids) > context:
            raise PromptTooLongError(
                f"Prompt {prompt.index} of {recording.name} has {len(prompt.ids)} tokens; the context of "
                f"{model.name} is {context}. Record shorter prompts."
            )
    return reading


def as_reading(recording: Recording, tokenizer: Any) -> Reading:
    """Return the prompts of a recording as both models read them."""
    tokenized = [_tokenized(prompt) for prompt in recording.prompts]
    prompts = [_prompt(prompt, tokenizer) for prompt in recording.prompts]
    return Reading(prompts, tokenized, tokenized, (tokenizer, tokenizer), "ids")


def compared(recording: Recording, reading: Reading, position: Position) -> list[list[int]]:
    """Return which tokens of each prompt are compared, all of which the recording has.

    Raises:
        PositionError: it has not, or responses are compared and it does not tell where they are.
    """
    found = []
    for prompt, recorded in zip(reading.base, recording.prompts, strict=True):
        if position == "response" and not prompt.response:
            raise PositionError(
                f"{recording.name} does not tell where the response of prompt {prompt.index} is. Record it "
                f"with {option('position', 'response')}, or choose another {option('position')}.",
                option="position",
            )
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
        difference = _first_difference(prompt.ids, theirs)
        if difference is not None:
            place, ours, their = difference
            raise RecordingError(
                f"Prompt {prompt.index}: at token {place} {recording.name} has {_told(ours)}, and {other} "
                f"{_told(their)}. States are compared on the same ids: leave the prompts out, or record "
                "these."
            )


def _check_tokenizer(recording: Recording, model: LoadedModel, tokenizer: Any | None, notes: Notes) -> None:
    """Hold a model's tokenizer against the ids of a recording."""
    known = recording.contents.tokenizer
    if tokenizer is not None and known is not None and known.sha256 == tokenizer_digest(tokenizer):
        return
    with_text = [prompt for prompt in recording.prompts if prompt.text is not None]
    if tokenizer is None or not with_text:
        why = f"{model.name} brings none" if tokenizer is None else f"{recording.name} has ids without texts"
        told = (
            f"whether the ids of {recording.name} are those of {model.name}'s tokenizer is not known: {why}"
        )
        notes.add("recorded-ids", told)
        return
    differing = []
    for prompt in with_text:
        found = _first_difference(prompt.ids, _encoded(tokenizer, prompt, model.anatomy.context))
        if found is not None:
            differing.append((prompt, found))
    if not differing:
        if known is not None:
            told = f"the tokenizer of {recording.name} is another than that of {model.name}"
            notes.add("tokenizers-differ", f"{told}; they give the same ids for these prompts")
        return
    prompt, (place, ours, theirs) = differing[0]
    raise TokenizerMismatchError(
        f"Prompt {prompt.index} ({str(prompt.text)[:40]!r}): the tokenizer of {model.name} gives other ids "
        f"than {recording.name} has. At token {place} the recording has {_told(ours)}, the tokenizer "
        f"{_told(theirs)} (prompts that differ: {listed([p.index for p, _ in differing])}). Record with the "
        "tokenizer of this model."
    )


def _encoded(tokenizer: Any, prompt: RecordedPrompt, context: int | None) -> array[int]:
    text = prompt.rendered if prompt.rendered is not None else str(prompt.text)
    # A prompt that was cut when it was recorded is as long as the context.
    return encode(tokenizer, [text], special=prompt.rendered is None)[0][:context]


def _first_difference(
    ours: Sequence[int], theirs: Sequence[int]
) -> tuple[int, int | None, int | None] | None:
    pairs = enumerate(zip_longest(ours, theirs))
    return next(((place, a, b) for place, (a, b) in pairs if a != b), None)


def _told(token: int | None) -> str:
    return "no token" if token is None else str(token)


def _tokenized(prompt: RecordedPrompt) -> TokenizedPrompt:
    response = tuple(range(start, stop) for start, stop in prompt.response or ())
    return TokenizedPrompt(prompt.index, array("i", prompt.ids), prompt.rendered, response)


def _prompt(prompt: RecordedPrompt, tokenizer: Any) -> Prompt:
    text = prompt.text if prompt.text is not None else str(tokenizer.decode(prompt.ids))
    return Prompt(text, prompt.group)
