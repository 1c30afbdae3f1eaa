"""The update of an adapter to one tensor, computed a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor

from lazarus.names.parts import Take, as_matrix, lay_out
from lazarus.weights.views import MemoryView, Rows, Update

ADAPTER = "default"


@dataclass(frozen=True, eq=False)
class Product:
    """A low-rank update, `left` [rows, rank] times `right` [rank, columns], in float64."""

    left: Float64[Tensor, "rows rank"]
    right: Float64[Tensor, "rank columns"]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.left.shape[0], self.right.shape[1]

    def read(self, start: int, stop: int, /) -> Float64[Tensor, "rows columns"]:
        """Rows start to stop."""
        return self.left[start:stop] @ self.right

    def magnitude(self, start: int, stop: int, /) -> Float64[Tensor, "rows columns"]:
        """Return (rank + 1) Σ|left·right| of rows start to stop: the most that rounding takes, in ε."""
        return (self.left[start:stop].abs() @ self.right.abs()).mul_(self.right.shape[0] + 1)

    def part(self, take: Take) -> Product | None:
        """Return a part that is whole rows, or whole columns, of the matrix; None for any other part."""
        n_rows, n_columns = self.matrix
        dims, index = take.dims, take.index
        has_rows = any(isinstance(each, slice) for each in index) or len(index) < len(dims) - 1
        if dims[-1] == n_columns and len(index) < len(dims) and has_rows:
            # The indices of the rows are cut as the rows themselves would be.
            return Product(self.left[torch.arange(n_rows).view(dims[:-1])[index].reshape(-1)], self.right)
        if dims[0] == n_rows and index[0] == slice(None):
            columns = torch.arange(n_columns).view(dims[1:])[index[1:]]
            return Product(self.left, self.right[:, columns]) if columns.ndim == 1 else None
        return None


@dataclass(frozen=True, eq=False)
class Stack:
    """The low-rank updates of stacked experts: of each, `left` [rows, rank] times `right` [rank, columns].

    The factors stay in the adapter's dtype: those of all experts are many.
    """

    left: Shaped[Tensor, "experts rows rank"]
    right: Shaped[Tensor, "experts rank columns"]
    scaling: float

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows, those of all experts, and columns."""
        return prod(self.left.shape[:2]), self.right.shape[2]

    def read(self, start: int, stop: int, /) -> Float64[Tensor, "rows columns"]:
        """Rows start to stop."""
        return self._joined(start, stop, Product.read)

    def magnitude(self, start: int, stop: int, /) -> Float64[Tensor, "rows columns"]:
        """Rows start to stop of every expert's `Product.magnitude`."""
        return self._joined(start, stop, Product.magnitude)

    def part(self, take: Take) -> Product | None:
        """Return one expert's update, or a part of it; None for what is not of one expert."""
        n_experts, n_rows = self.left.shape[:2]
        if take.dims[0] != n_experts or not take.index or not isinstance(take.index[0], int):
            return None
        expert = self._expert(take.index[0])
        inner = Take(take.dims[1:], take.index[1:])
        is_whole = not inner.index and inner.dims == (n_rows, self.right.shape[2])
        return expert if is_whole else expert.part(inner)

    def _joined(
        self, start: int, stop: int, read: Callable[[Product, int, int], Tensor]
    ) -> Float64[Tensor, "rows columns"]:
        n_rows, found = self.left.shape[1], []
        while start < stop:
            expert, row = divmod(start, n_rows)
            n_read = min(stop - start, n_rows - row)
            found.append(read(self._expert(expert), row, row + n_read))
            start += n_read
        return torch.cat(found)

    def _expert(self, expert: int) -> Product:
        return Product(self.left[expert].double() * self.scaling, self.right[expert].double())


