"""Compared rows out of a recording, and the pairs that they make with a live model's or another's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from lazarus.activation.repeats import Repeats
from lazarus.errors import RecordingError
from lazarus.facts import ComponentName, ComponentSite, PairFacts, Site
from lazarus.messages import option
from lazarus.metrics import TopTokens, compare_top
from lazarus.recordings import FINAL_NORM, LOGITS, TOP_IDS, TOP_LOGPROBS, Recording, site_name
from lazarus.sites import StatePair

PROMPTS_AT_ONCE = 64
RECORDED_COMPONENTS: tuple[ComponentName, ...] = ("attn_out", "mlp_out", "router")
"""the experts that are picked are not recorded: they follow from the router's logits"""


@dataclass(frozen=True)
class RecordedRows:
    """The compared rows of a recording."""

    recording: Recording
    tokens: Sequence[Sequence[int]]
    """which tokens of each prompt are compared"""
    average: bool
    """whether a prompt's rows are averaged, in float64"""

    def has(self, name: str) -> bool:
        """Return whether there are states at a site of this name."""
        return name in self.recording.sites

    @property
    def has_output(self) -> bool:
        """Return whether there are next tokens: logits, or the likeliest ones."""
        return self.has(LOGITS) or self.has(TOP_IDS)

    def of(self, prompts: Int[Tensor, " rows"], name: str) -> Float[Tensor, "rows width"]:
        """Return the rows at a site, in the order of `prompts`, where all rows of a prompt stand together."""
        owners = torch.unique_consecutive(prompts).tolist()
        return torch.cat([self.of_prompt(prompt, name) for prompt in owners])

    def of_prompt(self, prompt: int, name: str) -> Float[Tensor, "rows width"]:
        """Return the rows of one prompt at a site."""
        rows = self.of_tokens(prompt, name, self.tokens[prompt])
        return averaged(rows) if self.average else rows

    def logits(self, places: Sequence[tuple[int, slice]]) -> Float[Tensor, "rows vocabulary"]:
        """Return the logits of parts of the compared tokens of some prompts."""
        return self._at(places, LOGITS)

    def top(self, places: Sequence[tuple[int, slice]]) -> TopTokens:
        """Return the likeliest tokens in their place."""
        return TopTokens(self._at(places, TOP_IDS).long(), self._at(places, TOP_LOGPROBS))

    def check_tokens(self, recorded: Tensor | TopTokens, n_tokens: int) -> None:
        """Refuse next tokens of another vocabulary than the other side's.

        Raises:
            RecordingError: they are not the `n_tokens` of the other side, or not among them.
        """
        if isinstance(recorded, Tensor):
            told = None if recorded.shape[1] == n_tokens else f"{recorded.shape[1]} next tokens"
        else:
            odd = recorded.ids[(recorded.ids < 0) | (recorded.ids >= n_tokens)]
            told = f"the next token {int(odd[0])}" if len(odd) else None
        if told is not None:
            raise RecordingError(
                f"{self.recording.name} has {told}, and the other side {n_tokens} next tokens: they are of "
                f"two vocabularies. Record without {option('logits', True)}: then states alone are compared.",
                option="logits",
            )

    def _at(self, places: Sequence[tuple[int, slice]], name: str) -> Tensor:
        # Where states are averaged, the head reads the last token.
        tokens = [self.tokens[prompt][-1:] if self.average else self.tokens[prompt] for prompt, _ in places]
        parts = zip(places, tokens, strict=True)
        return torch.cat([self.of_tokens(prompt, name, own[part]) for (prompt, part), own in parts])

    def of_tokens(self, prompt: int, name: str, tokens: Sequence[int]) -> Shaped[Tensor, "tokens width"]:
        """Return the states of some tokens of a prompt, ascending."""
        kept = self.recording.prompts[prompt].kept
        places = list(tokens) if isinstance(kept, range) else [kept.index(token) for token in tokens]
        # Only what lies between the first and the last of them is read.
        found = torch.from_numpy(self.recording.rows(prompt, name, places[0], places[-1] + 1))
        return found[[place - places[0] for place in places]]

    def has_every_state(self, facts: PairFacts) -> bool:
        """Return whether there are states of every token before and after each block."""
        names = [site_name(site) for site in facts.sites if site != FINAL_NORM]
        return self.recording.contents.positions == "all" and all(map(self.has, names))

    def every(self, prompt: int, site: Site) -> Float[Tensor, "tokens width"]:
        """Return the states of all tokens of a prompt at a site."""
        return torch.from_numpy(self.recording.rows(prompt, site_name(site)))


