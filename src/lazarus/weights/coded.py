"""A quantised weight, decoded a few rows at a time, or a part of one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Shaped
from torch import Tensor

from lazarus.models.quantised import CodedTensor, Precision
from lazarus.names.parts import Take, as_matrix, part_of
from lazarus.weights.views import MemoryView, Rows


@dataclass(frozen=True, eq=False)
class CodedView:
    """A weight that is stored as codes, or a part of it."""

    coded: CodedTensor
    take: Take | None = None

    @property
    def dtype(self) -> str:
        """Return the name of its quantisation, such as `gptq int4`."""
        return self.precision.scheme

    @property
    def precision(self) -> Precision:
        """Return how finely it is quantised."""
        return self.coded.decoder.precision

    @property
    def has_whole_blocks(self) -> bool:
        """Return whether blocks of its elements are those that have one scale: a part may cut them."""
        return self.take is None or self.precision.block[0] == 1

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Return what it is once it is decoded, after the take."""
        return tuple(part_of(torch.empty(self.coded.shape, device="meta"), self.take).shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns under which it is read."""
        return as_matrix(self.shape)

    def read(self, start: int, stop: int, /) -> Shaped[Tensor, "rows columns"]:
        """Rows start to stop."""
        with self.rows() as rows:
            return rows.read(start, stop)

    def rows(self) -> AbstractContextManager[Rows]:
        """The rows, decoded as they are read; of a part the whole weight, which is in memory so long."""
        if self.take is None:
            return nullcontext(self.coded.open())
        return nullcontext(MemoryView(self.coded.read(), self.dtype, self.take))

    def same_codes(self, other: object) -> bool:
        """Return whether the same codes are stored, decoded the same way; if not, elements may be equal."""
        return isinstance(other, CodedView) and self.take == other.take and self.coded.same_codes(other.coded)
