"""Rows as CSV and Parquet, whichever command they are of."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import IO, Any, Literal

import numpy as np

Kind = Literal["int64", "float64", "string", "bool_"]
"""the names of Arrow's types"""

_FORMULAS = tuple("=+-@\t\r\uff1d\uff0b\uff0d\uff20")
"""how a cell begins that a spreadsheet takes for a formula (OWASP, CSV injection); four are full-width"""


def write_csv(columns: Mapping[str, Any], stream: IO[bytes]) -> None:
    """Write columns of one length, RFC 4180, in UTF-8; a value that there is none of, or NaN, is empty.

    An apostrophe stands before a text that a spreadsheet would run as a formula.
    """
    # UTF-8 has no bytes for half a surrogate pair, which is written out.
    text = io.TextIOWrapper(
        stream, encoding="utf-8", errors="backslashreplace", newline="", write_through=True
    )
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(map(_written, row) for row in zip(*columns.values(), strict=True))
    # The wrapper would close the stream, which is the caller's, when it is deleted.
    text.detach()


def write_parquet(columns: Mapping[str, Any], kinds: Mapping[str, Kind], stream: IO[bytes]) -> None:
    """Write the same as Parquet; an array has its own type, and of a list it is given in `kinds`."""
    import pyarrow
    from pyarrow import parquet

    arrays = {
        name: pyarrow.array(values, from_pandas=True)
        if isinstance(values, np.ndarray)
        else pyarrow.array([_encodable(value) for value in values], type=getattr(pyarrow, kinds[name])())
        for name, values in columns.items()
    }
    parquet.write_table(pyarrow.table(arrays), stream)


def _written(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULAS) else value
    # Only NaN is not equal to itself.
    return "" if value is None or value != value else value


def _encodable(value: Any) -> Any:
    """Half a surrogate has no place in UTF-8, and is written out."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
