"""A tensor, or a part of one, that is read a few rows at a time, wherever it is stored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from lazarus.models.stored import TORCH_DTYPES, StoredTensor
from lazarus.names.parts import RowLayout, Take, as_matrix, lay_out, part_of

_FIRST, _CHUNK = 1024, 2**16
"""how many elements are compared at first, and then at a time"""
_WASTE = 8
"""Where reading across gaps would read more than this many times what is wanted, each row is read alone."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@runtime_checkable
class Rows(Protocol):
    """An object that reads rows of a matrix."""

    def read(self, start: int, stop: int, /) -> Shaped[Tensor, "rows columns"]:
        """Return rows start to stop, [stop − start, columns], in their own dtype."""
        ...


@runtime_checkable
class View(Rows, Protocol):
    """A tensor that is read in parts. A complex one has a last axis more: real part, imaginary part."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return what it is."""
        ...

    @property
    def dtype(self) -> str:
        """Return the name of its stored dtype, such as bfloat16, or its ggml type, such as Q8_0."""
        ...

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns under which it is read; a vector of n is (n, 1), a scalar (1, 1)."""
        ...


@runtime_checkable
class Update(Protocol):
    """An update of a tensor, such as an adapter's B·A."""

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns, those of the view that it is added to."""
        ...

    def read(self, start: int, stop: int, /) -> Float64[Tensor, "rows columns"]:
        """Rows start to stop in float64: exactly what is added."""
        ...


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class StoredView:
    """A tensor in a safetensors file, or a part of it.

    Raises:
        ValueError: the dtype is not one that torch can read, or `take` does not fit the shape.
    """

    stored: StoredTensor
    take: Take | None = None

    def __post_init__(self) -> None:
        if self.stored.dtype not in TORCH_DTYPES:
            raise ValueError(f"{self.stored.path}: numbers of type {self.stored.dtype} cannot be read")
        _ = self.layout

    @cached_property
    def layout(self) -> RowLayout:
        """Return where its rows are."""
        return lay_out(self.stored.shape, self.take, self.torch_dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the dtype in the file."""
        return TORCH_DTYPES[self.stored.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return what it is, after the take."""
        return self.layout.shape

    @property
    def dtype(self) -> str:
        """Return the name of the dtype in the file."""
        return dtype_name(self.torch_dtype)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns under which it is read."""
        return self.layout.matrix

    def read(self, start: int, stop: int, /) -> Shaped[Tensor, "rows columns"]:
        """Rows start to stop, from the file.

        Raises:
            OSError: the file is missing or too short.
        """
        with self.rows() as rows:
            return rows.read(start, stop)

    def rows(self) -> _FileRows:
        """A reader that keeps the file open and reads into the same memory each time."""
        return _FileRows(self)


class _FileRows:
    """Reads rows of a stored view; what `read` returns is overwritten by the next call."""

    def __init__(self, view: StoredView) -> None:
        self.start = view.stored.start
        self.layout = view.layout
        # A complex element is two real ones, and the layout counts these.
        self.dtype = view.torch_dtype.to_real() if view.torch_dtype.is_complex else view.torch_dtype
        self.taken = self.across = torch.empty(0, dtype=self.dtype)
        self.file = view.stored.open()  # closed by __exit__

    def __enter__(self) -> _FileRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, start: int, stop: int, /) -> Shaped[Tensor, "rows columns"]:
        """Rows start to stop: what is together in the file at once, other rows with the gaps between."""
        columns, layout = self.layout.matrix[1], self.layout
        n_elements = (stop - start) * columns
        if len(self.taken) < n_elements:
            self.taken = torch.empty(n_elements, dtype=self.dtype)
        taken = self.taken[:n_elements].view(stop - start, columns)
        if n_elements:
            for first, end in layout.regular(start, stop):
                self._run(first, taken[first - start : end - start])
        return taken

    def _run(self, row: int, taken: Tensor) -> None:
        """Read rows that are equally far apart, from `row` on."""
        span = self.layout.span(len(taken))
        if span == taken.numel():
            self._fill(self.layout.place(row), taken.view(-1))
        elif len(taken) > 1 and span > _WASTE * taken.numel():
            for i in range(len(taken)):
                self._run(row + i, taken[i : i + 1])
        else:
            if len(self.across) < span:
                self.across = torch.empty(span, dtype=self.dtype)
            self._fill(self.layout.place(row), self.across[:span])
            strides = (self.layout.inner[1], self.layout.column_stride)
            # The gaps between the rows were read with them, and are stepped over here.
            taken.copy_(self.across.as_strided(tuple(taken.shape), strides))

    def _fill(self, place: int, memory: Tensor) -> None:
        left = memoryview(memory.view(torch.uint8).numpy().data)
        self.file.seek(self.start + place * self.dtype.itemsize)
        while left:
            n_read = self.file.readinto(left)  # two gigabytes at most
            if not n_read:
                raise OSError(f"{self.file.name}: cut short")
            left = left[n_read:]


@dataclass(frozen=True, eq=False)
class MemoryView:
    """A tensor in memory, or a part of it; `dtype` names the dtype that it was stored in.

    Raises:
        ValueError: `take` does not fit the shape.
    """

    tensor: Tensor
    dtype: str
    take: Take | None = None

    def __post_init__(self) -> None:
        _ = self.part

    @cached_property
    def part(self) -> Tensor:
        """Return what is taken."""
        return part_of(self.tensor.detach(), self.take)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return what it is, after the take."""
        return tuple(self.part.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns under which it is read."""
        return as_matrix(self.shape)

    @cached_property
    def _as_rows(self) -> Tensor:
        return self.part.reshape(self.matrix)

    def read(self, start: int, stop: int, /) -> Shaped[Tensor, "rows columns"]:
        """Rows start to stop; they share the tensor's memory where its layout allows."""
        return self._as_rows[start:stop]


