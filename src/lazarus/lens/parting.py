"""The token of a prompt at which two models' first choices first differ: the prompt is read up to there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lazarus.engine import Conventions, Head
from lazarus.engine.recorder import Recorder, RowSelection
from lazarus.errors import UsageError
from lazarus.lens.reading import check_head
from lazarus.messages import option
from lazarus.metrics import MOST_LOGITS, has_distribution
from lazarus.models import LoadedModel
from lazarus.notes import Notes
from lazarus.reading import Reading
from lazarus.sites import tokens_of
from lazarus.tokens import token_text


def cut_at_parting(
    models: tuple[LoadedModel, LoadedModel],
    conventions: tuple[Conventions, Conventions],
    reading: Reading,
    notes: Notes,
) -> Reading:
    """Return the reading with its prompt cut after the first token after which first choices differ.

    Where the prompt has a response, only tokens of the response count, and the one before it. Where choices
    differ nowhere the prompt stays whole, with a note. Position 0 is left out, but where a response begins
    right after it.

    Raises:
        UsageError: the two models read the prompt as other ids.
        UnsupportedModelError: a model predicts no next token.
        DeviceError: out of memory, or an operator that the device lacks.
    """
    ours, theirs = reading.base[0], reading.finetuned[0]
    if ours.ids != theirs.ids:
        raise UsageError(
            f"{option('at', 'parting')} holds the models' choices against each other token by token, and the "
            f"two read the prompt as other ids ({len(ours.ids)} tokens and {len(theirs.ids)}). Use "
            f"{option('at', 'last')}.",
            option="at",
        )
    one, other = (
        [None if i is None else token_text(tokenizer, i) for i in _first_choices(model, known, ours.ids)]
        for model, known, tokenizer in zip(models, conventions, reading.tokenizers, strict=True)
    )
    places = tokens_of(ours, "response" if ours.response else "all")
    known = [i for i in places if None not in (one[i], other[i])]
    parted = next((i for i in known if one[i] != other[i]), None)
    if parted is None:
        why = (
            "the first choices of both are the same after every token"
            if len(known) == len(places)
            else f"logits are not finite after {len(places) - len(known)} of {len(places)} tokens, and first "
            "choices are the same after the others"
        )
        notes.add("no-parting", f"no parting was found, so the last token is read: {why}")
        return reading
    ours, theirs = (replace(prompt, ids=prompt.ids[: parted + 1]) for prompt in (ours, theirs))
    return replace(reading, base=[ours], finetuned=[theirs])


def _first_choices(model: LoadedModel, conventions: Conventions, ids: Sequence[int]) -> list[int | None]:
    """Return the most probable token after each token; None where the logits are not finite."""
    head = Head(model, check_head(model, conventions))
    input_ids = torch.tensor([list(ids)])
    take = RowSelection(_nothing, lambda states: states[0])
    states = Recorder(model).run(input_ids, torch.ones_like(input_ids), take).final
    assert states is not None
    found: list[int | None] = []
    for rows in torch.split(states, max(1, MOST_LOGITS // head.n_tokens)):
        logits = head.logits(rows)
        known, chosen = has_distribution(logits).tolist(), logits.argmax(-1).tolist()
        found += [i if is_known else None for i, is_known in zip(chosen, known, strict=True)]
    return found


def _nothing(states: Tensor) -> Tensor:
    """Keep nothing of a block's hidden states."""
    return states[:0].clone()
