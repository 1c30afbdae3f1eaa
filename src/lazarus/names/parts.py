"""A part of a tensor, and where its rows are in a file.

A checkpoint may fuse what is two components here, or stack all experts: then a view is of a part. Every
tensor is read as a matrix: all leading axes are its rows, the last axis its columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Take:
    """A part of a tensor: its elements in the shape `dims`, row-major, then `index`, with ints and slices.

    The steps of slices are positive.
    """

    dims: tuple[int, ...]
    index: tuple[int | slice, ...]


@dataclass(frozen=True)
class RowLayout:
    """Place of the rows of a matrix in a row-major file, counted in elements.

    `outer` and `inner` are (length, stride) of the axes that the rows run along, the last one apart;
    neighbours that are one axis in the file have been merged.
    """

    shape: tuple[int, ...]
    matrix: tuple[int, int]
    offset: int
    outer: tuple[tuple[int, int], ...]
    inner: tuple[int, int]
    column_stride: int

    def place(self, row: int) -> int:
        """Return where a row begins."""
        left, index = divmod(row, self.inner[0])
        place = self.offset + index * self.inner[1]
        for length, stride in reversed(self.outer):
            left, index = divmod(left, length)
            place += index * stride
        return place

    def regular(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the rows start to stop in runs whose rows are all equally far apart, as (start, stop)."""
        length = self.inner[0]
        while start < stop:
            end = min(stop, (start // length + 1) * length)
            yield start, end
            start = end

    def span(self, n_rows: int) -> int:
        """Return the distance from the first element of a run to its last, gaps included."""
        return (n_rows - 1) * self.inner[1] + (self.matrix[1] - 1) * self.column_stride + 1


def lay_out(shape: tuple[int, ...], take: Take | None, dtype: torch.dtype) -> RowLayout:
    """Return where the rows of a tensor of this shape and dtype are, or those of a part of it.

    Raises:
        ValueError: `take` does not fit the shape.
    """
    # On meta, torch computes the offset and the strides of a part, and nothing is allocated.
    part = part_of(torch.empty(shape, dtype=dtype, device="meta"), take)
    rows, columns = as_matrix(tuple(part.shape))
    axes: list[tuple[int, int]] = []
    n_leading = max(part.ndim - 1, 1)
    for length, stride in zip(part.shape[:n_leading], part.stride()[:n_leading], strict=True):
        if axes and axes[-1][1] == length * stride:
            axes[-1] = (axes[-1][0] * length, stride)
        # The stride of an axis of length 1 means nothing.
        elif length != 1:
            axes.append((length, stride))
    last = part.stride()[-1] if part.ndim > 1 else 1
    inner = axes.pop() if axes else (1, columns)
    return RowLayout(tuple(part.shape), (rows, columns), int(part.storage_offset()), tuple(axes), inner, last)


def part_of(tensor: Tensor, take: Take | None) -> Tensor:
    """The part that is taken of a tensor; of complex numbers, their two parts.

    Raises:
        ValueError: `take` does not fit the shape.
    """
    if take is not None:
        if math.prod(take.dims) != tensor.numel():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} cannot be read as {take.dims}")
        tensor = tensor.reshape(take.dims)[take.index]
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns under which a tensor is read.

    >>> as_matrix((2, 3, 4)), as_matrix((5,)), as_matrix(())
    ((6, 4), (5, 1), (1, 1))
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]
