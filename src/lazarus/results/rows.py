"""One row a prompt and layer, held as columns: 20,000 prompts through 80 layers are 1.6 million rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, overload

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from lazarus.errors import ResultFileError

Layer = Annotated[int, Meta(ge=0, description="the block, counted from 0")]


class Record(Struct, frozen=True, forbid_unknown_fields=True):
    """The base of every record: immutable, and without a field that the schema does not know."""


class ResultRow(Record, frozen=True, kw_only=True):
    """One prompt at one layer: the mean over the prompt's compared tokens; null if none is finite."""

    prompt_index: int
    prompt: str
    layer: Layer
    cosine_similarity: float | None
    divergence: float | None
    relative_l2: float | None
    norm_ratio: float | None
    centered_cosine_similarity: float | None
    local_relative_l2: float | None = None
    local_cosine_similarity: float | None = None


class ResultRows(Sequence[ResultRow]):
    """The rows, prompt by prompt and layer by layer, held as columns of shape [prompts, layers].

    A value that could not be measured is NaN in a column and None in a row.
    """

    COLUMNS = (
        "cosine_similarity",
        "divergence",
        "relative_l2",
        "norm_ratio",
        "centered_cosine_similarity",
        "local_relative_l2",
        "local_cosine_similarity",
    )

    def __init__(self, prompts: Sequence[str], columns: Mapping[str, NDArray[np.float64]]) -> None:
        self.prompts = list(prompts)
        self.columns = dict(columns)
        first = next(iter(self.columns.values()))
        self.n_prompts: int = first.shape[0]
        self.n_layers: int = first.shape[1]

    def __len__(self) -> int:
        return self.n_prompts * self.n_layers

    @overload
    def __getitem__(self, index: int) -> ResultRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[ResultRow]: ...
    def __getitem__(self, index: int | slice) -> ResultRow | list[ResultRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        prompt, layer = divmod(index % len(self), self.n_layers)
        values = {name: finite_or_none(column[prompt, layer]) for name, column in self.columns.items()}
        return ResultRow(
            prompt_index=prompt,
            prompt=self.prompts[prompt],
            layer=layer,
            **{name: values.get(name) for name in self.COLUMNS},
        )

    def __iter__(self) -> Iterator[ResultRow]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ResultRows):
            return NotImplemented
        return self.prompts == other.prompts and all(
            np.array_equal(self.column(name), other.column(name), equal_nan=True) for name in self.COLUMNS
        )

    __hash__ = None  # type: ignore[assignment]

    def column(self, name: str) -> NDArray[np.float64]:
        """One metric for every prompt and layer, [prompts, layers]; NaN where not measured."""
        if name in self.columns:
            return self.columns[name]
        return np.full((self.n_prompts, self.n_layers), np.nan)

    @classmethod
    def from_rows(cls, rows: Sequence[ResultRow]) -> ResultRows:
        """Columns out of rows that were read from a file, which must be complete and in order."""
        n_layers = max((row.layer for row in rows), default=-1) + 1
        places = [(row.prompt_index, row.layer) for row in rows]
        if not rows or places != [divmod(i, n_layers) for i in range(len(rows))]:
            raise ResultFileError("results: the rows are not one a prompt and layer, in order")
        columns = {
            name: np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in cls.COLUMNS
        }
        shape = (len(rows) // n_layers, n_layers)
        return cls(
            [row.prompt for row in rows[::n_layers]],
            {name: column.reshape(shape) for name, column in columns.items()},
        )


def finite_or_none(value: float) -> float | None:
    """The value as a Python float, or None where it is NaN or infinite.

    >>> finite_or_none(0.5), finite_or_none(float("nan"))
    (0.5, None)
    """
    number = float(value)
    return number if np.isfinite(number) else None
