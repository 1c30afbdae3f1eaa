"""Scales of blocks: which rows and columns of a weight have one scale in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """A matrix of `rows` × `columns` in blocks of `height` × `width`; the last of each may be short.

    Of a stack of matrices it is each one; its rows are then counted through the stack.
    """

    rows: int
    columns: int
    height: int
    width: int
    stack: tuple[int, ...] = ()

    @classmethod
    def of(cls, shape: tuple[int, ...], height: int | None, width: int | None) -> Blocks:
        """Return the blocks of a matrix, or of a stack; None is all of its rows or columns."""
        *stack, rows, columns = shape
        return cls(rows, columns, height or max(rows, 1), width or max(columns, 1), tuple(stack))

    @property
    def grid(self) -> tuple[int, int]:
        """Return how many blocks there are in one matrix, down and across."""
        return -(-self.rows // self.height), -(-self.columns // self.width)

    @property
    def whole(self) -> Blocks:
        """Return the same matrix as one block."""
        return Blocks(self.rows, self.columns, max(self.rows, 1), max(self.columns, 1), self.stack)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that a tensor has one element for each block.

        Raises:
            ValueError: it has another shape.
        """
        n_down, n_across = self.grid
        grids = {(n_down, n_across), *_shorter(n_down, n_across)}
        if shape not in {(*self.stack, *grid) for grid in grids}:
            whole = " × ".join(str(n) for n in (*self.stack, self.rows, self.columns))
            raise ValueError(
                f"its {name} has the shape {list(shape)}, and a weight of {whole} in blocks of "
                f"{self.height} × {self.width} needs {[*self.stack, n_down, n_across]}"
            )

    def spread(
        self, each: Shaped[Tensor, "*grid"], start: int, stop: int, columns: Tensor | None = None
    ) -> Shaped[Tensor, "rows columns"]:
        """Return the element of its block for each element of rows start to stop.

        What is constant along an axis has the length 1 there. `columns` is the block of each column, where
        they do not follow each other.
        """
        return self.across(self.down(each, start, stop), columns)

    def down(self, each: Shaped[Tensor, "*grid"], start: int, stop: int) -> Shaped[Tensor, "rows across"]:
        """Return the elements of the blocks that rows start to stop are in, one for each block across.

        One row stands for all where they are the same.
        """
        n_down, n_across = self.grid
        grid = each.reshape(-1, n_across)
        if len(grid) == 1:
            return grid
        if self.height == 1:
            return grid[start:stop]
        rows = torch.arange(start, stop, device=grid.device)
        return grid[rows // self.rows * n_down + rows % self.rows // self.height]

    def across(
        self, each: Shaped[Tensor, "rows groups"], columns: Tensor | None = None
    ) -> Shaped[Tensor, "rows columns"]:
        """Return the element of its block for each column, of rows that have one for each block.

        One block across has the length 1. `columns` is the block of each column, where they do not follow
        each other.
        """
        if columns is not None:
            return each[:, columns]
        return each if self.grid[1] == 1 else each.repeat_interleave(self.width, dim=1)[:, : self.columns]


def _shorter(n_down: int, n_across: int) -> set[tuple[int, ...]]:
    """The shapes in which an axis of length 1 is left out."""
    return {
        *([(n_down,)] if n_across == 1 else []),
        *([(n_across,)] if n_down == 1 else []),
        *([()] if n_down == n_across == 1 else []),
    }