@dataclass(frozen=True, eq=False)
class AddedView:
    """A view with an update on top, such as a model with an adapter.

    Raises:
        ValueError: the update is of another shape.
    """

    view: View
    update: Update

    def __post_init__(self) -> None:
        if self.view.matrix != self.update.matrix:
            raise ValueError(f"an update of {self.update.matrix} does not fit a tensor of {self.view.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Return that of the view."""
        return self.view.shape

    @property
    def dtype(self) -> str:
        """Return float64: the sum is not rounded to a stored dtype."""
        return "float64"

    @property
    def matrix(self) -> tuple[int, int]:
        """Return that of the view."""
        return self.view.matrix

    def read(self, start: int, stop: int, /) -> Float64[Tensor, "rows columns"]:
        """Rows start to stop of the sum, in float64."""
        return self.view.read(start, stop).to(torch.float64) + self.update.read(start, stop)

    @contextmanager
    def rows(self) -> Iterator[Rows]:
        """The rows of both, opened."""
        with open_rows(self.view) as view, open_rows(self.update) as update:
            yield _Sum(view, update)


@dataclass(frozen=True, eq=False)
class _Sum:
    """The sum of two readers of rows."""

    one: Rows
    other: Rows

    def read(self, start: int, stop: int, /) -> Float64[Tensor, "rows columns"]:
        return self.one.read(start, stop).to(torch.float64) + self.other.read(start, stop)


@dataclass(frozen=True, eq=False)
class PickedRows:
    """Some rows of a view, in any order: those of the tokens that two vocabularies have in common."""

    view: View
    index: NDArray[np.int64]
    """places along the view's first axis"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the view's shape, with as many rows as are picked."""
        return len(self.index), *self.view.shape[1:]

    @property
    def dtype(self) -> str:
        """Return that of the view."""
        return self.view.dtype

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns under which it is read."""
        return as_matrix(self.shape)

    def read(self, start: int, stop: int, /) -> Shaped[Tensor, "rows columns"]:
        """Rows start to stop."""
        with self.rows() as rows:
            return rows.read(start, stop).clone()

    @contextmanager
    def rows(self) -> Iterator[Rows]:
        """The rows of the view, opened."""
        n_each = self.matrix[0] // max(len(self.index), 1)
        places = (self.index[:, None] * n_each + np.arange(n_each)).ravel()
        with open_rows(self.view) as rows:
            yield _Picked(rows, places, self.matrix[1])


@dataclass(frozen=True, eq=False)
class _Picked:
    rows: Rows
    places: NDArray[np.int64]
    n_columns: int

    def read(self, start: int, stop: int, /) -> Shaped[Tensor, "rows columns"]:
        """Rows start to stop; those that follow each other in the view are read at once."""
        wanted = self.places[start:stop]
        breaks = (np.flatnonzero(np.diff(wanted) != 1) + 1).tolist()
        if not breaks:
            return self.rows.read(int(wanted[0]), int(wanted[-1]) + 1)
        runs = list(zip([0, *breaks], [*breaks, len(wanted)], strict=True))
        found: Tensor | None = None
        for first, end in runs:
            part = self.rows.read(int(wanted[first]), int(wanted[end - 1]) + 1)
            if found is None:
                found = torch.empty(len(wanted), self.n_columns, dtype=part.dtype)
            found[first:end] = part
        assert found is not None
        return found


def open_rows(view: Rows) -> AbstractContextManager[Rows]:
    """Open the rows of a view or of an update, for one thread; what was read is overwritten by the next read.

    What has to be opened, or computed whole, is so once, by its method `rows`.
    """
    opened: Callable[[], AbstractContextManager[Rows]] | None = getattr(view, "rows", None)
    return nullcontext(view) if opened is None else opened()


def bits(tensor: Tensor) -> Tensor:
    """Return the same memory as integers, equal where all bits are: −0.0 is not 0.0, NaN equals itself."""
    return tensor.view(_BITS[tensor.dtype.itemsize])


def same_bits(one: View, other: View) -> bool:
    """Return whether two views hold the same elements, bit for bit.

    Reading stops at the first difference. Elements of two dtypes are compared in float64, which holds all
    that are stored but large int64 exactly. Quantised ones are not dequantised where their codes are the same
    (`same_codes`).

    Raises:
        OSError: a file is missing or too short.
    """
    if one.shape != other.shape:
        return False
    same_codes: Callable[[View], bool] | None = getattr(one, "same_codes", None)
    if one is other or (same_codes is not None and same_codes(other)):
        return True
    if isinstance(one, StoredView) and isinstance(other, StoredView) and _place(one) == _place(other):
        return True
    (n_rows, columns), size = one.matrix, _FIRST
    start = 0
    with open_rows(one) as ours, open_rows(other) as theirs:
        while start < n_rows:
            stop = min(n_rows, start + max(1, size // max(columns, 1)))
            if not _alike(ours.read(start, stop), theirs.read(start, stop)):
                return False
            start, size = stop, _CHUNK
    return True


def _place(view: StoredView) -> tuple[str, int, str, RowLayout]:
    # In the Hub's cache, files of two revisions may be links to one.
    return os.path.realpath(view.stored.path), view.stored.start, view.stored.dtype, view.layout


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype:
        one, other = one.to(torch.float64), other.to(torch.float64)
    return torch.equal(bits(one), bits(other))
