"""The scope of a run: the parts of two models that it compares, and those that it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lazarus.engine import Coverage, ModelPair, find_coverage
from lazarus.metrics import Outcomes, match_outcomes
from lazarus.models import find_outside
from lazarus.notes import Notes
from lazarus.reading import Reading
from lazarus.results import NotCompared, note_outside

Parts = Sequence[NotCompared]


@dataclass(frozen=True)
class Scope:
    """The parts of a pair that are compared."""

    outside: tuple[Parts, Parts]
    """what base and the fine-tuned model hold besides"""
    outcomes: Outcomes | None
    """which next tokens both have; None where every id is the same token in both, or none is compared"""


def find_scope(pair: ModelPair, reading: Reading, notes: Notes) -> Scope:
    """Find out what is compared of a pair, from its models and their files; what is not is noted.

    Raises:
        DeviceError: out of memory.
        ModelError: a file that was not loaded cannot be read.
    """
    with_head, scored = pair.shares_vocabulary, pair.scored
    ours = find_coverage(
        pair.base, pair.base_conventions.head_reads if with_head else None, pair.score_head(0)
    )
    theirs = ours
    # One design, with one adapter or with none: the same tensors can be seen in both.
    if not pair.same_design or pair.base.adapter != pair.finetuned.adapter:
        theirs = find_coverage(
            pair.finetuned, pair.finetuned_conventions.head_reads if with_head else None, pair.score_head(1)
        )
    embeds = scored is not None and scored.plan.kind == "embedding"
    base, finetuned = find_outside(pair.base, pair.finetuned, (ours.compared, theirs.compared), embeds=embeds)
    for side, parts in enumerate((base, finetuned)):
        if scored is not None and (own := scored.own(side)):
            what = f"labels that the other does not have ({', '.join(own)})"
            parts.append(NotCompared(what=what, n_tensors=0, differs=True))
    note_outside(base, finetuned, notes)
    rows = _match_rows(pair, reading, (ours, theirs)) if pair.align == "ids" else None
    for side, parts in enumerate((base, finetuned)):
        if rows is not None and rows.n_own[side]:
            what = f"{rows.n_own[side]} rows of the vocabulary that the other does not have"
            parts.append(NotCompared(what=what, n_tensors=1, differs=True))
    if rows is not None:
        _note_vocabulary(rows, notes, is_compared=with_head)
    return Scope((base, finetuned), rows if with_head else None)


def _match_rows(pair: ModelPair, reading: Reading, coverages: tuple[Coverage, Coverage]) -> Outcomes | None:
    """Match the rows of both vocabularies by their tokens: those of the LM heads, or of the embeddings."""
    n_tokens = [
        coverage.n_logits or getattr(model.model.get_input_embeddings(), "num_embeddings", None)
        for model, coverage in zip((pair.base, pair.finetuned), coverages, strict=True)
    ]
    if n_tokens[0] is None or n_tokens[1] is None:
        return None
    one, other = reading.tokenizers
    # One tokenizer gives each id one token, so only the sizes of the two vocabularies may differ.
    ours, theirs = (None, None) if one is other else (one.get_vocab(), other.get_vocab())
    return match_outcomes(ours, theirs, (n_tokens[0], n_tokens[1]))


def _note_vocabulary(rows: Outcomes, notes: Notes, *, is_compared: bool) -> None:
    told = (
        f"of the {rows.n_tokens[0]} tokens of base and the {rows.n_tokens[1]} of fine-tuned, "
        f"{rows.n_common} are in both; base alone has {rows.n_own[0]}, fine-tuned alone {rows.n_own[1]}"
    )
    told += ": these count as one more outcome of the next token" if is_compared else ""
    notes.add("vocabularies-differ", told)
