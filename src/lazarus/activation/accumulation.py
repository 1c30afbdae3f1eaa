"""The accumulators of a comparison: pairs of states go in and are forgotten, means come out at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from torch import Tensor

from lazarus.activation.components import ComponentMeans
from lazarus.activation.repeats import Repeats
from lazarus.facts import ComponentSite, PairFacts, Site
from lazarus.metrics import (
    LOCAL_METRICS,
    MOST_KEPT,
    OUTPUT_METRICS,
    ROW_METRICS,
    SCORE_METRICS,
    AccumulatorState,
    BatchRows,
    DiffMining,
    OncePerBatch,
    Outcomes,
    PromptMeans,
    Rows,
    RowValues,
    ScoreMeans,
    ScorePlan,
    SiteMeasures,
    SitePlan,
    Together,
    TokenOutputs,
    Update,
    compare_local,
    compare_logits,
    compare_rows,
    compare_scores,
    count_by_prompt,
    has_distribution,
    margin_motion,
    part_of,
    parts_of,
    within,
)
from lazarus.results import PromptRecord, Settings
from lazarus.sites import StatePair


@dataclass(frozen=True)
class Plan:
    """The prompts and options of a comparison, and how it is summed up."""

    prompts: Sequence[PromptRecord]
    settings: Settings
    traced: Sequence[int] = ()
    """the prompts of which every token is kept"""
    outcomes: Outcomes | None = None
    """which next tokens both models have; None where every id is the same token in both"""
    repeats: Repeats | None = None
    """the prompts whose states come once for several; None where each prompt has its own"""
    scored: ScorePlan | None = None
    """how scores or embeddings are compared; None where next tokens are"""

    @classmethod
    def of(
        cls, facts: PairFacts, texts: Sequence[str], n_tokens: Sequence[int] | None = None, **settings: object
    ) -> Plan:
        """Return the plan of a comparison whose states come from elsewhere, with the default settings.

        Args:
            facts: the pair.
            texts: the prompts.
            n_tokens: how many tokens each has, where that is known; 1 otherwise.
            settings: those that differ, such as `position="mean"` or `threshold=0.05`.
        """
        counts = [1] * len(texts) if n_tokens is None else n_tokens
        prompts = [
            PromptRecord(index=i, text=text, group=None, n_tokens=count, rendered=None)
            for i, (text, count) in enumerate(zip(texts, counts, strict=True))
        ]
        known = {"dtype": facts.base.info.run_dtype, "align": facts.align, **settings}
        return cls(prompts, Settings(**{**_DEFAULTS, **known}))  # type: ignore[arg-type]


_DEFAULTS = {
    "position": "last",
    "threshold": 0.1,
    "device": "cpu",
    "batch_tokens": 0,
    "chat_template": "none",
    "memory": "resident",
    "localize": False,
    "noise_floor": False,
    "fail_above": None,
    "expect": None,
    "no_split": True,
    "truncate": False,
    "layers_path": None,
    "seed": 0,
    "trust_remote_code": False,
}


@dataclass
class Accumulation:
    """The sums of a comparison, or of a part of it. The order in which pairs come does not matter."""

    facts: PairFacts
    plan: Plan
    sites: dict[Site, SiteMeasures] = field(init=False)
    """the accumulators of each site of the residual stream"""
    components: ComponentMeans = field(init=False)
    """those inside the blocks, where they are compared"""
    output: PromptMeans = field(init=False)
    """those of the next-token distributions, or of the scores"""
    token_outputs: TokenOutputs = field(init=False)
    """the next-token distributions of the traced prompts, token by token"""
    margin_noise: float = field(init=False)
    """the most that noise has moved the margin between base's two likeliest tokens; NaN if not measured"""
    noise: list[dict[Site, PromptMeans]] = field(init=False)
    """those of each trial of the noise"""
    local_noise: list[dict[Site, PromptMeans]] = field(init=False)
    """of each trial, the local change of blocks that are the same, on another run of the same model"""
    n_logits_not_finite: np.ndarray = field(init=False)
    """the rows of logits that are not finite, [2, prompts]: in base, and in the fine-tuned model"""
    mining: DiffMining | None = field(init=False)
    """the tokens that the fine-tuned model raises and lowers most; None unless a readout was asked for"""

    def __post_init__(self) -> None:
        self.n_prompts = len(self.plan.prompts)
        self.repeats = self.plan.repeats or Repeats.none(self.n_prompts)
        centered = self.facts.base.uses_layer_norm and self.facts.finetuned.uses_layer_norm
        kept = _kept(self.n_prompts, self.plan.settings.seed)
        site_plan = SitePlan(self.n_prompts, centered, kept, self.plan.traced, self.facts.replays)
        self.sites = {site: SiteMeasures(site_plan) for site in self.facts.sites}
        self.components = ComponentMeans(self.n_prompts)
        self.output = self._means_of_output(kept)
        self.token_outputs = TokenOutputs(self.plan.traced)
        self.margin_noise = float("nan")
        self.noise, self.local_noise = [], []
        self.n_logits_not_finite = np.zeros((2, self.n_prompts), dtype=np.int64)
        is_mined = self.plan.settings.readout is not None
        self.mining = DiffMining(self.repeats.others, self.plan.outcomes) if is_mined else None
        self._batch_rows = OncePerBatch(partial(BatchRows.of, plan=site_plan))

    def take(self, pairs: Iterable[StatePair]) -> Accumulation:
        """Take in every pair, for each of the prompts that it stands for; returns itself."""
        together = Together()
        for pair in pairs:
            once = pair.trial is not None or pair.site == "logits"
            for each in [pair] if once else self.repeats.spread(pair):
                together.add(self._updating(each), each.base, each.finetuned)
            # The last site of a batch: the rows of its other sites may go.
            if pair.site == "logits":
                together.finish()
        together.finish()
        return self

    def _updating(self, pair: StatePair) -> Update[None]:
        """Return what takes a pair in."""
        if isinstance(pair.site, ComponentSite):
            return self.components.updating(pair)
        # Before the logits: trials have logits as well, and of these only the relative L2 is used.
        if pair.trial is not None:
            return self._updating_trial(pair, pair.trial)
        if pair.site == "logits":
            return self._updating_logits(pair)
        batch = self._batch_rows(pair.prompts)
        return self.sites[pair.site].updating(batch, pair.base, pair.finetuned, pair.local)

    def state(self) -> AccumulatorState:
        """Return what was seen, as arrays by their names."""
        found = within("output", self.output.state())
        found |= within("tokens", self.token_outputs.state())
        found |= within("margin", {"noise": np.asarray(self.margin_noise)})
        if self.n_logits_not_finite.any():
            found |= within("not_finite", {"logits": self.n_logits_not_finite})
        found |= within("components", self.components.state())
        if self.mining is not None:
            found |= within("mining", self.mining.state())
        for site, measures in self.sites.items():
            found |= within(f"sites/{site}", measures.state())
        for name, trials in (("noise", self.noise), ("local_noise", self.local_noise)):
            for trial, noise in enumerate(trials):
                for site, means in noise.items():
                    found |= within(f"{name}/{trial}/{site}", means.state())
        return found

    def add(self, state: AccumulatorState) -> None:
        """Take in what another one has seen, from its `state`."""
        parts = parts_of(state)
        # The keys of a state are text, and layers are integers.
        named: dict[str, Site] = {str(site): site for site in (*self.facts.sites, "logits")}
        # With all that is under the name: scores have parts of their own.
        self.output.add(part_of(state, "output"))
        self.token_outputs.add(parts["tokens"])
        self._move_margin(parts["margin"]["noise"].item())
        self.n_logits_not_finite += parts.get("not_finite", {}).get("logits", 0)
        self.components.add(parts.get("components", {}))
        # A shard may come of a run with a readout, or of one without.
        if self.mining is not None and "mining" in parts:
            self.mining.add(parts["mining"])
        for site, measures in parts_of(parts["sites"]).items():
            self.sites[named[site]].add(measures)
        for name, is_local in (("noise", False), ("local_noise", True)):
            for trial, noise in parts_of(parts.get(name, {})).items():
                for site, means in parts_of(noise).items():
                    self._trial(int(trial), named[site], is_local=is_local).add(means)

    def _means_of_output(self, kept: dict[int, int]) -> PromptMeans:
        scored = self.plan.scored
        if scored is None:
            return PromptMeans(OUTPUT_METRICS, self.n_prompts)
        # Scores are few numbers, and each prompt's are told; embeddings of a sample are kept.
        slots = {"scores": {i: i for i in range(self.n_prompts)}, "embedding": kept, "token_scores": {}}
        return ScoreMeans(self.n_prompts, scored.kind, slots[scored.kind])

    def _updating_trial(self, pair: StatePair, trial: int) -> Update[None]:
        if pair.local is not None:
            means = self._trial(trial, pair.site, is_local=True)
            local = compare_local(Rows.of(pair.finetuned, pair.local))
            yield from means.updating(pair.prompts, local)
            return
        scored, means = self.plan.scored, self._trial(trial, pair.site)
        if scored is not None and pair.site == "logits":
            # Both are base's.
            ours, theirs = (scored.columns(scores, 0) for scores in (pair.base, pair.finetuned))
            yield from means.updating(pair.prompts, compare_scores(ours, theirs, scored.kind))
            return
        compared = compare_rows(Rows.of(pair.base, pair.finetuned), centered=False)
        yield from means.updating(pair.prompts, compared)
        if pair.site == "logits" and self.plan.traced:
            [motion] = yield [margin_motion(pair.base, pair.finetuned)]
            self._move_margin(motion.item())

    def _take_scores(self, pair: StatePair, scored: ScorePlan) -> None:
        assert isinstance(self.output, ScoreMeans)
        ours, theirs = scored.columns(pair.base, 0), scored.columns(pair.finetuned, 1)
        for each in self.repeats.spread(replace(pair, base=ours, finetuned=theirs)):
            self.output.compare(each.prompts, each.base, each.finetuned)
            not_finite = [~scores.isfinite().all(-1) for scores in (each.base, each.finetuned)]
            count_by_prompt(self.n_logits_not_finite, each.prompts, not_finite)

    def _updating_logits(self, pair: StatePair) -> Update[None]:
        if self.plan.scored is not None:
            self._take_scores(pair, self.plan.scored)
            return
        if pair.compared is not None:
            self.output.update(pair.prompts, pair.compared)
            return
        values = yield from compare_logits(pair.base, pair.finetuned, self.plan.outcomes).landing()
        if self.mining is not None:
            self.mining.update(pair.prompts, pair.base, pair.finetuned, values.valid)
        not_finite = list[Tensor]()
        # A second look at all logits, and nearly never needed.
        if not values.valid.all():
            not_finite = [~has_distribution(logits) for logits in (pair.base, pair.finetuned)]
        # Compared once, and counted for every prompt that has the same tokens.
        for rows, prompts in ((None, pair.prompts), *self.repeats.copies(pair.prompts)):
            places = slice(None) if rows is None else rows
            own = RowValues(values.values[places], values.valid[places])
            self.output.update(prompts, own)
            if self.plan.traced:
                sides = pair.base, pair.finetuned
                self.token_outputs.update(prompts, sides, own, self.plan.outcomes, rows)
            # On the CPU: `has_distribution` answers there.
            count_by_prompt(self.n_logits_not_finite, prompts, [side[places] for side in not_finite])

    def _move_margin(self, motion: float) -> None:
        # `fmax` leaves NaN, which is what was not measured, behind.
        self.margin_noise = float(np.fmax(self.margin_noise, motion))

    def _trial(self, trial: int, site: Site, *, is_local: bool = False) -> PromptMeans:
        trials = self.local_noise if is_local else self.noise
        # Trials come in any order.
        while len(trials) <= trial:
            trials.append({})
        of_scores = site == "logits" and self.plan.scored is not None
        metrics = LOCAL_METRICS if is_local else SCORE_METRICS if of_scores else ROW_METRICS
        return trials[trial].setdefault(site, PromptMeans(metrics, self.n_prompts))


def _kept(n_prompts: int, seed: int) -> dict[int, int]:
    """The prompts whose rows are kept for CKA, a place each: all, or a seeded sample of many."""
    if n_prompts <= MOST_KEPT:
        return {prompt: prompt for prompt in range(n_prompts)}
    chosen = np.random.default_rng(seed).choice(n_prompts, MOST_KEPT, replace=False)
    # Sorted, so that the rows stand in the order of the prompts whatever the order of the draw.
    return {int(prompt): place for place, prompt in enumerate(np.sort(chosen))}
