"""Local change: the fine-tuned block on the very arguments that base's block got."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

from torch import Tensor, nn

from lazarus.blame import Translated
from lazarus.engine.pair import ModelPair
from lazarus.engine.recorder import first_tensor, one_line
from lazarus.errors import UnsupportedModelError
from lazarus.messages import option


@contextmanager
def beside(
    pair: ModelPair, take: Callable[[Tensor], Tensor], taken: list[Tensor], only: int | None = None
) -> Iterator[None]:
    """While base runs, run each of the fine-tuned model's blocks, or only one, on what base's receives.

    For B and F the two models' block and b base's state before it, `taken` gets what `take` keeps of
    F(b), in the order in which the blocks run. So F(b) − B(b) is what the block's own weights change,
    and nothing of it is inherited. A block that is the same in both need not run twice: F(b) is B(b).

    Raises:
        UnsupportedModelError: a block of the fine-tuned model does not run on base's states.
    """
    base, finetuned = pair.base, pair.finetuned

    def tell(where: str, error: Exception) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{where} does not run on the states of {base.name}: {one_line(error)}. Leave "
            f"{option('localize')} out for this pair.",
            option="localize",
        )

    def hook_for(index: int, block: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if block is module or pair.same_blocks[index]:
                taken.append(take(first_tensor(output)))
                return
            where = f"{option('localize')}: block {index} of {finetuned.name}"
            # Base's block has run and written into a shared mapping; what this one writes stays out of it.
            copies = [_copied(a) for a in args], {name: _copied(value) for name, value in kwargs.items()}
            with Translated(where, partial(tell, where)):
                returned = block(*copies[0], **copies[1])
            taken.append(take(first_tensor(returned)))

        return hook

    # As many blocks in both: `check_shapes` has refused any other pair.
    pairs = zip(base.anatomy.blocks, finetuned.anatomy.blocks, strict=True)
    handles = [
        block.register_forward_hook(hook_for(index, other), with_kwargs=True)
        for index, (block, other) in enumerate(pairs)
        if only in (None, index)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(argument: Any) -> Any:
    """Return a copy of a mapping; any other argument as it is.

    A block may write into a mapping what later blocks read, and only base's blocks may write into base's. It
    need not be a dict: Gemma 3n and 4 share keys and values in a `UserDict`.
    """
    return copy(argument) if isinstance(argument, MutableMapping) else argument
