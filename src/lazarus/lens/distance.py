"""Distances of two models' next-token distributions, over one vocabulary or over two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lazarus.lens.lens import Lens
from lazarus.lens.vocabulary import Vocabulary
from lazarus.metrics import OUTPUT_METRICS, compare_logits
from lazarus.notes import Notes
from lazarus.results import LensPair, finite_or_none
from lazarus.tokens import listed


@dataclass(frozen=True)
class Outcomes:
    """Next tokens that both models can give, as columns that mean the same in both.

    With one vocabulary they are its ids. With two they are the texts that are tokens of both. Whatever one
    model alone can give is one more outcome. `places` has the outcome of each id of each model, or is None
    where every id is an outcome of its own.
    """

    n_outcomes: int
    places: tuple[Tensor, Tensor] | None
    same_ids: bool = False
    """an id is the same token in both"""

    def logits(self, logits: Tensor, side: int) -> Tensor:
        """One distribution over the outcomes, [1, outcomes], from one over model `side`'s vocabulary."""
        if self.places is None:
            return logits[None]
        merged = torch.zeros(self.n_outcomes, dtype=torch.float64)
        # Log probabilities serve as logits, and an outcome that cannot come has −∞.
        return merged.index_add_(0, self.places[side], logits.double().softmax(-1)).log()[None]


def find_outcomes(one: Vocabulary, other: Vocabulary, notes: Notes) -> Outcomes:
    """Return the outcomes that two models have in common; where that is not every token, note it."""
    n_common = min(one.n_tokens, other.n_tokens)
    same_heads = one.n_tokens == other.n_tokens
    # An LM head may have rows beyond the last token, which pad the table: no id of the tokenizer means them.
    if one.ids == other.ids and (same_heads or max(one.ids.values()) < n_common):
        if same_heads:
            return Outcomes(n_common, None, same_ids=True)
        notes.add(
            "vocabularies-differ",
            f"model 1 has logits for {one.n_tokens} tokens and model 2 for {other.n_tokens}: KL and JS are "
            f"over the {n_common} that both have and one outcome for any other",
        )
        # All ids that one model alone has fall into the last outcome.
        first, second = (torch.arange(v.n_tokens).clamp(max=n_common) for v in (one, other))
        return Outcomes(n_common + 1, (first, second), same_ids=True)
    common = sorted({t for t in one.texts if t is not None} & {t for t in other.texts if t is not None})
    # `common` is sorted: a set has another order in every process, and sums are rounded by their order.
    numbers = {text: number for number, text in enumerate(common)}
    n_texts = len(common)
    places = [
        torch.tensor([n_texts if t is None else numbers.get(t, n_texts) for t in v.texts])
        for v in (one, other)
    ]
    notes.add(
        "vocabularies-differ",
        f"the two vocabularies differ, so KL and JS are over the {n_texts} texts that are tokens of both and "
        "one outcome for any other; merging outcomes can only lower them, so they are lower bounds (data "
        "processing inequality, Cover & Thomas 2006, theorem 2.8.1)",
    )
    return Outcomes(n_texts + 1, (places[0], places[1]))


def lens_pair(lenses: tuple[Lens, Lens], outcomes: Outcomes, layers: tuple[int, int]) -> LensPair:
    """A layer of each model: KL both ways and JS, in nats and float64.

    They are null where nothing is read from one of the two, and a KL is where it is infinite.
    """
    ours, theirs = (
        outcomes.logits(lens.logits[layer], side)
        for side, (lens, layer) in enumerate(zip(lenses, layers, strict=True))
    )
    compared = compare_logits(ours, theirs)
    values = dict(zip(OUTPUT_METRICS, compared.values[0].tolist(), strict=True))
    choices = lenses[0].first_choices[layers[0]], lenses[1].first_choices[layers[1]]
    return LensPair(
        layer=layers[0],
        model2_layer=layers[1],
        kl_1_2=finite_or_none(values["kl_base_finetuned"]),
        kl_2_1=finite_or_none(values["kl_finetuned_base"]),
        js=finite_or_none(values["js"]),
        same_first_choice=same_token(lenses, choices, same_ids=outcomes.same_ids),
    )


def same_token(
    lenses: tuple[Lens, Lens], choices: tuple[int | None, int | None], *, same_ids: bool
) -> bool | None:
    """Return whether two tokens are one: by their ids where these mean the same, else by their texts."""
    ours, theirs = choices
    if ours is None or theirs is None:
        return None
    if same_ids:
        return ours == theirs
    return lenses[0].vocabulary.text(ours) == lenses[1].vocabulary.text(theirs)


def note_distances(pairs: Sequence[LensPair], notes: Notes) -> None:
    """Note where KL is infinite: one model gives no probability at all to what the other can give."""
    for one, other, name in ((1, 2, "kl_1_2"), (2, 1, "kl_2_1")):
        infinite = [pair.layer for pair in pairs if pair.js is not None and getattr(pair, name) is None]
        if infinite:
            notes.add(
                "infinite-kl",
                f"KL(model {one}‖model {other}) is infinite, and null, at layers {listed(infinite)} (of "
                f"{len(pairs)}): model {one} can give what has the probability 0 in model {other}",
                layers=infinite,
            )
