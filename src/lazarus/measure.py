"""The one loop over pairs of states: each goes into its site's accumulators and is forgotten."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise, takewhile
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lazarus.batches import BatchPair, TokenBatch, make_batches
from lazarus.engine import ModelPair, NoisePlan, Position, Site, StatePair, Tagged, Work, pick_sample, run
from lazarus.metrics import (
    MOST_KEPT,
    OUTPUT_METRICS,
    ROW_METRICS,
    Outcomes,
    PromptMeans,
    Rows,
    RowValues,
    SiteMeasures,
    SitePlan,
    State,
    compare_logits,
    compare_rows,
    count_by_prompt,
    has_distribution,
    parts_of,
    within,
)
from lazarus.shards import Shard, WorkFolder, run_shards, states
from lazarus.tokens import TokenizedPrompt

Noise = Mapping[Site, PromptMeans]
FEWER_IF_STREAMED = 8
MOST_TRACED_TOKENS = 16_384
"""Tokens of which every one is kept until the end, where the run chooses among their prompts."""
MOST_ROWS = 2048
"""How many rows of repeated prompts are taken in at once, whole prompts at least."""


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
    n_prefix: int = 0
    """how many first tokens, the same in all prompts, run once"""
    token_prompts: Literal["auto"] | Sequence[int] = ()
    """the prompts of which every token is kept; auto leaves the choice to what they turn out to be"""
    outcomes: Outcomes | None = None
    """which next tokens both models have; None where every id is the same token in both"""
    folder: WorkFolder | None = None
    """where the work is kept, and shared with other processes"""

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
    n_logits_not_finite: Int[np.ndarray, "2 prompts"] = field(default_factory=lambda: np.zeros((2, 0), int))
    """the rows of logits of each prompt that are not finite, in base and in the fine-tuned model"""
    notes: Sequence[str] = ()


def measure(
    pair: ModelPair, plan: Plan, running: Callable[[int], None], advanced: Callable[[int], None]
) -> Measured:
    """Run all prompts through both models, and a sample of them through base again for the noise.

    Prompts of the same ids run once, and what they give is given to each of them. `running` is told the
    number of tokens in all, and `advanced` those of each batch when it is done.

    Raises:
        SaveError: the work is kept in a folder, and the disk gave out.
    """
    repeats = Repeats.among(plan)
    whole = _Part(_batches(pair, plan, repeats), _noise_batches(pair, plan, repeats))
    running(whole.n_tokens)
    totals = _Totals(pair, plan, repeats)
    notes = [*repeats.notes, *_tracing_notes(plan, repeats)]
    if plan.folder is None:
        totals.take(_run(pair, plan, whole, advanced))
    else:
        notes += _measure_shared(totals, plan.folder, whole, advanced)
    return Measured(totals.sites, totals.output, totals.noise, totals.n_logits_not_finite, notes)


def _measure_shared(
    totals: _Totals, folder: WorkFolder, whole: _Part, advanced: Callable[[int], None]
) -> list[str]:
    """The same in parts, each kept in the folder, by however many processes; returns what is to be noted."""
    # Each shard of a streamed run reads all weights again.
    most = folder.most_shards // FEWER_IF_STREAMED if totals.pair.streams else folder.most_shards
    parts = whole.cut(most)
    shards = [Shard(i, part.prompts, part.n_tokens) for i, part in enumerate(parts)]

    def run_shard(shard: Shard) -> State:
        own = _Totals(totals.pair, totals.plan, totals.repeats)
        own.take(_run(totals.pair, totals.plan, parts[shard.number], advanced))
        return own.state()

    n_before = run_shards(folder, shards, run_shard, advanced)
    for state in states(folder, shards):
        totals.add(state)
    return [f"{n_before} of {len(shards)} shards were already in {folder.path}"] if n_before else []


@dataclass(frozen=True)
class _Part:
    """A part of the work: batches of the comparison, and of the noise."""

    batches: Sequence[BatchPair]
    sample: Sequence[TokenBatch]

    @property
    def n_tokens(self) -> int:
        return sum(b.base.n_tokens for b in self.batches) + sum(b.n_tokens for b in self.sample)

    @property
    def prompts(self) -> list[int]:
        return [i for b in (*(pair.base for pair in self.batches), *self.sample) for i in b.prompts]

    def cut(self, most: int) -> list[_Part]:
        """At most so many runs of consecutive batches, and the noise, which is one piece of work."""
        edges = np.linspace(0, len(self.batches), min(len(self.batches), most) + 1).astype(int).tolist()
        runs = [_Part(self.batches[start:end], []) for start, end in pairwise(edges)]
        return [*runs, _Part([], self.sample)] if self.sample else runs


def _run(pair: ModelPair, plan: Plan, part: _Part, advanced: Callable[[int], None]) -> Iterator[Tagged]:
    """Every pair of states of a part of the work."""
    noise = NoisePlan(
        n_prompts=sum(len(batch.members) for batch in part.sample),
        batch_tokens=plan.batch_tokens,
        position=plan.position,
        padding=pair.padding(plan.longest),
        seed=plan.seed,
    )
    return run(pair, Work(part.batches, part.sample, noise, plan.position, plan.localize), advanced)


class _Totals:
    """The accumulators of a run, or of a part of it."""

    def __init__(self, pair: ModelPair, plan: Plan, repeats: Repeats) -> None:
        self.pair, self.plan, self.repeats = pair, plan, repeats
        self.n_prompts = len(plan.base_prompts)
        centered = pair.base.anatomy.uses_layer_norm and pair.finetuned.anatomy.uses_layer_norm
        kept, traced = _kept(self.n_prompts, plan.seed), _traced(plan, repeats)
        site_plan = SitePlan(self.n_prompts, centered, kept, traced)
        self.sites: dict[Site, SiteMeasures] = {site: SiteMeasures(site_plan) for site in pair.sites}
        self.output = PromptMeans(OUTPUT_METRICS, self.n_prompts)
        self.n_logits_not_finite = np.zeros((2, self.n_prompts), dtype=np.int64)
        self.noise: list[dict[Site, PromptMeans]] = []

    def take(self, pairs: Iterator[Tagged]) -> None:
        """Take in every pair, for each of the prompts that it stands for."""
        for trial, found in pairs:
            if trial is not None:
                values = compare_rows(Rows.of(found.base, found.finetuned), centered=False)
                self._trial(trial, found.site).update(found.prompts, values)
            elif found.site == "logits":
                self._take_logits(found)
            else:
                for each in self.repeats.spread(found):
                    self.sites[each.site].update(each.prompts, each.base, each.finetuned, each.local)

    def state(self) -> State:
        """Return what was seen."""
        found = within("output", self.output.state())
        if self.n_logits_not_finite.any():
            found |= within("not_finite", {"logits": self.n_logits_not_finite})
        for site, measures in self.sites.items():
            found |= within(f"sites/{site}", measures.state())
        for trial, noise in enumerate(self.noise):
            for site, means in noise.items():
                found |= within(f"noise/{trial}/{site}", means.state())
        return found

    def add(self, state: State) -> None:
        """Take in what others have seen, from their `state`."""
        parts = parts_of(state)
        named: dict[str, Site] = {str(site): site for site in (*self.pair.sites, "logits")}
        self.output.add(parts["output"])
        self.n_logits_not_finite += parts.get("not_finite", {}).get("logits", 0)
        for site, measures in parts_of(parts["sites"]).items():
            self.sites[named[site]].add(measures)
        for trial, noise in parts_of(parts.get("noise", {})).items():
            for site, means in parts_of(noise).items():
                self._trial(int(trial), named[site]).add(means)

    def _take_logits(self, found: StatePair) -> None:
        values = compare_logits(found.base, found.finetuned, self.plan.outcomes)
        device, not_finite = values.values.device, list[Tensor]()
        if not values.valid.all():
            not_finite = [~has_distribution(logits) for logits in (found.base, found.finetuned)]
        everything = torch.arange(len(found.prompts)), found.prompts
        for rows, prompts in (everything, *self.repeats.copies(found.prompts)):
            at = rows.to(device)
            self.output.update(prompts, RowValues(values.values[at], values.valid[at]))
            count_by_prompt(self.n_logits_not_finite, prompts, [side[rows] for side in not_finite])

    def _trial(self, trial: int, site: Site) -> PromptMeans:
        while len(self.noise) <= trial:
            self.noise.append({})
        return self.noise[trial].setdefault(site, PromptMeans(ROW_METRICS, self.n_prompts))


@dataclass(frozen=True)
class Repeats:
    """Which prompts have the ids of an earlier one, for both models: they do not run, and count the same."""

    distinct: Sequence[int]
    others: Mapping[int, Sequence[int]]
    """of each prompt that is repeated, the later ones that repeat it"""

    @classmethod
    def among(cls, plan: Plan) -> Repeats:
        """Compare the prompts' ids."""
        first: dict[tuple[bytes, ...], int] = {}
        others: dict[int, list[int]] = {}
        for index, (ours, theirs) in enumerate(zip(plan.base_prompts, plan.finetuned_prompts, strict=True)):
            readings = (ours,) if ours is theirs else (ours, theirs)
            same = first.setdefault(tuple(array("q", p.ids).tobytes() for p in readings), index)
            if same != index:
                others.setdefault(same, []).append(index)
        return cls(list(first.values()), others)

    @property
    def notes(self) -> list[str]:
        """Return how many there are; nothing where there are none."""
        n_repeats = sum(map(len, self.others.values()))
        if not n_repeats:
            return []
        n_prompts = len(self.distinct) + n_repeats
        return [f"{n_repeats} of {n_prompts} prompts are repeats of others: each text ran once"]

    def spread(self, found: StatePair) -> Iterator[StatePair]:
        """The pair itself, and its rows again for the prompts that repeat its own, a portion at a time."""
        yield found
        for rows, prompts in self.copies(found.prompts):
            base, finetuned, local = (
                None if states is None else states[rows.to(states.device)]
                for states in (found.base, found.finetuned, found.local)
            )
            assert base is not None
            assert finetuned is not None
            yield replace(found, prompts=prompts, base=base, finetuned=finetuned, local=local)

    def copies(
        self, prompts: Int[Tensor, " rows"]
    ) -> Iterator[tuple[Int[Tensor, " copies"], Int[Tensor, " copies"]]]:
        """Yield which rows come again, and whose they are then; those of a prompt stay together."""
        if not self.others:
            return
        places: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts.tolist()):
            if prompt in self.others:
                places.setdefault(prompt, []).append(row)
        rows, owners = list[int](), list[int]()
        for prompt, own in places.items():
            for other in self.others[prompt]:
                if rows and len(rows) + len(own) > MOST_ROWS:
                    yield torch.tensor(rows), torch.tensor(owners)
                    rows, owners = [], []
                rows += own
                owners += [other] * len(own)
        if rows:
            yield torch.tensor(rows), torch.tensor(owners)


