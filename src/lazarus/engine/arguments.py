"""The arguments of a block's call: taken down at that time, and compared with another call.

Blocks write into some of their arguments: into mappings that they share, and into the KV cache. So it is not
enough to hold an argument and to look at it later. Its contents are taken down when the block is called, and
what the block has written when it returns. A pass that does without the block is given what it wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from lazarus.engine.prefix_cache import holds_keys_and_values
from lazarus.models import Equality

_CONSTANT = (
    *(bool, int, float, str, bytes, type(None), range, slice, type, Enum),
    *(BuiltinFunctionType, FunctionType, partial),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""Values that no block changes."""

Written = list[dict[Any, Any]]
"""The items that a block wrote into each argument that can be written into: entries, or layers of a cache."""


@dataclass(frozen=True)
class _Held:
    """A tensor, and how often it had been written to in place."""

    tensor: Tensor
    version: int

    @property
    def is_as_it_was(self) -> bool:
        """Return whether it still holds what it held then."""
        return self.tensor._version == self.version


@dataclass(frozen=True)
class _Composed:
    """A value made of others: its parts, by their names or indices."""

    kind: type
    parts: Mapping[Any, Any]


@dataclass(frozen=True)
class _Cache:
    """The type and attributes of each layer of a KV cache. Keys and values are never written to in place."""

    layers: list[tuple[type, dict[str, Any]]]


class _Unknown:
    """An argument that cannot be looked into. It is like no other, nor like itself in another call."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of a block, as they were when it was called."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Take down what a block is being called with."""
        return cls(tuple(map(_taken_down, args)), {name: _taken_down(v) for name, v in kwargs.items()})

    def without_states(self) -> Arguments:
        """Return the same without the hidden states, which come first."""
        return Arguments((None, *self.args[1:]), self.kwargs)

    def same_as(self, other: Arguments, equality: Equality, n_layers: int | None = None) -> bool:
        """Return whether both calls are known to have had the same arguments, bit for bit.

        Of a KV cache the first `n_layers` are compared: these blocks read nothing of later ones.
        """
        # By place or by name: a value given the other way is not known to be the same argument.
        ours, theirs = ({**dict(enumerate(each.args)), **each.kwargs} for each in (self, other))
        return ours.keys() == theirs.keys() and all(
            _same(ours[name], theirs[name], equality, n_layers) for name in ours
        )


def contents(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Written:
    """Return what stands in each of the arguments that can be written into."""
    return [
        dict(enumerate(dict(vars(layer)) for layer in value.layers))
        if holds_keys_and_values(value)
        else dict(value)
        for value in _written_into(args, kwargs)
    ]


def written(before: Written, after: Written) -> Written:
    """Return what is in the contents after a call, and was not there before it."""
    return [
        {name: item for name, item in now.items() if not _is_still(then.get(name), item)}
        for then, now in zip(before, after, strict=True)
    ]


def write_again(args: Sequence[Any], kwargs: Mapping[str, Any], items: Written) -> None:
    """Write into the arguments of a call what a block had written into those of another one."""
    for value, found in zip(_written_into(args, kwargs), items, strict=True):
        for name, item in found.items():
            if holds_keys_and_values(value):
                vars(value.layers[name]).update(item)
            else:
                value[name] = item


def _written_into(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    values = (*args, *kwargs.values())
    return [v for v in values if isinstance(v, MutableMapping) or holds_keys_and_values(v)]


def _is_still(then: Any, now: Any) -> bool:
    """Return whether an entry, or each part of a layer of a cache, is the very object that it was."""
    if isinstance(then, dict) and isinstance(now, dict):
        return then.keys() == now.keys() and all(then[name] is now[name] for name in now)
    # By identity: a cache layer extends its keys and values by concatenation, which makes new tensors.
    return then is now


def _taken_down(value: Any) -> Any:
    """Return an argument as it is now, whatever is written into it later."""
    if isinstance(value, Tensor):
        # An inference tensor does not count how often it is written to.
        return _Unknown() if value.is_inference() else _Held(value, value._version)
    if isinstance(value, _CONSTANT):
        return value
    if holds_keys_and_values(value):
        return _Cache([(type(layer), dict(vars(layer))) for layer in value.layers])
    parts = _parts(value)
    if parts is None:
        return _Unknown()
    return _Composed(type(value), {name: _taken_down(part) for name, part in parts.items()})


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """Return the parts of an argument by their names or indices; None where it may have others."""
    # Flex attention's mask is neither a mapping nor a dataclass, but it can list what it is made of.
    if isinstance(value, BlockMask):
        return dict(enumerate(value.as_tuple()))
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, Mapping):
        # It may hold more besides its entries. (A `UserDict` gives these a second time, as its `data`.)
        beside = {("beside", n): v for n, v in getattr(value, "__dict__", {}).items()}
        return {**value, **beside}
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _same(one: Any, other: Any, equality: Equality, n_layers: int | None) -> bool:
    if isinstance(one, _Unknown) or type(one) is not type(other):
        return False
    if isinstance(one, _Held):
        unchanged = one.is_as_it_was and other.is_as_it_was
        # Bits are compared across devices, but the kernels of another device may round otherwise.
        same_place = one.tensor.device == other.tensor.device
        return unchanged and same_place and equality.same(one.tensor, other.tensor) is True
    if isinstance(one, _Cache):
        return equality.same(one.layers[:n_layers], other.layers[:n_layers]) is True
    if isinstance(one, _Composed):
        ours, theirs = one.parts, other.parts
        alike = one.kind is other.kind and ours.keys() == theirs.keys()
        return alike and all(_same(ours[n], theirs[n], equality, n_layers) for n in ours)
    # None means not known, and may not count as equal: a block that is replayed must be the same.
    return equality.same(one, other) is True
