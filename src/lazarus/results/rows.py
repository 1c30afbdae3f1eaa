"""One row a prompt and layer, held as columns: 20,000 prompts through 80 layers are 1.6 million rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Annotated, Any, overload

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from lazarus.errors import ResultFileError

Layer = Annotated[int, Meta(ge=0, description="the block, counted from 0")]

_PROMPTS_AT_ONCE = 64
_OUT_OF_ORDER = "results: the rows are not one a prompt and layer, in order"
_ENCODER = msgspec.json.Encoder()


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
    nats: float | None = None


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
        "nats",
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
        """Return one metric for every prompt and layer, [prompts, layers]; NaN where not measured.

        Raises:
            ValueError: there is no such column.
        """
        if name not in self.COLUMNS:
            raise ValueError(f"no column {name!r}. The columns are {', '.join(self.COLUMNS)}.")
        if name in self.columns:
            return self.columns[name]
        return np.full((self.n_prompts, self.n_layers), np.nan)

    def encoded(self) -> Iterator[bytes]:
        """Yield each row as JSON, as msgspec encodes a `ResultRow`.

        The numbers of many rows are encoded at once: building the rows would take most of the time.
        """
        places = b",".join(b'"%b":%%b' % name.encode() for name in self.COLUMNS)
        row = b'%b,"layer":%d,' + places + b"}"
        for start in range(0, self.n_prompts, _PROMPTS_AT_ONCE):
            texts = self.prompts[start : start + _PROMPTS_AT_ONCE]
            columns = [self._encoded_column(name, start, len(texts)) for name in self.COLUMNS]
            heads = (
                b'{"prompt_index":%d,"prompt":%b' % (index, _ENCODER.encode(text))
                for index, text in enumerate(texts, start)
            )
            firsts = ((head, layer) for head in heads for layer in range(self.n_layers))
            for first, numbers in zip(firsts, zip(*columns, strict=True), strict=True):
                yield row % (*first, *numbers)

    def _encoded_column(self, name: str, start: int, n_prompts: int) -> Sequence[bytes]:
        if name not in self.columns:
            return [b"null"] * (n_prompts * self.n_layers)
        values = self.columns[name][start : start + n_prompts].ravel().tolist()
        return _ENCODER.encode(values)[1:-1].split(b",")

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[ResultRow]]) -> ResultRows:
        """Return the columns of rows that were read from a file; they come in parts.

        Raises:
            ResultFileError: they are not complete and in order.
        """
        prompts: list[str] = []
        places: list[list[NDArray[Any]]] = []
        columns: dict[str, list[NDArray[np.float64]]] = {name: [] for name in cls.COLUMNS}
        for part in rows:
            prompts += [row.prompt for row in part if row.layer == 0]
            try:
                places.append([_column(part, name, np.int64) for name in ("prompt_index", "layer")])
            except OverflowError as error:
                raise ResultFileError(_OUT_OF_ORDER) from error
            for name, found in columns.items():
                found.append(_column(part, name, np.float64))
        place = np.concatenate(places, axis=1) if places else np.zeros((2, 0), dtype=np.int64)
        n_rows, n_layers = place.shape[1], int(place[1].max(initial=-1)) + 1
        is_possible = 0 < n_layers <= n_rows and n_rows % n_layers == 0
        if not is_possible or not np.array_equal(place, np.divmod(np.arange(n_rows), n_layers)):
            raise ResultFileError(_OUT_OF_ORDER)
        shape = (n_rows // n_layers, n_layers)
        return cls(prompts, {name: np.concatenate(found).reshape(shape) for name, found in columns.items()})


def _column(rows: Sequence[ResultRow], name: str, dtype: type[np.generic]) -> NDArray[Any]:
    """Return one field of every row; NaN where it is None."""
    values = list(map(attrgetter(name), rows))
    n_none = values.count(None)
    if n_none == len(values):  # what was not measured at all
        return np.full(n_none, np.nan)
    return np.array(values, dtype) if n_none else np.fromiter(values, dtype, len(values))


def finite_or_none(value: float) -> float | None:
    """The value as a Python float, or None where it is NaN or infinite.

    >>> finite_or_none(0.5), finite_or_none(float("nan"))
    (0.5, None)
    """
    number = float(value)
    return number if np.isfinite(number) else None