def _batches(pair: ModelPair, plan: Plan, repeats: Repeats) -> list[BatchPair]:
    padding = pair.padding(plan.longest)
    distinct = [plan.base_prompts[i] for i in repeats.distinct]
    batches = make_batches(distinct, plan.batch_tokens, padding, plan.pad_ids[0], plan.n_prefix)
    if pair.align == "ids":
        return BatchPair.same(batches)
    return BatchPair.of(batches, plan.finetuned_prompts, plan.pad_ids[1])


def _noise_batches(pair: ModelPair, plan: Plan, repeats: Repeats) -> list[TokenBatch]:
    if not plan.noise_floor:
        return []
    distinct = [plan.base_prompts[i] for i in repeats.distinct]
    sample = [distinct[i] for i in pick_sample(len(distinct), plan.seed)]
    padding = pair.padding(plan.longest)
    return make_batches(sample, plan.batch_tokens, padding, plan.pad_ids[0], plan.n_prefix)


def _traced(plan: Plan, repeats: Repeats) -> Sequence[int]:
    """The prompts of which every token is kept: those named, or the first ones that there is room for."""
    if plan.token_prompts != "auto":
        return plan.token_prompts
    ends = accumulate(len(plan.base_prompts[i].ids) for i in repeats.distinct)
    n_prompts = len(list(takewhile(lambda n_tokens: n_tokens <= MOST_TRACED_TOKENS, ends)))
    return repeats.distinct[:n_prompts]


def _tracing_notes(plan: Plan, repeats: Repeats) -> list[str]:
    n_distinct, n_traced = len(repeats.distinct), len(_traced(plan, repeats))
    if plan.token_prompts != "auto" or n_traced == n_distinct:
        return []
    if n_traced == 0:
        return [
            f"no prompt's tokens are kept: the first prompt alone has more than {MOST_TRACED_TOKENS:,}; "
            "--token-prompts names others"
        ]
    return [
        f"tokens are kept of the most divergent of the first {n_traced} of {n_distinct} prompts, for which "
        "there is room; --token-prompts names others"
    ]


def _kept(n_prompts: int, seed: int) -> dict[int, int]:
    """The prompts whose rows are kept for CKA, a place each: all, or a seeded sample of many."""
    if n_prompts <= MOST_KEPT:
        return {prompt: prompt for prompt in range(n_prompts)}
    chosen = np.random.default_rng(seed).choice(n_prompts, MOST_KEPT, replace=False)
    return {int(prompt): place for place, prompt in enumerate(np.sort(chosen))}
