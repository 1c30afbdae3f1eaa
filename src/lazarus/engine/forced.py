"""A pass in which every block runs on given states, not on what the block before it returned.

So nothing is inherited: what such a block returns differs from the state after it by what this one block
does otherwise. The states are those of another run of the same tokens: of another runtime, or of a recording.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lazarus.batches import TokenBatch
from lazarus.engine.probe import Conventions
from lazarus.facts import Site
from lazarus.models import LoadedModel

GivenStates = Callable[[int, Site], Float[Tensor, "tokens width"]]
"""the states of every token of a prompt, by its index, at a site"""


@contextmanager
def forced(
    model: LoadedModel,
    conventions: Conventions,
    batch: TokenBatch,
    given: GivenStates,
    only: int | None = None,
) -> Iterator[None]:
    """Give each block of a model, or only one, the states of another run, while it runs a batch.

    Block i gets those after block i − 1, and the first one those that enter it. What a model makes of its
    token ids besides, such as masks and positions, it makes as ever; so it does of padding.
    """
    calls = count(0 if only is None else only)

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        call = next(calls)
        site: Site = call - 1 if call else "embedding"
        states = args[0].clone()
        rows = conventions.rows_view(states)
        for row, prompt in enumerate(batch.members):
            found = given(prompt.index, site).to(states)
            rows[row, : len(prompt.ids)] = found.view(len(prompt.ids), *rows.shape[2:])
        return (states, *args[1:])

    with ExitStack() as stack:
        for index, block in enumerate(model.anatomy.blocks):
            if only in (None, index):
                stack.callback(block.register_forward_pre_hook(hook).remove)
        yield
