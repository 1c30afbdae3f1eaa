"""A model at any point of the straight path from base's weights to the fine-tuned model's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from lazarus.errors import UnsupportedModelError
from lazarus.messages import option
from lazarus.models import Effective, LoadedModel, dissect, effective_tensors, settings_that_differ, unwrapped

MOST_ELEMENTS = 2**22
"""The elements of a change that are held at once, where it can be taken in pieces."""
_PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True, eq=False)
class Change:
    """One parameter in which two models differ."""

    names: tuple[str, ...]
    """what it is called without an adapter; several where it is tied"""
    parameter: nn.Parameter
    """where it is on the path"""
    base: Tensor
    finetuned: Tensor

    def delta(self, rows: Tensor | slice | None = None) -> Tensor:
        """Return the fine-tuned parameter less base's in float32, or some of its rows."""
        base, finetuned = (t if rows is None else t[rows] for t in (self.base, self.finetuned))
        return finetuned.to(torch.float32) - base.to(torch.float32)

    def pieces(self) -> Iterator[tuple[slice | EllipsisType, Tensor]]:
        """Yield rows of the parameter and the delta there, a few at a time so that it takes little memory."""
        if self.base.ndim == 0:
            yield ..., self.delta()
            return
        n_rows = max(1, MOST_ELEMENTS * len(self.base) // max(1, self.base.numel()))
        for start in range(0, len(self.base), n_rows):
            rows = slice(start, start + n_rows)
            yield rows, self.delta(rows)

    def move(self, alpha: float) -> None:
        """Set it to base + alpha (fine-tuned − base)."""
        if alpha == 1.0:  # no rounding at the end
            self.parameter.data.copy_(self.finetuned)
        else:
            self.parameter.data.copy_(self.base)
            for rows, delta in self.pieces() if alpha else ():
                self.parameter.data[rows].add_(delta, alpha=alpha)


class Path:
    """A copy of base in float32 whose changed parameters can be moved; the two models stay as they are."""

    def __init__(self, base: LoadedModel, finetuned: LoadedModel, layers_path: str | None) -> None:
        """Find the parameters in which the two differ.

        Raises:
            AdapterError: it is not known what an adapter adds to a weight.
            UnsupportedModelError: the two differ in more than parameters, or hold quantised ones.
        """
        check_path(base, finetuned)
        tree = unwrapped(base.model)
        ours, theirs = (
            {each.name: each for each in effective_tensors(model.model)} for model in (base, finetuned)
        )
        self.changes = list(_changes(tree, ours, theirs, finetuned.name))
        _widen(tree)
        self.model = replace(base, model=tree, anatomy=dissect(tree, layers_path))

    def move(self, alpha: float, restored: Collection[int] = ()) -> None:
        """Move every changed parameter; those that are restored go to base."""
        for index, change in enumerate(self.changes):
            change.move(0.0 if index in restored else alpha)


def check_path(base: LoadedModel, finetuned: LoadedModel) -> None:
    """Refuse two models without a path of weights between them, as far as is seen without reading any.

    Raises:
        UnsupportedModelError: they are of two classes, or differ in settings or in which tensors they have.
    """
    start = f"there is no path of weights between {base.name} and {finetuned.name}"
    if type(base.model) is not type(finetuned.model):
        kinds = f"{type(base.model).__name__} and {type(finetuned.model).__name__}"
        raise _no_path(f"{start}: they are {kinds}")
    if different := settings_that_differ(base.model.config, finetuned.model.config):
        raise _no_path(f"{start}: they differ in settings ({different[0]})")
    ours, theirs = (_shapes(model) for model in (base, finetuned))
    if odd := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        found = ours.get(odd[0]), theirs.get(odd[0])
        told = " and ".join("none" if shape is None else str(list(shape)) for shape in found)
        raise _no_path(f"{start}: the shapes of {odd[0]} are {told}")


def _shapes(model: LoadedModel) -> dict[str, tuple[int, ...]]:
    held = model.model.state_dict(keep_vars=True)
    return {each.name: tuple(held[each.key].shape) for each in effective_tensors(model.model)}


def _no_path(told: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{told}. Leave {option('attribute')} out.", option="attribute")


def _changes(
    tree: nn.Module, ours: Mapping[str, Effective], theirs: Mapping[str, Effective], name: str
) -> Iterator[Change]:
    """Yield every change, and give the tree a parameter of its own for it."""
    read: dict[str, tuple[Tensor, Tensor]] = {}
    together: dict[tuple[int, ...], list[str]] = {}
    for each in ours:
        base, finetuned = _value(ours[each]), _value(theirs[each])
        for tensor in (base, finetuned):
            if type(tensor) not in _PLAIN:
                raise UnsupportedModelError(
                    f"{name}: {each} is quantised ({type(tensor).__name__}), and codes have no gradient. Use "
                    f"{option('dequantize', 'always')}.",
                    option="dequantize",
                )
        if base.data_ptr() == finetuned.data_ptr() or torch.equal(base, finetuned.to(base.device)):
            continue
        read[each] = base, finetuned
        # Tied parameters move together, where both models tie them.
        together.setdefault((base.data_ptr(), finetuned.data_ptr(), *base.shape), []).append(each)
    for names in together.values():
        base, finetuned = read[names[0]]
        parameter = nn.Parameter(base.to(torch.float32, copy=True), requires_grad=False)
        for each in names:
            _put(tree, each, parameter, name)
        yield Change(tuple(names), parameter, base, finetuned)


def _value(tensor: Effective) -> Tensor:
    """Return what a model computes with, with what its adapters add."""
    stored, update, _ = tensor.read()
    if update is None:
        return stored.detach()
    return (stored.detach().double() + update.to(stored.device)).to(torch.float32)


def _put(tree: nn.Module, key: str, parameter: nn.Parameter, name: str) -> None:
    path, _, attribute = key.rpartition(".")
    module = tree.get_submodule(path)
    if attribute not in module._parameters:
        raise _no_path(f"{name}: the buffer {key} is not base's, and a buffer has no gradient")
    setattr(module, attribute, parameter)


def _widen(tree: nn.Module) -> None:
    """Give a tree float32 tensors of its own in the place of narrower ones, which another model may hold."""
    wide: dict[int, Tensor] = {}
    for module in tree.modules():
        tables: tuple[Any, ...] = module._parameters, module._buffers
        for held in tables:
            for attribute, tensor in held.items():
                if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float32:
                    continue
                if id(tensor) not in wide:
                    found = tensor.detach().to(torch.float32)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    wide[id(tensor)] = nn.Parameter(found, requires_grad=False) if is_parameter else found
                held[attribute] = wide[id(tensor)]
