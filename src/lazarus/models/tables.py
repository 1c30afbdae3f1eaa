"""Embeddings that a run reads by token id: only the rows that it reads are in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from lazarus.models.faults import translated
from lazarus.models.stored import StoredTensor, read_rows

Place = tuple[nn.Module, str]
"""a module, and the name of a parameter in it"""

_ROWS_AT_ONCE = 4096


class Table:
    """One embedding of the whole size, on a CPU, whose rows are filled when they are asked for.

    Pages that were never written to take no memory. Whatever else holds the same parameter, such as a tied LM
    head, needs all rows: `hold` fills them, and `release` frees them again.
    """

    def __init__(self, stored: StoredTensor, dtype: torch.dtype) -> None:
        self.stored = stored
        self.dtype = dtype
        self.bytes_read = 0
        self._trees: list[Sequence[Place]] = []
        self._lock = Lock()
        self._n_holders = 0
        self._renew()

    def join(self, places: Sequence[Place]) -> None:
        """Put the table's parameter at these places of one model, whatever was there before."""
        self._trees.append(places)
        self._put(places)

    def fill(self, ids: Iterable[int]) -> None:
        """Read the rows of these token ids, less those that are there; ids beyond the table are left out.

        Raises:
            WeightsError: the file is gone, or has changed since its header was read.
        """
        with self._lock, translated(os.path.dirname(self.stored.path)):
            rows = sorted({i for i in ids if 0 <= i < len(self._weight)} - self._filled)
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                part = rows[start : start + _ROWS_AT_ONCE]
                self._weight[part] = read_rows(self.stored, part).to(self.dtype)
            self._filled.update(rows)
            self.bytes_read += len(rows) * (self.stored.n_bytes // len(self._weight))

    def is_weight(self, tensor: Tensor) -> bool:
        """Return whether a tensor is in the memory of this table."""
        return tensor.untyped_storage().data_ptr() == self._weight.untyped_storage().data_ptr()

    def hold(self) -> None:
        """Fill all rows, until `release` has been called as often."""
        self._n_holders += 1
        self.fill(range(len(self._weight)))

    def release(self) -> None:
        """Free all rows when nobody holds them any more; those that are read later are filled again."""
        self._n_holders -= 1
        if self._n_holders == 0:
            self._renew()

    def before_reading(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the embedding: fill the rows that it is about to read."""
        ids: Tensor = args[0] if args else kwargs["input"]
        self.fill(torch.unique(ids).tolist())

    def _renew(self) -> None:
        self._filled: set[int] = set()
        # New memory, since that of rows which were written to cannot be given back one by one.
        self._weight = torch.empty(self.stored.shape, dtype=self.dtype)
        for places in self._trees:
            self._put(places)

    def _put(self, places: Sequence[Place]) -> None:
        parameter = nn.Parameter(self._weight, requires_grad=False)
        for module, name in places:
            setattr(module, name, parameter)
