"""Both models in memory: each batch through one, then the other, and out come the pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

from torch import Tensor

from lazarus.batches import BatchPair
from lazarus.engine.local import beside
from lazarus.engine.pair import ModelPair
from lazarus.engine.positions import RowPicker
from lazarus.engine.replay import Passed, recording
from lazarus.engine.side import Begun, Side, logit_pairs
from lazarus.sites import Position, StatePair


def run_pairs(
    pair: ModelPair,
    batches: Sequence[BatchPair],
    position: Position,
    advanced: Callable[[int], None],
    *,
    localize: bool = False,
) -> Iterator[StatePair]:
    """Run every batch through both models; yields each site's pair of states, batch by batch.

    Only the compared rows of one batch are ever kept. The first blocks that the two models have in common
    run once. `localize` also runs each block of the fine-tuned model on what base's block receives.
    `advanced` is told the tokens of each batch when it is done.

    Raises:
        DeviceError: a batch does not fit the device's memory.
    """
    base, finetuned = Side(pair.base, pair.base_conventions), Side(pair.finetuned, pair.finetuned_conventions)
    for batch in batches:
        local: list[Tensor] = []
        picking = base.picking(RowPicker.of(batch.base, position))
        passed, n_common = Passed(), pair.n_common if batch.base is batch.finetuned else 0
        base.begin(batch.base, position)
        with (
            recording(pair.base.anatomy.blocks[:n_common], passed.add),
            beside(pair, picking, local) if localize else nullcontext(),
        ):
            ours = base.run(batch.base, position)
        begun = Begun(n_common, passed, ours, base.prefix_of(batch.base, position)) if n_common else None
        theirs = finetuned.run(batch.finetuned, position, begun)
        del begun, passed
        matched = [theirs.sites[0], *(theirs.sites[1 + i] for i in pair.matched), theirs.sites[-1]]
        own: Sequence[Tensor | None] = local or [None] * len(pair.matched)
        # zip stops at the last common site: a final norm that only one of them has is no site.
        for site, b, f, changed in zip(pair.sites, ours.sites, matched, [None, *own, None], strict=False):
            yield StatePair(site, ours.prompts, b, f, changed)
        if pair.shares_vocabulary:
            yield from logit_pairs(base.head, finetuned.head, ours, theirs)
        advanced(batch.base.n_tokens)
