"""The one loop over pairs of states: each goes into its site's accumulators and is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lazarus.engine import ModelPair, NoisePlan, Position, Site, pick_sample, run_noise, run_pairs
from lazarus.metrics import (
    MOST_KEPT,
    OUTPUT_METRICS,
    ROW_METRICS,
    PromptMeans,
    Rows,
    SiteMeasures,
    SitePlan,
    compare_logits,
    compare_rows,
)
from lazarus.tokens import BatchPair, TokenBatch, TokenizedPrompt, make_batches

Noise = Mapping[Site, PromptMeans]


@dataclass(frozen=True)
class Plan:
    """What is run through the models, and how."""

    base_prompts: Sequence[TokenizedPrompt]
    finetuned_prompts: Sequence[TokenizedPrompt]
    pad_ids: tuple[int, int]
    batch_tokens: int
    position: Position
    localize: bool
    noise_floor: bool
    seed: int

    @property
    def longest(self) -> int:
        """The tokens of the longest prompt."""
        return max(len(p.ids) for p in (*self.base_prompts, *self.finetuned_prompts))


@dataclass(frozen=True)
class Measured:
    """What a run measured: the accumulators of every site, of the output, and of each trial of the noise."""

    sites: Mapping[Site, SiteMeasures]
    output: PromptMeans
    noise: Sequence[Noise] = field(default_factory=list)


def measure(
    pair: ModelPair, plan: Plan, running: Callable[[int], None], advanced: Callable[[int], None]
) -> Measured:
    """Run all prompts through both models, and a sample of them through base again for the noise.

    `running` is told the number of tokens in all, and `advanced` those of each batch when it is done.
    """
    batches = _batches(pair, plan)
    sample = _noise_batches(pair, plan)
    running(sum(b.base.n_tokens for b in batches) + sum(b.n_tokens for b in sample))
    n_prompts = len(plan.base_prompts)
    centered = pair.base.anatomy.uses_layer_norm and pair.finetuned.anatomy.uses_layer_norm
    site_plan = SitePlan(n_prompts, centered, _kept(n_prompts, plan.seed))
    sites = {site: SiteMeasures(site_plan) for site in pair.sites}
    output = PromptMeans(OUTPUT_METRICS, n_prompts)
    for states in run_pairs(pair, batches, plan.position, advanced, localize=plan.localize):
        if states.site == "logits":
            output.update(states.prompts, compare_logits(states.base, states.finetuned))
        else:
            sites[states.site].update(states.prompts, states.base, states.finetuned, states.local)
    return Measured(sites, output, _measure_noise(pair, plan, sample, advanced))


def _measure_noise(
    pair: ModelPair, plan: Plan, sample: Sequence[TokenBatch], advanced: Callable[[int], None]
) -> list[Noise]:
    """The same quantities for base against itself, one set of accumulators a trial."""
    trials: list[dict[Site, PromptMeans]] = []
    noise = NoisePlan(
        n_prompts=sum(len(batch.members) for batch in sample),
        batch_tokens=plan.batch_tokens,
        position=plan.position,
        padding=pair.padding(plan.longest),
        seed=plan.seed,
    )
    for trial, states in run_noise(pair, sample, noise, advanced):
        while len(trials) <= trial:
            trials.append({})
        means = trials[trial].setdefault(states.site, PromptMeans(ROW_METRICS, len(plan.base_prompts)))
        means.update(states.prompts, compare_rows(Rows.of(states.base, states.finetuned), centered=False))
    return list(trials)


def _batches(pair: ModelPair, plan: Plan) -> list[BatchPair]:
    padding = pair.padding(plan.longest)
    batches = make_batches(plan.base_prompts, plan.batch_tokens, padding, plan.pad_ids[0])
    if pair.align == "ids":
        return BatchPair.same(batches)
    return BatchPair.of(batches, plan.finetuned_prompts, plan.pad_ids[1])


def _noise_batches(pair: ModelPair, plan: Plan) -> list[TokenBatch]:
    if not plan.noise_floor:
        return []
    sample = [plan.base_prompts[i] for i in pick_sample(len(plan.base_prompts), plan.seed)]
    return make_batches(sample, plan.batch_tokens, pair.padding(plan.longest), plan.pad_ids[0])


def _kept(n_prompts: int, seed: int) -> dict[int, int]:
    """The prompts whose rows are kept for CKA, a place each: all, or a seeded sample of many."""
    if n_prompts <= MOST_KEPT:
        return {prompt: prompt for prompt in range(n_prompts)}
    chosen = np.random.default_rng(seed).choice(n_prompts, MOST_KEPT, replace=False)
    return {int(prompt): place for place, prompt in enumerate(np.sort(chosen))}
