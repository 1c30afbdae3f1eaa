"""Local change: the fine-tuned block on the very arguments that base's block got."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

from torch import Tensor, nn

from lazarus.blame import Translated
from lazarus.engine.forms import Spot, at_places
from lazarus.engine.pair import ModelPair
from lazarus.engine.recorder import first_tensor, shortened
from lazarus.engine.taps import Collected, ComponentPicker, ComponentRows
from lazarus.errors import UnsupportedModelError
from lazarus.facts import ComponentName
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

    def hook_for(index: int, block: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            is_same = block is module or pair.same_blocks[index]
            taken.append(take(first_tensor(output if is_same else _run_on(pair, index, args, kwargs))))

        return hook

    with ExitStack() as stack:
        for index, ours, theirs in _blocks(pair, only):
            stack.callback(ours.register_forward_hook(hook_for(index, theirs), with_kwargs=True).remove)
        yield


@contextmanager
def components_beside(
    pair: ModelPair, picker: ComponentPicker, taken: list[ComponentRows | None], only: int | None = None
) -> Iterator[None]:
    """While base runs, run the fine-tuned model's components, or those of one block, on what base's receive.

    Each of its blocks runs as above, and every term that it adds is replaced by base's as soon as it is
    there: so its MLP reads base's state and base's attention output, through its own norm, and inherits
    nothing.
    `taken` gets the rows of each block: None for base's own, where the block is the same in both; none at all
    where the two blocks add terms at different places.

    Raises:
        UnsupportedModelError: a block of the fine-tuned model does not run on base's states.
    """
    with ExitStack() as stack:
        for index, block, other in _blocks(pair, only):
            beside = _ComponentsBeside(pair, index, picker, taken)
            if block is not other and not pair.same_blocks[index]:
                stack.enter_context(at_places(block, beside.form, beside.hold))
            stack.callback(block.register_forward_hook(beside.end, with_kwargs=True).remove)
        yield


class _ComponentsBeside:
    """The terms that base's block adds, and the fine-tuned model's components among them."""

    def __init__(
        self, pair: ModelPair, index: int, picker: ComponentPicker, taken: list[ComponentRows | None]
    ) -> None:
        ours, theirs = pair.base_conventions.components, pair.finetuned_conventions.components
        assert ours is not None
        assert theirs is not None
        self.form, self._theirs = ours.of_blocks[index], theirs.of_blocks[index]
        self._pair, self._index, self._picker, self._taken = pair, index, picker, taken
        self._held: dict[Spot, Tensor] = {}

    def hold(self, name: ComponentName, place: Spot, tensor: Tensor) -> None:
        """Keep a term that base's block adds."""
        if name in self.form.terms:
            # A copy, because the block may add to it in place (Falcon).
            self._held[place] = tensor.clone()

    def end(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        """Run the other model's block among them, where it is another."""
        held, self._held = self._held, {}
        if not held:
            self._taken.append(None)
            return
        collected = Collected(self._picker, self._theirs)

        def stand_in(name: ComponentName, place: Spot, tensor: Tensor) -> Tensor | None:
            collected.take(name, place, tensor)
            return held.get(place)

        if self.form.terms == self._theirs.terms:
            block = self._pair.finetuned.anatomy.blocks[self._index]
            with at_places(block, self._theirs, stand_in):
                _run_on(self._pair, self._index, args, kwargs)
        self._taken.append(collected.rows)


def _blocks(pair: ModelPair, only: int | None) -> list[tuple[int, nn.Module, nn.Module]]:
    """The blocks of both models; as many in both, because `check_shapes` has refused any other pair."""
    pairs = zip(pair.base.anatomy.blocks, pair.finetuned.anatomy.blocks, strict=True)
    return [(index, *blocks) for index, blocks in enumerate(pairs) if only in (None, index)]


def _run_on(pair: ModelPair, index: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what the fine-tuned model's block makes of the arguments of base's."""
    where = f"{option('localize')}: block {index} of {pair.finetuned.name}"

    def tell(error: BaseException) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{where} does not run on the states of {pair.base.name}: {shortened(error)}. Leave "
            f"{option('localize')} out for this pair.",
            option="localize",
        )

    # Base's block has run and written into a shared mapping; what this one writes stays out of it.
    copies = [_copied(a) for a in args], {name: _copied(value) for name, value in kwargs.items()}
    with Translated(where, tell):
        return pair.finetuned.anatomy.blocks[index](*copies[0], **copies[1])


def _copied(argument: Any) -> Any:
    """Return a copy of a mapping; any other argument as it is.

    A block may write into a mapping what later blocks read, and only base's blocks may write into base's. It
    need not be a dict: Gemma 3n and 4 share keys and values in a `UserDict`.
    """
    return copy(argument) if isinstance(argument, MutableMapping) else argument
