"""The form of a block: where in it are the terms that its sublayers add, and its router."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lazarus.facts import ComponentName


@dataclass(frozen=True)
class Spot:
    """A tensor among those that a module of a block returns, or receives."""

    path: str
    """the module, from its block"""
    index: int = 0
    """which of its tensors, nested ones included"""
    received: bool = False


@dataclass(frozen=True)
class Router:
    """The router of a block: its logits, and where the experts that it picks can be seen."""

    logits: Spot
    n_experts: int
    picks: Spot | None
    """their numbers, or weights that are 0 for all other experts; None where neither can be seen"""


@dataclass(frozen=True)
class Form:
    """The components of a block: the terms of each that are added to the residual stream, and its router."""

    terms: Mapping[ComponentName, tuple[Spot, ...]]
    """of `attn_out` and `mlp_out`, as far as the block has them"""
    router: Router | None = None
    others: tuple[str, ...] = ()
    """modules whose outputs are added as well, and belong to neither"""

    @property
    def names(self) -> tuple[ComponentName, ...]:
        """The names of what can be compared."""
        routed = () if self.router is None else ("router",)
        return (*self.terms, *routed, *(("experts",) if self.router and self.router.picks else ()))

    @property
    def places(self) -> list[tuple[ComponentName, Spot]]:
        """Every place, with the name of what is there."""
        found = [(name, place) for name, places in self.terms.items() for place in places]
        if self.router is not None:
            found.append(("router", self.router.logits))
            found += [("experts", self.router.picks)] if self.router.picks else []
        return found


@dataclass(frozen=True)
class Components:
    """The form of each block of a model."""

    of_blocks: tuple[Form, ...]
    order: tuple[int, ...]
    """the block of each layer: of a model that loops over its blocks, one comes several times"""

    def at(self, layer: int) -> Form:
        """The form of a layer's block."""
        return self.of_blocks[self.order[layer]]


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a value, nested ones included, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    return (
        [t for item in items for t in tensors_in(item)] if isinstance(value, Mapping | tuple | list) else []
    )


@contextmanager
def at_places(
    block: nn.Module, form: Form, take: Callable[[ComponentName, Spot, Tensor], Tensor | None]
) -> Iterator[None]:
    """While the block runs, hand the tensor at each place to `take`; what that returns stands in for it."""

    running = False

    def begin(*_: Any) -> None:
        nonlocal running
        running = True

    def end(*_: Any) -> None:
        nonlocal running
        running = False

    def hook_for(name: ComponentName, place: Spot) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not running:  # a module that blocks share, in another block
                return None
            tensor = tensors_in((args, kwargs) if place.received else output)[place.index]
            other = take(name, place, tensor)
            return None if other is None else _with(output, tensor, other)

        return hook

    handles = [
        block.get_submodule(place.path).register_forward_hook(hook_for(name, place), with_kwargs=True)
        for name, place in form.places
    ]
    handles += [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with(value: Any, tensor: Tensor, other: Tensor) -> Any:
    """Return a module's output with another tensor in the place of one of its own."""
    if value is tensor:
        return other
    kind: Any = type(value)
    if isinstance(value, Mapping):
        return kind({name: _with(item, tensor, other) for name, item in value.items()})
    if isinstance(value, tuple | list):
        items = [_with(item, tensor, other) for item in value]
        return getattr(value, "_make", kind)(items)  # a named tuple takes its fields one by one
    return value