def averaged(rows: Float[Tensor, "tokens width"]) -> Float[Tensor, "1 width"]:
    """Return the mean of the rows of one prompt, as that of a live model is taken: in float64, in order."""
    wide = rows.double()
    sums = wide.new_zeros(1, wide.shape[1])
    return sums.index_add_(0, torch.zeros(len(wide), dtype=torch.long, device=wide.device), wide) / len(wide)


@dataclass(frozen=True)
class Pairing:
    """Makes pairs of a live model's rows and those of a recording."""

    facts: PairFacts
    rows: RecordedRows
    is_base: bool
    """whether the recording is of base"""
    repeats: Repeats
    """prompts of the same ids, which ran once: the recording has states of its own for each"""
    noise: RecordedRows | None = None
    """another recording of base, where base is live: what differs is noise, the first of its trials"""
    _n_read: Counter[int] = field(default_factory=Counter)
    """of each prompt, the rows of logits that were read so far: they may come in parts"""

    def __call__(self, found: Iterator[StatePair]) -> Iterator[StatePair]:
        """Yield the pairs of a model that runs alone, with the recording's rows as the other side."""
        sites = {*self.facts.sites, "logits"}
        for pair in found:
            if pair.trial is not None:
                if pair.site in sites or isinstance(pair.site, ComponentSite):
                    yield replace(pair, trial=pair.trial + 1) if self.noise else pair
            elif pair.site == "logits":
                yield from self._logits(pair)
            else:
                yield from self._states(pair)

    def _states(self, found: StatePair) -> Iterator[StatePair]:
        for pair in self.repeats.spread(found):
            yield from self._states_of(pair)

    def _states_of(self, pair: StatePair) -> Iterator[StatePair]:
        own = site_name(pair.site)
        if self.noise is not None and self.noise.has(own):
            again = self.noise.of(pair.prompts, own).to(pair.base.device)
            yield StatePair(pair.site, pair.prompts, pair.base, again, trial=0)
        for site, name in self._places(pair.site):
            if self.rows.has(name):
                recorded = self.rows.of(pair.prompts, name)
                yield self._joined(site, pair.prompts, pair.base, recorded, pair.local)

    def _places(self, site: Site) -> list[tuple[Site, str]]:
        """Return the sites of the pair that a live site is one half of, and the recording's names of them."""
        if not isinstance(site, int | ComponentSite):
            return [(site, site_name(site))] if site in self.facts.sites else []
        layer, matched = _layer(site), self.facts.matched
        if not self.is_base:
            return [(site, site_name(_at(site, matched[layer])))]
        layers = [ours for ours, theirs in enumerate(matched) if theirs == layer]
        return [(_at(site, ours), site_name(_at(site, ours))) for ours in layers]

    def _logits(self, found: StatePair) -> Iterator[StatePair]:
        for pair in self.repeats.spread(found):
            yield from self._logits_of(pair)

    def _logits_of(self, pair: StatePair) -> Iterator[StatePair]:
        places = []
        for prompt, n_rows in Counter(pair.prompts.tolist()).items():
            places.append((prompt, slice(self._n_read[prompt], self._n_read[prompt] + n_rows)))
            self._n_read[prompt] += n_rows
        if self.noise is not None and self.noise.has(LOGITS):
            again = self.noise.logits(places).to(pair.base.device)
            yield StatePair("logits", pair.prompts, pair.base, again, trial=0)
        if self.rows.has(LOGITS):
            recorded = self.rows.logits(places)
            self.rows.check_tokens(recorded, pair.base.shape[1])
            yield self._joined("logits", pair.prompts, pair.base, recorded, None)
        elif self.rows.has(TOP_IDS):
            top, live = self.rows.top(places), pair.base.cpu()
            self.rows.check_tokens(top, live.shape[1])
            values = compare_top(top, live) if self.is_base else compare_top(live, top)
            yield replace(pair, compared=values)

    def _joined(
        self, site: Site, prompts: Tensor, live: Tensor, recorded: Tensor, local: Tensor | None
    ) -> StatePair:
        recorded = recorded.to(live.device)
        sides = (recorded, live) if self.is_base else (live, recorded)
        return StatePair(site, prompts, *sides, local)


