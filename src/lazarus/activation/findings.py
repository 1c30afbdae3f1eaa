"""Findings: means, reference values, causes and the verdict, computed from the accumulators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazarus.activation.accumulation import Accumulation
from lazarus.activation.attributed import Attributed
from lazarus.activation.scores import find_scores
from lazarus.facts import NOTHING_KNOWN, PairFacts, Rounded, Site, WeightFacts
from lazarus.metrics import (
    OUTPUT_METRICS,
    PromptMeans,
    ScoreMeans,
    ScorePlan,
    mean_over_prompts,
    normalized_divergence,
    scores_relative_l2,
)
from lazarus.results import (
    GroupContrast,
    GroupCurve,
    Groups,
    LocalChange,
    NotCompared,
    Output,
    ResultRows,
    Settings,
    Summary,
    Verdict,
    differing,
    finite_or_none,
)
from lazarus.statistics import (
    Floor,
    Intervals,
    contrasts,
    find_verdict,
    group_curves,
    intervals,
    noise_floor,
    onset,
)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Findings:
    """Every figure of a run, computed when it is asked for and then kept."""

    seen: Accumulation
    weights: WeightFacts = NOTHING_KNOWN

    @property
    def pair(self) -> PairFacts:
        """The two models."""
        return self.seen.facts

    @property
    def settings(self) -> Settings:
        """The options of the run."""
        return self.seen.plan.settings

    @property
    def scored(self) -> ScorePlan | None:
        """Return how scores or embeddings are compared; None where next tokens are."""
        return self.seen.plan.scored

    @property
    def n_prompts(self) -> int:
        """The number of prompts."""
        return self.seen.n_prompts

    @cached_property
    def layers(self) -> list[int]:
        """The layers, in order."""
        return [site for site in self.pair.sites if isinstance(site, int)]

    @cached_property
    def by_prompt(self) -> Mapping[Site, Mapping[str, Floats]]:
        """Return every prompt's mean over its rows for each site and metric, [prompts]."""
        return {site: found.means.means() for site, found in self.seen.sites.items()}

    @cached_property
    def floors(self) -> Mapping[Site, Floor]:
        """Return what noise alone may reach at each site and in the logits.

        Sites at which that is not known are left out.
        """
        trials: dict[Site, list[tuple[float, float]]] = {}
        for trial in self.seen.noise:
            for site, means in trial.items():
                of_scores = site == "logits" and self.scored is not None
                if (noise := _l2_and_divergence(means, of_scores=of_scores)) is not None:
                    trials.setdefault(site, []).append(noise)
        return {site: noise_floor(found, self.pair.base.info.run_dtype) for site, found in trials.items()}

    @cached_property
    def divergence(self) -> Floats:
        """Every prompt's divergence at every layer, [prompts, layers]; NaN where it was not measured."""
        return np.stack([self.by_prompt[layer]["divergence"] for layer in self.layers], axis=1)

    @cached_property
    def layer_intervals(self) -> Intervals | None:
        """The intervals over prompts at every layer."""
        return intervals(self.divergence, self.settings.seed)

    def measures(self, site: Site) -> dict[str, Any]:
        """The fields of one layer's or site's record: means over prompts, and what stands beside them."""
        found, accumulators = self._means(site), self.seen.sites[site]
        directions, floor = accumulators.directions, self.floors.get(site)
        unrelated = directions.unrelated_similarity()
        return {
            "cosine_similarity": finite_or_none(1 - found["divergence"]),
            "divergence": finite_or_none(found["divergence"]),
            # NaN is above nothing: a layer that could not be compared is not flagged.
            "flagged": found["divergence"] > self.settings.threshold,
            "n_prompts": int((accumulators.means.n_rows > 0).sum()),
            "relative_l2": finite_or_none(found["relative_l2"]),
            "norm_ratio": finite_or_none(found["norm_ratio"]),
            "centered_cosine_similarity": finite_or_none(1 - found["centered_divergence"]),
            "noise_floor": floor.relative_l2 if floor else None,
            "noise_floor_divergence": floor.divergence if floor else None,
            "unrelated_similarity": finite_or_none(unrelated),
            "normalized_divergence": finite_or_none(normalized_divergence(found["divergence"], unrelated)),
            "interval": self._interval(site),
            "top1_share": finite_or_none(directions.top_share(1)),
            "top3_share": finite_or_none(directions.top_share(3)),
            "cka": finite_or_none(accumulators.kept.cka()),
            "local": self._local(site),
        }

    def rows(self, attributed: Attributed | None = None) -> ResultRows:
        """One row a prompt and layer."""
        local: dict[Site, Mapping[str, Floats]] = {
            layer: self.seen.sites[layer].local.means() for layer in self.layers
        }

        def column(means: Mapping[Site, Mapping[str, Floats]], name: str) -> Floats:
            return np.stack([means[layer][name] for layer in self.layers], axis=1)

        columns = {
            "cosine_similarity": 1 - self.divergence,
            "divergence": self.divergence,
            "relative_l2": column(self.by_prompt, "relative_l2"),
            "norm_ratio": column(self.by_prompt, "norm_ratio"),
            "centered_cosine_similarity": 1 - column(self.by_prompt, "centered_divergence"),
            "local_relative_l2": column(local, "local_relative_l2"),
            "local_cosine_similarity": 1 - column(local, "local_divergence"),
        }
        if attributed is not None:
            columns["nats"] = attributed.by_layer(len(self.layers))
        return ResultRows([prompt.text for prompt in self.seen.plan.prompts], columns)

    @cached_property
    def verdict(self) -> Verdict | None:
        """The verdict on what was compared; None where the noise, or some states or logits, are not known.

        A state that is zero or not finite in one of the models alone has changed, though it has no cosine.
        """
        if self._is_unlike:
            return "changed"
        seen: dict[Site, float] = {site: self._means(site)["relative_l2"] for site in self.pair.sites}
        if self.seen.output.n_rows.any():
            seen["logits"] = self._logits_change()
        found = find_verdict(seen, self.floors)
        if found == "changed":
            # The rounding is looked for after a first verdict that asked for it (`may_be_rounding`).
            return "within_rounding" if self._is_whole and self.weights.rounding is not None else found
        return found if self._is_whole else None

    @property
    def may_be_rounding(self) -> bool:
        """Return whether states changed in a way that rounded weights may explain."""
        return self.verdict == "changed" and self._is_whole and self.pair.same_shape

    @property
    def rounding(self) -> Rounded | None:
        """The model that is the other one, rounded, where that is the verdict."""
        return self.weights.rounding if self.verdict == "within_rounding" else None

    @cached_property
    def n_prompts_left_out(self) -> int:
        """The number of prompts of which a state, at any site, could not be compared."""
        left_out = [site.n_unmeasured > 0 for site in self.seen.sites.values()]
        return int(np.logical_or.reduce(left_out).sum())

    @cached_property
    def n_outputs_left_out(self) -> int:
        """The number of prompts of which logits or scores were not finite in one of the models."""
        return int((self.seen.output.n_excluded > 0).sum())

    @cached_property
    def output(self) -> Output | None:
        """The effect on the next token or on the scores; None where the heads were not run."""
        means, known = self.seen.output, self.floors.get("logits")
        if not means.n_rows.any():
            return None
        floor = known.relative_l2 if known else None
        if self.scored is not None:
            assert isinstance(means, ScoreMeans)
            scores = find_scores(means, self.scored, self.settings.seed)
            nothing = dict.fromkeys(OUTPUT_METRICS)
            return Output(kind=self.scored.kind, scores=scores, **nothing, noise_floor=floor)
        found = {name: finite_or_none(mean_over_prompts(v)) for name, v in means.means().items()}
        return Output(kind="next_token", scores=None, **found, noise_floor=floor)

    @property
    def is_output_noise(self) -> bool:
        """Return whether the logits differ by no more than the noise; False where the noise is not known."""
        floor = self.floors.get("logits")
        return floor is not None and self._logits_change() <= floor.relative_l2

    def groups(self, attributed: Attributed | None = None) -> Groups | None:
        """The curve of each group of prompts, and how much more the first diverges than the others."""
        curves = group_curves(self.divergence, self._groups)
        if not curves:
            return None
        floor = np.array([self._divergence_floor(layer) for layer in self.layers])
        found = contrasts(self.divergence, self._groups, floor, self.settings.seed)
        return Groups(
            curves=[
                GroupCurve(
                    group=c.group,
                    n_prompts=c.n_prompts,
                    divergence=_listed(c.mean_divergence),
                    nats=self._nats(c.group, attributed),
                )
                for c in curves
            ],
            contrasts=[
                GroupContrast(
                    group_a=c.group_a,
                    group_b=c.group_b,
                    log_ratio=_listed(c.log_ratio),
                    p_value=c.p_value,
                    layer=c.layer,
                )
                for c in found
            ],
        )

    def _nats(self, group: str, attributed: Attributed | None) -> list[float] | None:
        """Return the part of every block in the KL of a group of prompts."""
        if attributed is None:
            return None
        own = [name == group for name in self._groups]
        found: list[float] = attributed.by_layer(len(self.layers))[own].mean(0).tolist()
        return found

    def summary(self) -> Summary:
        """The few numbers that a reader looks for first."""
        means = {layer: mean_over_prompts(self.by_prompt[layer]["divergence"]) for layer in self.layers}
        # NaN is a layer at which nothing could be compared: neither the largest nor flagged.
        measured = {layer: value for layer, value in means.items() if not np.isnan(value)}
        largest = max(measured, key=lambda layer: measured[layer], default=None)
        flagged = [layer for layer, value in measured.items() if value > self.settings.threshold]
        same = self.weights.identical
        unchanged = self.verdict in ("identical", "within_noise", "within_rounding")
        # Of what is not compared: a part that differs (True) settles it, one that may (None) leaves it open.
        others = [part.differs for part in differing(*self._outside)]
        return Summary(
            most_divergent_layer=largest,
            max_divergence=None if largest is None else measured[largest],
            first_flagged_layer=flagged[0] if flagged else None,
            n_flagged_layers=len(flagged),
            verdict=self.verdict,
            causes=self._causes() if unchanged and not others else [],
            weights_identical=False if True in others else same and (None if others else True),
            n_prompts_left_out=self.n_prompts_left_out,
            n_outputs_left_out=self.n_outputs_left_out,
            onset_layer=self._onset(),
            most_changed_block=self._most_changed_block(),
        )

    def _causes(self) -> list[str]:
        """Return what may explain that nothing changed."""
        return list(self.weights.causes) if self.rounding is None else [str(self.rounding)]

    @property
    def _groups(self) -> list[str | None]:
        return [prompt.group for prompt in self.seen.plan.prompts]

    @property
    def _outside(self) -> tuple[Sequence[NotCompared], Sequence[NotCompared]]:
        """Return what base and the fine-tuned model hold besides what was compared."""
        return self.pair.base.info.not_compared, self.pair.finetuned.info.not_compared

    @property
    def _is_whole(self) -> bool:
        """True where the states and the logits of every prompt could be compared."""
        return not (self.n_prompts_left_out or self.n_outputs_left_out)

    @property
    def _is_unlike(self) -> bool:
        """True where states have no distance: of other widths, or zero or not finite in one model alone."""
        return not self.pair.same_width or any(site.n_unlike for site in self.seen.sites.values())

    def _means(self, site: Site) -> dict[str, float]:
        return {name: mean_over_prompts(values) for name, values in self.by_prompt[site].items()}

    def _logits_change(self) -> float:
        """The relative L2 of the logits or scores; ∞ where only one of the models can give a token."""
        if self.scored is not None:
            return scores_relative_l2(self.seen.output)
        means = {name: mean_over_prompts(v) for name, v in self.seen.output.means().items()}
        one_sided = np.inf in (means["kl_base_finetuned"], means["kl_finetuned_base"])
        return float("inf") if one_sided else means["logits_relative_l2"]

    def _divergence_floor(self, site: Site) -> float:
        """The floor in divergence; without a measured one, that of rounding a single element."""
        floor = self.floors.get(site) or noise_floor([], self.pair.base.info.run_dtype)
        return floor.divergence

    def _interval(self, site: Site) -> tuple[float, float] | None:
        if isinstance(site, int):
            # All layers share one resampling; each of the other sites has its own.
            found, column = self.layer_intervals, self.layers.index(site)
        else:
            found, column = intervals(self.by_prompt[site]["divergence"][:, None], self.settings.seed), 0
        if found is None or np.isnan(found.low[column]):
            return None
        return float(found.low[column]), float(found.high[column])

    def _local(self, site: Site) -> LocalChange | None:
        means = self.seen.sites[site].local
        if not means.n_rows.any():
            return None
        found = {name: mean_over_prompts(values) for name, values in means.means().items()}
        trials = [
            float(mean_over_prompts(trial[site].means()["local_relative_l2"]))
            for trial in self.seen.local_noise
            if site in trial
        ]
        known = [(noise, 0.0) for noise in trials if np.isfinite(noise)]
        floor = noise_floor(known, self.pair.base.info.run_dtype).relative_l2 if known else None
        return LocalChange(
            relative_l2=finite_or_none(found["local_relative_l2"]),
            cosine_similarity=finite_or_none(1 - found["local_divergence"]),
            noise_floor=floor,
        )

    def _onset(self) -> int | None:
        # The onset speaks of every later layer too, so each must have a floor.
        if self.layer_intervals is None or not self.floors.keys() >= set(self.layers):
            return None
        floor = np.array([self.floors[layer].divergence for layer in self.layers])
        return onset(self.layer_intervals.band_low, floor)

    def _most_changed_block(self) -> int | None:
        local = {layer: self._local(layer) for layer in self.layers}
        # 0 is a block that did not change, and None one that was not measured.
        changed = {
            layer: size
            for layer, change in local.items()
            if change and (size := change.relative_l2) and not change.is_noise
        }
        return max(changed, key=lambda layer: changed[layer], default=None)


def _l2_and_divergence(means: PromptMeans, *, of_scores: bool) -> tuple[float, float] | None:
    """The noise of one trial at one site; None where it could not be measured."""
    if of_scores:
        noise = scores_relative_l2(means)
        return (noise, 0.0) if np.isfinite(noise) else None
    found = means.means()
    l2, divergence = (float(mean_over_prompts(found[name])) for name in ("relative_l2", "divergence"))
    # Both are NaN where no row could be compared, and nowhere else.
    return None if np.isnan(l2) else (l2, divergence)


def _listed(values: Floats) -> list[float | None]:
    return [finite_or_none(value) for value in values]