@dataclass(frozen=True, eq=False)
class Replaced:
    """Rows that an adapter has put in the place of the model's: `change` is new less old, in float64."""

    matrix: tuple[int, int]
    index: Int64[Tensor, " rows"]
    """the rows, rising"""
    change: Float64[Tensor, "rows columns"]

    def read(self, start: int, stop: int, /) -> Float64[Tensor, "rows columns"]:
        """Rows start to stop: 0 where a row is the model's own."""
        found = torch.zeros(stop - start, self.matrix[1], dtype=torch.float64)
        first, last = torch.searchsorted(self.index, torch.tensor([start, stop])).tolist()
        found[self.index[first:last] - start] = self.change[first:last]
        return found


@dataclass(frozen=True, eq=False)
class Merged:
    """The update of one tensor by an adapter's own rule, whatever it is: what merging adds.

    `merge` gives it in a dtype that the tensor is merged in: float64 for what is added exactly.
    """

    merge: Callable[[torch.dtype], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return as_matrix(self.shape)

    def read(self, start: int, stop: int, /) -> Float64[Tensor, "rows columns"]:
        """Rows start to stop."""
        return self._whole()[start:stop]

    def rows(self) -> AbstractContextManager[Rows]:
        """The rows of the update, which is in memory as long as they are read."""
        return nullcontext(MemoryView(self._whole(), "float64"))

    def merged_in(self, dtype: torch.dtype) -> Merged:
        """Return what a merge in `dtype` adds, which rounds at every step of the adapter's rule."""
        return Merged(self.merge, self.shape, dtype)

    def _whole(self) -> Tensor:
        return self.merge(self.dtype).reshape(self.matrix)


@dataclass(frozen=True, eq=False)
class Taken:
    """The part of an update that belongs to one component of a fused tensor of shape `whole`."""

    update: Update
    whole: tuple[int, ...]
    take: Take

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return lay_out(self.whole, self.take, torch.float64).matrix

    def read(self, start: int, stop: int, /) -> Float64[Tensor, "rows columns"]:
        """Rows start to stop."""
        return self._view().read(start, stop)

    def rows(self) -> AbstractContextManager[Rows]:
        """The rows of the part, which is in memory as long as they are read."""
        return nullcontext(self._view())

    def merged_in(self, dtype: torch.dtype) -> Taken | None:
        """The part of what a merge in `dtype` adds; None where that is the same in every dtype."""
        merged_in: Any = getattr(self.update, "merged_in", None)
        return None if merged_in is None else Taken(merged_in(dtype), self.whole, self.take)

    def _view(self) -> MemoryView:
        everything = self.update.read(0, self.update.matrix[0]).reshape(self.whole)
        part = MemoryView(everything, "float64", self.take).part
        return MemoryView(part.contiguous(), "float64")


def part_of_update(update: Update, shape: tuple[int, ...], take: Take | None) -> Update:
    """The part of an update of a tensor of that shape that belongs to one of its components."""
    if take is None:
        return update
    part: Callable[[Take], Update | None] | None = getattr(update, "part", None)
    found = part(take) if part is not None else None
    return Taken(update, shape, take) if found is None else found


def low_rank(layer: Any) -> Product | Stack | None:
    """Return the update of a plain LoRA layer; None where the adapter has another rule than scaling·B·A."""
    from peft.tuners.lora import Embedding, Linear
    from peft.tuners.lora.layer import ParamWrapper

    # The exact classes: one that is derived from them may have another rule.
    if type(layer) not in (Linear, Embedding, ParamWrapper) or layer.lora_variant.get(ADAPTER) is not None:
        return None
    if layer.lora_bias.get(ADAPTER):
        return None
    scaling = float(layer.scaling[ADAPTER])
    if type(layer) is Embedding:
        # The weight of an embedding is [tokens, width], the transpose of B·A.
        a, b = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
        return Product(a.T.double() * scaling, b.T.double())
    if type(layer) is ParamWrapper and layer.num_experts > 1:
        left, right, _ = layer.get_delta_factors(ADAPTER)
        return Stack(left.detach(), right.detach(), scaling)
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    # GPT-2 stores the weight of a Conv1D as [inputs, outputs], so the update is turned too.
    if layer.fan_in_fan_out:
        return Product(a.T.double() * scaling, b.T.double())
    return Product(b.double() * scaling, a.double())
