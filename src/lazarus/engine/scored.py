"""The outputs beside next tokens that two models have in common, and which of their labels are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lazarus.engine.recorder import shortened
from lazarus.engine.score_heads import EmbeddingHead, LabelCheck, LabelHead, ScoreHead
from lazarus.metrics import ScorePlan, match_labels
from lazarus.models import Embedder, LoadedModel, NotReadError, read_embedder
from lazarus.notes import Notes

MOST_NAMED = 6
"""The labels that a note names."""


@dataclass(frozen=True)
class Scored:
    """The outputs of two models that are compared beside next tokens."""

    heads: tuple[ScoreHead, ScoreHead]
    plan: ScorePlan
    names: tuple[Sequence[str], Sequence[str]] = ((), ())
    """what each model calls its labels"""

    def own(self, side: int) -> list[str]:
        """The labels that one of the two alone has."""
        compared = (self.plan.base, self.plan.finetuned)[side]
        return [name for i, name in enumerate(self.names[side]) if i not in compared]

    def note(self, longest: int, notes: Notes) -> None:
        """Note how labels were matched, and what sentence-transformers would have done besides."""
        told = None
        if self.own(0) or self.own(1):
            told = f"of the labels only {_listed(self.plan.labels)} were compared, which both have"
        elif self.plan.base != self.plan.finetuned:
            told = "labels were matched by their names"
        elif self.names[0] != self.names[1]:
            told = "labels were matched by their numbers"
        if told is not None:
            notes.add("labels-matched", f"{told}: {_both(*self.names)}")
        limits = [h.embedder.most_tokens for h in self.heads if isinstance(h, EmbeddingHead)]
        limit = min((each for each in limits if each), default=longest)
        if longest > limit:
            notes.add(
                "embedded-whole",
                f"prompts of up to {longest} tokens were embedded whole: sentence-transformers keeps {limit}",
            )


def find_scored(
    models: tuple[LoadedModel, LoadedModel],
    checks: tuple[LabelCheck, LabelCheck],
    align: Literal["ids", "text"],
) -> Scored | str | None:
    """Find out which outputs beside next tokens two models have in common; text says why there are none.

    Two sentence-transformers models are compared by their embeddings, and else two heads of labels by theirs.
    None where neither model has any.
    """
    try:
        embedders = [_embedder(model) for model in models]
    except NotReadError as error:
        return str(error)
    if None not in embedders:
        return _of_embedders(models, [each for each in embedders if each is not None])
    names = [model.name for model in models]
    found = [check.conventions for check in checks]
    if found[0] is None or found[1] is None:
        whys = [check.why_not for check in checks if check.why_not]
        having = [name for name, each, e in zip(names, found, embedders, strict=True) if each or e]
        if whys or not having:
            return next(iter(whys), None)
        is_alone = len(having) == 1
        return f"only {having[0]} gives scores or embeddings" if is_alone else "one scores, and one embeds"
    kind = found[0].kind
    if kind != found[1].kind:
        return f"{names[0]} and {names[1]} do not both score prompts, or both tokens"
    if kind == "token_scores" and align == "text":
        return "scores of tokens were not compared, because each model has tokens of its own"
    labels = (_labels(models[0]), _labels(models[1]))
    plan = match_labels(*labels, kind)
    if plan is None:
        return f"it is not known which labels are the same: {_both(*labels)}"
    return Scored((LabelHead(models[0], found[0]), LabelHead(models[1], found[1])), plan, labels)


def _of_embedders(models: Sequence[LoadedModel], embedders: Sequence[Embedder]) -> Scored | str:
    widths = list[int]()
    for model, embedder in zip(models, embedders, strict=True):
        states = torch.zeros(1, model.anatomy.hidden_size, dtype=model.model.dtype, device=model.device)
        try:
            widths.append(len(embedder.embed(states)))
        except RuntimeError as error:
            return f"{model.name}: its modules do not fit each other: {shortened(error)}"
    if widths[0] != widths[1]:
        return f"embeddings of {widths[0]} and {widths[1]} numbers were not compared"
    return Scored((EmbeddingHead(embedders[0]), EmbeddingHead(embedders[1])), ScorePlan("embedding"))


def _embedder(model: LoadedModel) -> Embedder | None:
    try:
        return read_embedder(model.source, model.model.dtype, model.device)
    except NotReadError as error:
        raise NotReadError(
            f"the modules of {model.name} after its transformer were not run: {error}"
        ) from None


def _labels(model: LoadedModel) -> tuple[str, ...]:
    config = model.model.config
    return tuple(str(config.id2label.get(i, f"LABEL_{i}")) for i in range(config.num_labels))


def _both(ours: Sequence[str], theirs: Sequence[str]) -> str:
    return f"{_listed(ours)} in base, {_listed(theirs)} in fine-tuned"


def _listed(names: Sequence[str]) -> str:
    shown = [repr(name) for name in names[:MOST_NAMED]]
    left = len(names) - len(shown)
    return ", ".join([*shown, f"{left} more"] if left else shown)
