"""The components of blocks, from pairs of states to records: what sublayers add, and what routers pick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np

from lazarus.facts import ComponentName, ComponentSite
from lazarus.metrics import (
    EXPERT_METRICS,
    LOCAL_METRICS,
    ROW_METRICS,
    AccumulatorState,
    PromptMeans,
    Rows,
    Update,
    compare_experts,
    compare_local,
    compare_rows,
    mean_over_prompts,
    parts_of,
    within,
)
from lazarus.results import ComponentRecord, LocalChange, finite_or_none
from lazarus.sites import StatePair
from lazarus.statistics import noise_floor, share_floor

_RUN, _LOCAL = "run", "local"


class ComponentMeans:
    """Accumulates the components of a comparison, and of each trial of the noise."""

    def __init__(self, n_prompts: int) -> None:
        self.n_prompts = n_prompts
        self.means: dict[str, dict[ComponentSite, PromptMeans]] = {}
        """by what they are of: the run, local changes, or a trial's number"""

    def updating(self, pair: StatePair) -> Update[None]:
        """Take in a pair of states at a component, in steps."""
        site = pair.site
        assert isinstance(site, ComponentSite)
        seen = self._at(_RUN if pair.trial is None else str(pair.trial), site)
        if site.name == "experts":
            yield from seen.updating(pair.prompts, compare_experts(pair.base, pair.finetuned, pair.change))
            return
        rows = Rows.of(pair.base, pair.finetuned)
        yield from seen.updating(pair.prompts, compare_rows(rows, centered=False))
        if pair.local is not None:
            local = compare_local(Rows.of(pair.base, pair.local))
            yield from self._at(_LOCAL, site).updating(pair.prompts, local)

    def state(self) -> AccumulatorState:
        """Return what was seen, as arrays by their names."""
        found: AccumulatorState = {}
        for kind, sites in self.means.items():
            for site, means in sites.items():
                found |= within(f"{kind}/{site}", means.state())
        return found

    def add(self, state: AccumulatorState) -> None:
        """Take in what another one has seen, from its `state`."""
        for kind, sites in parts_of(state).items():
            for site, means in parts_of(sites).items():
                self._at(kind, _site(site)).add(means)

    def left_out(self) -> dict[tuple[int, ...], list[ComponentSite]]:
        """Return the components of which rows were left out, zero or not finite, by the rows' prompts."""
        found: dict[tuple[int, ...], list[ComponentSite]] = {}
        for site, means in self.means.get(_RUN, {}).items():
            prompts = tuple(np.flatnonzero(means.n_excluded).tolist())
            if prompts:
                found.setdefault(prompts, []).append(site)
        return found

    def records(self, dtype: str) -> list[ComponentRecord]:
        """Return a record for each component, layer by layer; `dtype` is the one in which base ran."""
        order = get_args(ComponentName)
        sites = sorted(self.means.get(_RUN, {}), key=lambda site: (site.layer, order.index(site.name)))
        return [self._record(site, dtype) for site in sites if site.name != "experts"]

    def _record(self, site: ComponentSite, dtype: str) -> ComponentRecord:
        found, local = self.means[_RUN][site], self.means.get(_LOCAL, {}).get(site)
        values = _means(found)
        trials = [_means(means) for means in self._trials(site)]
        noise = [(t["relative_l2"], t["divergence"]) for t in trials if not np.isnan(t["relative_l2"])]
        floor = noise_floor(noise, dtype) if noise else None
        experts = self._experts(site) if site.name == "router" else {}
        return ComponentRecord(
            layer=site.layer,
            name=site.name,  # type: ignore[arg-type]  # experts are told with their router
            divergence=finite_or_none(values["divergence"]),
            relative_l2=finite_or_none(values["relative_l2"]),
            norm_ratio=finite_or_none(values["norm_ratio"]),
            n_prompts=int((found.n_rows > 0).sum()),
            noise_floor=floor.relative_l2 if floor else None,
            noise_floor_divergence=floor.divergence if floor else None,
            local=None if local is None else _local(local),
            **experts,
        )

    def _experts(self, router: ComponentSite) -> Mapping[str, float | None]:
        """Return the fields of a router that tell of the experts that it picks."""
        site = ComponentSite(router.layer, "experts")
        seen = self.means[_RUN].get(site)
        if seen is None:
            return {}
        found, trials = _means(seen), self._trials(site)
        noise = [_means(means) for means in trials]
        n_tokens = min((int(means.n_rows.sum()) for means in trials), default=0)

        def floor(shares: list[float]) -> float | None:
            return share_floor(max(shares), n_tokens) if n_tokens else None

        disagreement = floor([1 - each["expert_agreement"] for each in noise])
        shares = [share for each in noise if (share := _share(each)) is not None]
        return {
            "expert_agreement": finite_or_none(found["expert_agreement"]),
            "expert_agreement_noise": None if disagreement is None else 1 - disagreement,
            "flipped_share": finite_or_none(found["flipped"]),
            "flipped_share_noise": floor([each["flipped"] for each in noise]),
            "flipped_change_share": _share(found),
            "flipped_change_share_noise": max(shares, default=None),
        }

    def _trials(self, site: ComponentSite) -> list[PromptMeans]:
        return [sites[site] for kind, sites in self.means.items() if kind.isdigit() and site in sites]

    def _at(self, kind: str, site: ComponentSite) -> PromptMeans:
        names = LOCAL_METRICS if kind == _LOCAL else EXPERT_METRICS if site.name == "experts" else ROW_METRICS
        return self.means.setdefault(kind, {}).setdefault(site, PromptMeans(names, self.n_prompts))


def _site(text: str) -> ComponentSite:
    """The site of a name in a state: `3.attn_out`."""
    layer, _, name = text.partition(".")
    return ComponentSite(int(layer), next(each for each in get_args(ComponentName) if each == name))


def _means(seen: PromptMeans) -> dict[str, float]:
    return {name: mean_over_prompts(values) for name, values in seen.means().items()}


def _share(found: Mapping[str, float]) -> float | None:
    """The share of the squared change that is at flipped tokens; None where it is 0, or not known."""
    change = found["squared_change"]
    return finite_or_none(found["flipped_squared_change"] / change) if change > 0 else None


def _local(seen: PromptMeans) -> LocalChange | None:
    found = _means(seen)
    if np.isnan(found["local_relative_l2"]):
        return None
    return LocalChange(
        relative_l2=finite_or_none(found["local_relative_l2"]),
        cosine_similarity=finite_or_none(1 - found["local_divergence"]),
    )
