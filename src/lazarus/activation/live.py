"""Facts of two live models beside their states: of the pair, and of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from lazarus.activation.accumulation import Accumulation
from lazarus.activation.breaks import broken_parts
from lazarus.activation.findings import Findings
from lazarus.activation.rounding import find_rounding
from lazarus.activation.scope import Scope
from lazarus.engine import Conventions, ModelPair
from lazarus.facts import ModelFacts, PairFacts, WeightFacts
from lazarus.models import LoadedModel, weights_identical, why_the_same
from lazarus.notes import Notes
from lazarus.results import NotCompared


def pair_facts(pair: ModelPair, scope: Scope) -> PairFacts:
    """Return what is known of two live models, and of what is compared of them."""
    base = _facts(pair.base, pair.base_conventions, scope.outside[0])
    finetuned = _facts(pair.finetuned, pair.finetuned_conventions, scope.outside[1])
    return PairFacts(base, finetuned, pair.align, pair.why_no_scores)


def facts_after(pair: ModelPair, facts: PairFacts, breaks: Notes, notes: Notes) -> PairFacts:
    """Return the facts with what is known after the run alone, and note it.

    These are the files that both were read from, and the weights that hold NaN or infinity, which are not
    compared: models that are read block by block are read while they run.

    Raises:
        WeightsError: a file changed while it was read, or is not what the Hub says.
    """
    parts = broken_parts(pair, facts.names, breaks)
    files = [model.files.told(notes) for model in (pair.base, pair.finetuned)]
    base, finetuned = (
        replace(
            side, info=msgspec.structs.replace(info, not_compared=[*info.not_compared, *more], files=read)
        )
        for side, info, more, read in zip(
            (facts.base, facts.finetuned), (facts.base.info, facts.finetuned.info), parts, files, strict=True
        )
    )
    return replace(facts, base=base, finetuned=finetuned)


def weight_facts(pair: ModelPair, seen: Accumulation) -> WeightFacts:
    """Look at the weights of two live models, as far as what was seen of their states asks for it."""
    found = Findings(seen)
    identical = pair.same_shape and weights_identical(pair.base, pair.finetuned)
    if found.may_be_rounding:
        return WeightFacts(identical, rounding=find_rounding(pair.base, pair.finetuned))
    unchanged = found.verdict in ("identical", "within_noise")
    causes = why_the_same(pair.base, pair.finetuned, identical) if unchanged else []
    return WeightFacts(identical, causes)


def _facts(model: LoadedModel, conventions: Conventions, outside: Sequence[NotCompared]) -> ModelFacts:
    return ModelFacts(
        info=model.info(conventions.n_layers, outside),
        width=conventions.width,
        is_causal=conventions.causal,
        uses_layer_norm=model.anatomy.uses_layer_norm,
        has_final_norm=conventions.has_final_norm,
        why_no_head=conventions.why_no_head if conventions.head_reads is None else None,
    )