def _layer(site: int | ComponentSite) -> int:
    return site if isinstance(site, int) else site.layer


def _at(site: int | ComponentSite, layer: int) -> int | ComponentSite:
    """Return the same place in another layer."""
    return layer if isinstance(site, int) else replace(site, layer=layer)


def recorded_pairs(
    facts: PairFacts,
    base: RecordedRows,
    finetuned: RecordedRows,
    advanced: Callable[[int], None],
    trial: int | None = None,
) -> Iterator[StatePair]:
    """Yield the pairs of two recordings of the same prompts, some prompts at a time.

    `advanced` is told the tokens of the prompts that are done.
    """
    names = [(site, site_name(site), site_name(theirs)) for site, theirs in _both(facts)]
    prompts = range(len(base.recording.prompts))
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        some = prompts[start : start + PROMPTS_AT_ONCE]
        n_rows = [1 if base.average else len(base.tokens[prompt]) for prompt in some]
        owners = torch.tensor(some).repeat_interleave(torch.tensor(n_rows))
        for site, ours, theirs in names:
            if base.has(ours) and finetuned.has(theirs):
                yield StatePair(
                    site, owners, base.of(owners, ours), finetuned.of(owners, theirs), trial=trial
                )
        if base.has_output and finetuned.has_output:
            for prompt in some:
                found = _output(base, finetuned, prompt, trial)
                # A distance of logits is what the noise is measured in, and of the likeliest there is none.
                if trial is None or found.compared is None:
                    yield found
        advanced(sum(len(base.recording.prompts[prompt].ids) for prompt in some))


def _output(base: RecordedRows, finetuned: RecordedRows, prompt: int, trial: int | None) -> StatePair:
    """Return the next tokens of one prompt: logits, or what the likeliest tokens of one side give."""
    n_rows = 1 if base.average else len(base.tokens[prompt])
    place, owner = [(prompt, slice(0, n_rows))], torch.full((n_rows,), prompt)
    ours, theirs = (side.logits(place) if side.has(LOGITS) else side.top(place) for side in (base, finetuned))
    if isinstance(ours, Tensor):
        finetuned.check_tokens(theirs, ours.shape[1])
    elif isinstance(theirs, Tensor):
        base.check_tokens(ours, theirs.shape[1])
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return StatePair("logits", owner, ours, theirs, trial=trial)
    nothing = torch.empty(n_rows, 0)
    return StatePair("logits", owner, nothing, nothing, trial=trial, compared=compare_top(ours, theirs))


def _both(facts: PairFacts) -> Iterator[tuple[Site, Site]]:
    """Yield every site of a pair, with the fine-tuned model's site that belongs to it."""
    for site in facts.sites:
        yield site, facts.matched[site] if isinstance(site, int) else site
    for layer, theirs in enumerate(facts.matched):
        for name in RECORDED_COMPONENTS:
            yield ComponentSite(layer, name), ComponentSite(theirs, name)
