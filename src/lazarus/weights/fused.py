"""Tensors that are several components in one: which of their numbers are whose.

The order of the parts is in no configuration: it is how a model's code cuts what the tensor gives. It is
told by the module that holds the tensor, and each layout below is that of transformers' own code. A tensor whose
layout is not known for certain stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lazarus.weights.views import Take

Index = tuple[int | slice, ...]
_ALL = slice(None)


@dataclass(frozen=True)
class Holder:
    """The modules around a tensor."""

    owner: nn.Module | None
    """the module that has it as an attribute"""
    parent: nn.Module | None
    """the module that has the owner"""


@dataclass(frozen=True)
class _Cut:
    """How one axis is divided: into these axes, of which each part has an index."""

    dims: tuple[int, ...]
    parts: tuple[tuple[str, Index], ...]


def pieces(component: str, shape: tuple[int, ...], holder: Holder) -> list[tuple[str, Take]]:
    """The components of a tensor and the part of it that each is; none where it is one component."""
    name, dot, attribute = component.partition(".bias")
    if attribute or "." in name.split("_")[-1] or not shape:
        return []
    group, _, bare = name.rpartition(".")
    n_stacked = _n_stacked(group, bare, shape, holder, is_bias=bool(dot))
    inner = shape
    if n_stacked:
        inner = shape[1:] if len(shape) == (2 if dot else 3) else (shape[0] // n_stacked, *shape[1:])
    axis = 0 if dot else _axis(bare, inner, holder)
    cut = _cut(bare, inner[axis], holder)
    if not n_stacked and cut is None:
        return []
    cut = cut or _Cut((inner[axis],), ((bare, (_ALL,)),))
    dims = (*inner[:axis], *cut.dims, *inner[axis + 1 :])
    parts = [(part + dot, (_ALL,) * axis + index) for part, index in cut.parts]
    if not n_stacked:
        return [(f"{group}.{part}" if group else part, Take(dims, index)) for part, index in parts]
    owner = group.removesuffix("s") or "expert"
    return [
        (f"{owner}_{expert}.{part}", Take((n_stacked, *dims), (expert, *index)))
        for expert in range(n_stacked)
        for part, index in parts
    ]


def _n_stacked(group: str, bare: str, shape: tuple[int, ...], holder: Holder, *, is_bias: bool) -> int:
    """How many experts' tensors are one above the other; 0 where it is one tensor."""
    if len(shape) == (2 if is_bias else 3):
        may_be = group in ("experts", "shared_expert") or (not group and bare.startswith("mlp_") and not is_bias)
        return shape[0] if may_be else 0
    width = getattr(holder.owner, "ffn_hidden_size", None)
    if group == "experts" and len(shape) == 2 and width and shape[0] % width == 0:
        return int(shape[0] // width)  # DBRX: [experts · width, hidden]
    return 0


def _axis(bare: str, inner: tuple[int, ...], holder: Holder) -> int:
    """Which axis of a matrix is its output: the first, unless the module multiplies from the right."""
    if isinstance(holder.owner, Conv1D):
        return 1
    down = getattr(holder.owner, "down_proj", None)
    if bare == "mlp_gate_up" and len(inner) == 2 and getattr(down, "ndim", 0) == 3:
        return int(inner[1] == 2 * down.shape[1])
    return 0


def _cut(bare: str, n: int, holder: Holder) -> _Cut | None:
    prefix, _, what = bare.partition("attn_")
    if what in _ATTENTION_CUTS and holder.parent is not None:
        cut = _ATTENTION_CUTS[what](n, holder)
        if cut is None or prod(cut.dims) != n:
            return None
        return _Cut(cut.dims, tuple((_full(prefix, part), index) for part, index in cut.parts))
    return None
