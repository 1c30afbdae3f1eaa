"""The standard names of a model's tensors: the block, and the component in it.

roles.py reads names, fused.py cuts tensors that are several components in one; here both meet the model,
which may be empty (on torch's device `meta`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from lazarus.models import Anatomy
from lazarus.names.fused import Holder, pieces
from lazarus.names.parts import Take
from lazarus.names.roles import Block, component_of, head, outside, own_name

_BLOCK_PATH = re.compile(
    r"(?:(?P<before>.*?)\.)?(?:layers|layer|h|blocks|block)\.(?P<layer>\d{1,9})\.(?P<inside>.+)"
)
_OTHER_STACK = re.compile(r"vision|visual|image|audio|speech|mtp|nextn")


@dataclass(frozen=True)
class Place:
    """The place of a component."""

    layer: int | None
    """its block, from 0; None outside the blocks"""
    component: str
    """its standard name, or the tensor's path where no rule knows it"""


@dataclass(frozen=True)
class Part:
    """One component of a tensor."""

    place: Place
    take: Take | None
    """which part of the tensor it is; None if all of it"""


@dataclass(frozen=True)
class _Named:
    """A tensor before it is cut."""

    place: Place
    by_rule: bool


class Namer:
    """Names the tensors of one model, each with a place of its own."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy | None) -> None:
        """Learn a model, which may be empty; `anatomy` is None where its blocks cannot be found."""
        # With duplicates: a block that runs at several places (ALBERT) is found under any of its paths.
        self._modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._input, self._output = model.get_input_embeddings(), model.get_output_embeddings()
        self._anatomy = anatomy
        self._stack = _path_of(anatomy.stack, self._modules) if anatomy else ""
        self._layers = self._find_layers()
        self._blocks = self._find_blocks()
        self._shared = self._find_shared()

    def parts(self, path: str, shape: tuple[int, ...]) -> list[Part]:
        """The components of a tensor of that name and stored shape: several where it is a fused one.

        `path` is a parameter's or buffer's name, or a checkpoint's key for a piece of one. What no rule knows
        is one part, whose component is its path from its block.
        """
        named = self._named(path)
        place = named.place
        if place in self._shared:
            return [Part(Place(None, own_name(path)), None)]
        if place.layer is None or not named.by_rule:
            return [Part(place, None)]
        owner = path.rpartition(".")[0]
        holder = Holder(self._modules.get(owner), self._modules.get(owner.rpartition(".")[0]))
        found = pieces(place.component, shape, holder)
        return [Part(Place(place.layer, name), take) for name, take in found] or [Part(place, None)]

    def place(self, path: str) -> Place:
        """Return the place of a tensor as a whole: that of a fused one has the name of all that is in it."""
        return self._named(path).place

    def is_named(self, path: str) -> bool:
        """Return whether a rule knows the tensor; its component is its path otherwise."""
        named = self._named(path)
        return named.by_rule and named.place not in self._shared

    def _named(self, path: str) -> _Named:
        if self._anatomy is None:
            return _Named(name_by_path(path), by_rule=True)
        block = self._block_of(path)
        if block is None:
            found = self._outside(path)
            return _Named(Place(None, found or own_name(path)), found is not None)
        inside, layer = path[len(block) + 1 :], self._layers[block]
        found = component_of(inside, self._blocks[layer])
        return _Named(Place(layer, found or own_name(inside)), found is not None)

    def _block_of(self, path: str) -> str | None:
        """The path of the block that a tensor is in."""
        dots = (found.start() for found in re.finditer(r"\.", path))
        return next((path[:dot] for dot in dots if path[:dot] in self._layers), None)

    def _outside(self, path: str) -> str | None:
        owner, _, attribute = path.rpartition(".")
        tensor = self._tensors.get(path)
        bias = getattr(self._output, "bias", None)
        if self._output is not None and self._modules.get(owner) is self._output:
            if attribute in ("weight", "bias"):
                return "lm_head" if attribute == "weight" else "lm_head.bias"
        elif tensor is not None and tensor is bias:
            return "lm_head.bias"
        if tensor is not None and tensor is getattr(self._input, "weight", None):
            return "embed"
        if self._stack and not path.startswith(f"{self._stack}."):
            return head(path)
        found = outside(path[len(self._stack) + 1 :] if self._stack else path)
        # Only the module that reads token ids is `embed`.
        return found if found and found != "embed" and not found.startswith("lm_head") else head(path)

    def _find_layers(self) -> dict[str, int]:
        """The path of each block, and its index."""
        blocks = self._anatomy.blocks if self._anatomy else ()
        # Reversed, so that the first place of a block that is listed several times counts.
        index = {id(block): layer for layer, block in reversed(list(enumerate(blocks)))}
        return {name: index[id(each)] for name, each in self._modules.items() if id(each) in index}

    def _find_blocks(self) -> dict[int, Block]:
        """Return the tensors in each block. Without a final norm, norms come after their sublayers."""
        pre_norm = any(
            self._outside(path) == "final_norm" for path in self._tensors if not self._block_of(path)
        )
        names: dict[int, set[str]] = {layer: set() for layer in self._layers.values()}
        for path in self._tensors:
            block = self._block_of(path)
            if block is not None:
                # One expert stands for all: rules ask which kinds of tensors there are.
                inside = re.sub(r"\bexperts\.\d+", "experts.0", path[len(block) + 1 :])
                names[self._layers[block]].add(inside)
        return {layer: Block(frozenset(inside), pre_norm) for layer, inside in names.items()}

    def _find_shared(self) -> frozenset[Place]:
        """Return the places that two tensors of the model would share: these tensors keep their paths."""
        # Of a tied tensor the first path alone: two names of one tensor are no conflict.
        first = {id(tensor): path for path, tensor in reversed(self._tensors.items())}
        places = Counter(self._named(path).place for path in first.values())
        return frozenset(place for place, count in places.items() if count > 1)


def name_by_path(path: str) -> Place:
    """The place of a tensor of a model that nothing is known of, by its name alone.

    Norms are taken to be before their sublayers, and blocks to be those of the first list in the path.
    """
    found = _BLOCK_PATH.fullmatch(path)
    if _OTHER_STACK.search(path):
        return Place(None, own_name(path))
    if found is None:
        return Place(None, outside(path) or head(path) or own_name(path))
    inside = found["inside"]
    return Place(int(found["layer"]), component_of(inside, Block()) or own_name(inside))


def _path_of(module: nn.Module, modules: dict[str, nn.Module]) -> str:
    return next(path for path, each in modules.items() if each is module)
