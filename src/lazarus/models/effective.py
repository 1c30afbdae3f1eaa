"""A model's tensors as it computes with them, whatever adapters are on it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lazarus.blame import Translated
from lazarus.errors import AdapterError
from lazarus.models.adapters import share_storage

_INSIDE = ("base_layer", "token_adapter", "original_module")
"""what PEFT's wrappers call the module that they have wrapped, or another wrapper of it"""
Parts = tuple[Tensor, Tensor | None, Tensor | None]
"""
a tensor without its adapters; what they add to it, in float64, or None; and, of several adapters, the sum of
the absolute values of what each adds
"""


@dataclass(frozen=True)
class Effective:
    """One tensor of a model as the model computes with it."""

    name: str
    """what it is called without an adapter"""
    key: str
    """what it is called in the model's state dict"""
    read: Callable[[], Parts]


def effective_tensors(model: nn.Module) -> Iterator[Effective]:
    """Yield a model's tensors by the names that they have without an adapter, with what its adapters add.

    Reading one raises AdapterError where what an adapter adds is not known.
    """
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    copied = {name: module for name, module in model.named_modules() if hasattr(module, "modules_to_save")}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = next((path for path in (*copied, *layers) if name.startswith(f"{path}.")), None)
        if owner is None:
            yield Effective(name, name, partial(_plain, tensor))
            continue
        inside = name.removeprefix(f"{owner}.")
        if owner in layers and inside.startswith("base_layer."):
            attribute = inside.removeprefix("base_layer.")
            path = owner.removesuffix(".token_adapter")  # PEFT wraps a table whose tokens are trained twice
            read = partial(_with_update, layers[owner], attribute, tensor)
            yield Effective(f"{path}.{attribute}", name, read)
        elif owner in copied:
            for active in copied[owner].active_adapters:
                if inside.startswith(f"modules_to_save.{active}."):
                    own = inside.removeprefix(f"modules_to_save.{active}.")
                    yield Effective(f"{owner}.{own}", name, partial(_plain, tensor))


def _plain(tensor: Tensor) -> Parts:
    return tensor, None, None


def _with_update(layer: nn.Module, attribute: str, tensor: Tensor) -> Parts:
    """A tensor under adapters: what merging them adds to it, computed on a copy in float64.

    Of several, with the sum of their sizes: one may have been merged and rounded before the next.
    """
    # A copy, because merging changes the layer in place, and base may share its weights.
    merged: Any = copy.deepcopy(layer).double()

    def held() -> Tensor:
        tensor: Tensor = dict(merged.base_layer.named_parameters())[attribute]
        return tensor.detach().clone()

    first = before = held()
    size = torch.zeros_like(before)
    adapters = list(merged.active_adapters)
    # One at a time: `size` is the sum of what each of them adds.
    for adapter in adapters:
        # PEFT refuses some, as a bias of LoRA's own; a lack of memory is no refusal, and passes.
        with warnings.catch_warnings(), Translated("merging an adapter", _refusal):
            warnings.filterwarnings("ignore", "Already following adapters were merged")
            merged.merge(adapter_names=[adapter])
        after = held()
        size += (after - before).abs()
        before = after
    return tensor, before - first, size if len(adapters) > 1 else None


def _refusal(error: BaseException) -> AdapterError:
    return AdapterError(f"PEFT does not merge it: {error}")


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second module tree over the same weights, without adapters and what they add."""
    tree = share_storage(model)
    while wrappers := {name: inner for name, m in tree.named_modules() if (inner := _inside(m)) is not None}:
        # The outermost first: what is inside it may be a wrapper too.
        name = min(wrappers, key=len)
        parent, _, attribute = name.rpartition(".")
        setattr(tree.get_submodule(parent), attribute, wrappers[name])
    return tree


def _inside(module: nn.Module) -> nn.Module | None:
    """Return the module that an adapter has wrapped; None of other modules."""
    found = next((getattr(module, name) for name in _INSIDE if hasattr(module, name)), None)
    return found if isinstance(found, nn.Module) else None
