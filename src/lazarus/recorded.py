"""A recording beside a live model: which MODEL is one, whether both read the same ids, what is told of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lazarus.errors import PromptTooLongError, TokenizerMismatchError
from lazarus.loading import Model
from lazarus.models import LoadedModel, load_tokenizer, tokenizer_digest
from lazarus.notes import Notes
from lazarus.prompts import Prompt
from lazarus.reading import Reading, check_vocabulary
from lazarus.recordings import Array, BFloat16Bits, RecordedPrompt, Recording, is_recording
from lazarus.results import ModelInfo, NotCompared
from lazarus.tokens import OnlyIds, TokenizedPrompt, encode, listed

Side = Model | Recording

_RUNS_IN = ("float32", "bfloat16", "float16")


def opened(model: Model) -> Side:
    """Return the recording that a MODEL names; any other MODEL as it is.

    Raises:
        RecordingError: it is one, and cannot be read.
    """
    return Recording.open(model) if isinstance(model, str | Path) and is_recording(model) else model


def dtype_beside(recording: Recording, chosen: str) -> str:
    """Return the dtype for a live model beside a recording: that of the recording where none was chosen."""
    dtype = recording.contents.model.run_dtype
    return dtype if chosen == "auto" and dtype in _RUNS_IN else chosen


def recorded_info(recording: Recording, not_compared: Sequence[NotCompared] = ()) -> ModelInfo:
    """Describe a recorded model as it was run, for a result."""
    model = recording.contents.model
    return ModelInfo(
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
        not_compared=list(not_compared),
        files=model.files or [],
        runtime=str(recording.contents.runtime),
    )


def how_recorded(recording: Recording) -> str:
    """Return of which model a recording is, and what ran that, as a note begins."""
    model, runtime = recording.contents.model, recording.contents.runtime
    where = f" on {runtime.device}" if runtime.device else ""
    found = f"{recording.name} is a recording of {model.id}: run by {runtime}{where} in {model.run_dtype}"
    details = ", ".join(f"{key} {value}" for key, value in runtime.details.items())
    return f"{found} ({details})" if details else found


def read_brought(
    recording: Recording, model: LoadedModel, tokenizer: Any | None, notes: Notes, *, trust_remote_code: bool
) -> Reading:
    """Return the prompts that a recording brings, for a live model to read.

    Their ids are held against the tokenizer that is given, or the model's own.

    Raises:
        TokenizerMismatchError: the tokenizer gives other ids for a text of the recording.
        PromptDataError: an id has no embedding in the model, or a prompt is longer than its context.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
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


def as_array(rows: Tensor) -> Array:
    """Return rows as recordings hold them; bfloat16, which NumPy lacks, by its bits."""
    if rows.dtype == torch.bfloat16:
        return BFloat16Bits(rows.contiguous().view(torch.int16).numpy().view(np.uint16))
    return rows.numpy()


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> tuple[int, int | None, int | None] | None:
    """Return the first place at which two lists of ids differ, and both ids; None where they are the same."""
    pairs = enumerate(zip_longest(ours, theirs))
    return next(((place, a, b) for place, (a, b) in pairs if a != b), None)


def id_text(token: int | None) -> str:
    """Return an id as messages have it; None is the end of a prompt."""
    return "no token" if token is None else str(token)


def _check_tokenizer(recording: Recording, model: LoadedModel, tokenizer: Any | None, notes: Notes) -> None:
    """Hold a model's tokenizer against the ids of a recording."""
    known = recording.contents.tokenizer
    if tokenizer is not None and known is not None and known.sha256 == tokenizer_digest(tokenizer):
        return
    with_text = [prompt for prompt in recording.prompts if prompt.text is not None]
    if tokenizer is None or not with_text:
        why = f"{model.name} brings none" if tokenizer is None else f"{recording.name} has ids without texts"
        text = (
            f"whether the ids of {recording.name} are those of {model.name}'s tokenizer is not known: {why}"
        )
        notes.add("recorded-ids", text)
        return
    differing = []
    for prompt in with_text:
        found = first_difference(prompt.ids, _encoded(tokenizer, prompt, model.anatomy.context))
        if found is not None:
            differing.append((prompt, found))
    if not differing:
        if known is not None:
            text = f"the tokenizer of {recording.name} is another than that of {model.name}"
            notes.add("tokenizers-differ", f"{text}; they give the same ids for these prompts")
        return
    prompt, (place, ours, theirs) = differing[0]
    raise TokenizerMismatchError(
        f"Prompt {prompt.index} ({str(prompt.text)[:40]!r}): the tokenizer of {model.name} gives other ids "
        f"than {recording.name} has. At token {place} the recording has {id_text(ours)}, the tokenizer "
        f"{id_text(theirs)} (prompts that differ: {listed([p.index for p, _ in differing])}). Record with "
        "the tokenizer of this model."
    )


def _encoded(tokenizer: Any, prompt: RecordedPrompt, context: int | None) -> array[int]:
    text = prompt.rendered if prompt.rendered is not None else str(prompt.text)
    # A prompt that was cut when it was recorded is as long as the context.
    return encode(tokenizer, [text], special=prompt.rendered is None)[0][:context]


def _tokenized(prompt: RecordedPrompt) -> TokenizedPrompt:
    response = tuple(range(start, stop) for start, stop in prompt.response or ())
    return TokenizedPrompt(prompt.index, array("i", prompt.ids), prompt.rendered, response)


def _prompt(prompt: RecordedPrompt, tokenizer: Any) -> Prompt:
    text = prompt.text if prompt.text is not None else str(tokenizer.decode(prompt.ids))
    return Prompt(text, prompt.group)
