"""Scales of blocks: which rows and columns of a weight have one scale in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """A matrix of `rows` × `columns` in blocks of `height` × `width`; the last of each may be short."""

    rows: int
    columns: int
    height: int
    width: int

    @classmethod
    def of(cls, shape: tuple[int, ...], height: int | None, width: int | None) -> Blocks:
        """Return the blocks of a matrix; None is all of its rows or columns."""
        rows, columns = shape
        return cls(rows, columns, height or max(rows, 1), width or max(columns, 1))

    @property
    def grid(self) -> tuple[int, int]:
        """Return how many blocks there are, down and across."""
        return -(-self.rows // self.height), -(-self.columns // self.width)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that a tensor has one element for each block.

        Raises:
            ValueError: it has another shape.
        """
        n_down, n_across = self.grid
        if shape not in {(n_down, n_across), *_shorter(n_down, n_across)}:
            raise ValueError(
                f"its {name} has the shape {list(shape)}, and a weight of {self.rows} × {self.columns} in "
                f"blocks of {self.height} × {self.width} needs [{n_down}, {n_across}]"
            )

    def spread(
        self, each: Shaped[Tensor, "*grid"], start: int, stop: int, columns: Tensor | None = None
    ) -> Shaped[Tensor, "rows columns"]:
        """Return the element of its block for each element of rows start to stop.

        What is constant along an axis has the length 1 there. `columns` is the block of each column, where
        they do not follow each other.
        """
        grid = each.reshape(self.grid)
        if self.height == 1:
            grid = grid[start:stop]
        elif self.grid[0] > 1:
            grid = grid[torch.arange(start, stop, device=grid.device) // self.height]
        return self.across(grid, columns)

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
