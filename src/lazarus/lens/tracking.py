"""The tokens that are followed through the layers, in each model its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lazarus.lens.distance import same_token
from lazarus.lens.lens import Lens
from lazarus.notes import Notes
from lazarus.results import TokenEvolution

Lenses = tuple[Lens, Lens]


@dataclass(frozen=True)
class Tracked:
    """A text and the token that stands for it in each model; None where a model has none."""

    text: str
    ids: tuple[int | None, int | None]


def find_tracked(lenses: Lenses, words: Sequence[str] | None, *, same_ids: bool) -> list[Tracked]:
    """Return the tokens of the given words, or the first choices of both models at the end, each text once.

    A word's token in a model is the first one of the word, with or without a space before it, whichever ends
    more probable. A first choice is that very token in its own model; in the other it is the token of that id
    where ids mean the same (`same_ids`), or that text, or else what its text begins with.
    """
    if words is None:
        return _first_choices(lenses, same_ids=same_ids)
    return [Tracked(word, (_token_of(lenses[0], word), _token_of(lenses[1], word))) for word in words]


def _first_choices(lenses: Lenses, *, same_ids: bool) -> list[Tracked]:
    finals = lenses[0].first_choices[-1], lenses[1].first_choices[-1]
    texts = [None if i is None else lens.vocabulary.text(i) for lens, i in zip(lenses, finals, strict=True)]
    if texts[0] is not None and same_token(lenses, finals, same_ids=same_ids):
        return [Tracked(texts[0], finals)]
    found = []
    for side, (text, token_id) in enumerate(zip(texts, finals, strict=True)):
        if text is not None and token_id is not None:
            other = _counterpart(lenses[1 - side], text, token_id if same_ids else None)
            found.append(Tracked(text, (other, token_id) if side else (token_id, other)))
    return found


def _counterpart(lens: Lens, text: str, token_id: int | None) -> int | None:
    """The token of another model's first choice; `token_id` is its id where ids mean the same."""
    if token_id is not None:
        return token_id if token_id < lens.vocabulary.n_tokens else None
    same = [i for i, theirs in enumerate(lens.vocabulary.texts) if theirs == text]
    return lens.likeliest(same) if same else _token_of(lens, text.strip() or text)


def _token_of(lens: Lens, word: str) -> int | None:
    return lens.likeliest(lens.vocabulary.first_tokens(word))


def evolution(lens: Lens, tracked: str, token_id: int | None) -> TokenEvolution:
    """A tracked token in one model, layer by layer; all null where the model has none for it."""
    if token_id is None:
        nothing: list[None] = [None] * len(lens.logits)
        return TokenEvolution(
            tracked=tracked,
            token=None,
            token_id=None,
            emergence_layer=None,
            final_probability=None,
            probability=list(nothing),
            rank=list(nothing),
        )
    probabilities = lens.probabilities(token_id)
    return TokenEvolution(
        tracked=tracked,
        token=lens.vocabulary.text(token_id),
        token_id=token_id,
        emergence_layer=lens.emergence(token_id),
        final_probability=probabilities[-1],
        probability=probabilities,
        rank=lens.ranks(token_id),
    )


def note_tracking(lenses: Lenses, tracked: Sequence[Tracked], notes: Notes) -> None:
    """Note which tracked texts a model has no token for, and of which it has the beginning alone."""
    for each in tracked:
        for lens, token_id in zip(lenses, each.ids, strict=True):
            name, text = lens.info.id, None if token_id is None else lens.vocabulary.text(token_id)
            if text is None:
                told = f"tracked token {each.text!r}: {name} has no token for it"
                notes.add("tracked-token", told, model=name)
            elif text.strip() != each.text.strip():
                notes.add(
                    "tracked-token",
                    f"tracked token {each.text!r}: {name} has no single token for it, so its first one, "
                    f"{text!r}, is tracked",
                    model=name,
                )
