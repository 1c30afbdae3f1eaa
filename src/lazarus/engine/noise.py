"""The numerical noise under every comparison: one model, with what ought not to matter changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lazarus.batches import Padding, TokenBatch
from lazarus.engine.pair import ModelPair
from lazarus.engine.runner import Runner, States, joined, output_pairs
from lazarus.engine.taps import BlockRows, ComponentRows, component_pairs
from lazarus.facts import ComponentSite, Site
from lazarus.metrics import OncePerBatch, on_device
from lazarus.sites import Position, StatePair

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

MOST_PROMPTS = 8
FEW_PROMPTS = 50
"""From so many prompts on, a tenth of them at most is used."""
EXTRA_PADDING = 8
FEWEST_ROWS = 8
"""Fewer prompts than this are run several times in a batch: one prompt's noise is a poor guess."""


@dataclass(frozen=True)
class NoisePlan:
    """The plan of the noise: on how many prompts it is measured, in batches of how many tokens."""

    n_prompts: int
    batch_tokens: int
    position: Position
    padding: Padding
    seed: int
    among_others: bool = False
    """whether these are a sample: then base has run them in the company of other prompts"""

    def copies(self, batch: TokenBatch) -> int:
        """Return how often the prompts of a batch are run at once, within the tokens of one batch."""
        if self.padding == "one_by_one":
            return 1
        room = self.batch_tokens // batch.n_padded
        wanted = max(self._copies_of_few, 2 if self.among_others else 1)
        return max(1, min(wanted, room))

    @property
    def _copies_of_few(self) -> int:
        return -(-FEWEST_ROWS // self.n_prompts)

    def recomposed(self, batch: TokenBatch, context: int | None) -> list[list[TokenBatch]]:
        """Return the same prompts in the same order, in batches that base has not run: an item is run as one.

        A sample of many prompts runs twice in one batch, which is fuller than base's. Few prompts run several
        times in a batch, without and with more padding. Other batches run in two halves, and again with more
        padding.
        """
        n_copies = self.copies(batch)
        extra_padding = self._extra_padding(batch, context)
        padded = replace(batch, members=batch.members * n_copies, extra_padding=extra_padding)
        if n_copies > self._copies_of_few:
            return [[replace(padded, extra_padding=0)]]
        if n_copies > 1:
            return [[replace(padded, extra_padding=0)], [padded]]
        middle = len(batch.members) // 2
        halves = [replace(batch, members=part) for part in (batch.members[:middle], batch.members[middle:])]
        return [halves if middle else [padded], [padded]]

    def _extra_padding(self, batch: TokenBatch, context: int | None) -> int:
        """The padding that a batch can have more: there may be no position for it, or it may be wrong."""
        if self.padding != "right":
            return 0
        taken = len(batch.prefix) + batch.padded_length
        room = EXTRA_PADDING if context is None else context - taken
        return max(0, min(EXTRA_PADDING, room))


def pick_sample(n_prompts: int, seed: int) -> list[int]:
    """The prompts on which the noise is measured: at most 8, and at most a tenth of 50 and more."""
    most = MOST_PROMPTS if n_prompts < FEW_PROMPTS else min(MOST_PROMPTS, n_prompts // 10)
    if n_prompts <= most:
        return list(range(n_prompts))
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(n_prompts, generator=generator)[:most].tolist())


class Sample:
    """Base's compared rows of a few prompts, kept from the run until the noise is measured on them."""

    def __init__(self, batches: Sequence[TokenBatch]) -> None:
        self._wanted = {prompt for batch in batches for prompt in batch.prompts}
        self._rows: dict[tuple[Site, int], Tensor] = {}
        self._own = OncePerBatch(self._places)

    def take(self, site: Site, prompts: Int[Tensor, " rows"], rows: Float[Tensor, "rows width"]) -> None:
        """Keep these prompts' rows of a batch of the run; for the logits, those that the head reads."""
        for prompt, own in self._own(prompts).items():
            self._rows[site, prompt] = rows[on_device(own, rows.device)]

    def _places(self, prompts: Int[Tensor, " rows"]) -> dict[int, Int[Tensor, " own"]]:
        """Return the places of the rows of each prompt that is kept."""
        return {
            prompt: torch.nonzero(prompts == prompt).flatten()
            for prompt in self._wanted.intersection(prompts.tolist())
        }

    def take_block(self, sites: Sequence[ComponentSite], rows: BlockRows) -> None:
        """Keep these prompts' rows of the components of a block."""
        for site in sites:
            self.take(site, rows.prompts_of(site.name), rows.components[site.name])

    def give_block(self, sites: Sequence[ComponentSite], batch: TokenBatch) -> ComponentRows:
        """Return the rows of the components of a block; they are kept no longer."""
        return {site.name: self.give(site, batch) for site in sites}

    def holds(self, site: Site, batch: TokenBatch) -> bool:
        """Return whether the rows of all prompts of a batch are there."""
        return all((site, prompt) in self._rows for prompt in batch.prompts)

    def give(self, site: Site, batch: TokenBatch) -> Float[Tensor, "rows width"]:
        """Return the rows of a batch's prompts, in its order; they are kept no longer."""
        return torch.cat([self._rows.pop((site, prompt)) for prompt in batch.prompts])


class Noise:
    """Base against base with what ought not to matter changed.

    What base makes of the prompts is taken from the run. Each trial runs them again in other batches, with
    other padding where padding is right for the model, and with the first block's input moved by one unit in
    the last place; a prefix that runs once is moved as well. Both states of a pair are base's: no second copy
    of the weights is needed.
    """

    def __init__(self, pair: ModelPair, batches: Sequence[TokenBatch], plan: NoisePlan) -> None:
        self.pair = pair
        self.plan = plan
        self.sample = Sample(batches)
        self._waiting = list(batches)
        self._outputs = self._runner()
        self._generator = torch.Generator().manual_seed(plan.seed)

    def take(self, states: States) -> None:
        """Take what base made of a batch of the run."""
        # zip stops at the last site of the pair: a final norm that base alone has is none.
        for site, rows in zip(self.pair.sites, states.sites, strict=False):
            self.sample.take(site, states.prompts, rows)
        for layer in range(len(states.components)):
            self.sample.take_block(self.pair.component_sites(layer), states.block(layer))
        self.sample.take("logits", states.head_prompts, states.head_rows)

    def run(self, advanced: Callable[[int], None]) -> Iterator[StatePair]:
        """Yield each trial's number and pairs, of all prompts whose batches have run by now.

        The batches of the run and of the sample are in one order, so that few rows wait.
        """
        while self._waiting and self.sample.holds("logits", self._waiting[0]):
            batch = self._waiting.pop(0)
            yield from self._run(batch)
            advanced(batch.n_tokens)

    def _run(self, batch: TokenBatch) -> Iterator[StatePair]:
        sites = self.pair.sites
        plain, read = [self.sample.give(site, batch) for site in sites], self.sample.give("logits", batch)
        layers = [self.pair.component_sites(layer) for layer in range(self.pair.n_layers[0])]
        inside = [self.sample.give_block(each, batch) for each in layers]
        trials = count()
        for parts in self.plan.recomposed(batch, self.pair.base.anatomy.context):
            moved = self._moved(batch, parts)
            for other in moved.split(n_copies(parts, batch)):
                trial = next(trials)
                for site, b, f in zip(sites, plain, other.sites, strict=False):
                    yield StatePair(site, other.prompts, b, f, trial=trial)
                for layer, each in enumerate(layers):
                    moved_block = other.block(layer)
                    own = replace(moved_block, states=plain[1 + layer], components=inside[layer])
                    yield from component_pairs(each, own, moved_block, trial=trial)
                ours = States(other.prompts, plain, other.head_prompts, read)
                yield from output_pairs(self._outputs, self._outputs, ours, other, trial)

    def _moved(self, batch: TokenBatch, parts: Sequence[TokenBatch]) -> States:
        """Run the parts of a batch, one after the other, on a first block's input that is moved."""
        # A runner of its own: it keeps the moved prefix, which neither the run nor another trial may use.
        block, runner = self.pair.base.anatomy.blocks[0], self._runner()
        # One nudge lasts one pass, and the prefix is a pass of its own.
        with nudged(block, self._generator):
            runner.begin(batch, self.plan.position)
        found = []
        for part in parts:
            with nudged(block, self._generator):
                found.append(runner.run(part, self.plan.position))
        return joined(found)

    def _runner(self) -> Runner:
        return Runner(self.pair.base, self.pair.base_conventions, self.pair.score_head(0))


def n_copies(parts: Sequence[TokenBatch], batch: TokenBatch) -> int:
    """Return how often the prompts of a batch are in these parts."""
    return sum(len(part.members) for part in parts) // len(batch.members)


@contextmanager
def nudged(block: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Move every element that first enters a block by one unit in the last place, up or down at random."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        handle.remove()  # a block that runs again in the same pass gets what it got
        return (one_ulp_away(args[0], generator), *args[1:])

    handle = block.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def one_ulp_away(states: Tensor, generator: torch.Generator) -> Tensor:
    """Return each element's next larger or next smaller neighbour in magnitude; 0, ∞ and NaN stay.

    The bits of neighbouring floating-point numbers of one sign, read as integers, are neighbours too.
    """
    integers = _INTEGERS[states.element_size()]
    # Drawn on the CPU: the same signs on every device.
    signs = torch.randint(0, 2, states.shape, generator=generator, dtype=integers) * 2 - 1
    moved = (states.contiguous().view(integers) + signs.to(states.device)).view(states.dtype)
    return torch.where((states != 0) & states.isfinite(), moved, states)
