"""The base of all result classes: they save themselves, are read back, and tell their notes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from lazarus.errors import MissingPackageError, ResultFileError
from lazarus.foreign import read_bytes
from lazarus.render import save
from lazarus.results import read_json
from lazarus.results.anonymous import anonymised

if TYPE_CHECKING:
    import pandas


class Record(Protocol):
    """The fields that every command's record has."""

    @property
    def command(self) -> str:
        """Return the command that it is a result of."""

    @property
    def notes(self) -> list[str]:
        """Return what was left out, what was assumed, what could not be measured."""

    @property
    def note_codes(self) -> list[str]:
        """Return each note's code; none in a result that an older version saved."""


R = TypeVar("R", bound=Record)


class Result(Generic[R]):
    """Base of the result classes; `record` is the whole result as plain data."""

    kind: ClassVar[type[Any]]
    """the class of its record"""
    has_gates: ClassVar[bool] = False
    """whether it has a threshold, and gates that `show` holds it against"""

    vectors: Mapping[str, NDArray[np.float32]] | None = None
    """arrays by the names of their tensors, which stand in no record; None where there are none"""

    def __init__(self, record: R) -> None:
        self.record = anonymised(record) if _is_anonymous(record) else record

    @property
    def notes(self) -> list[str]:
        """Return what was left out, what was assumed, what could not be measured."""
        return self.record.notes

    @property
    def note_codes(self) -> list[str]:
        """Return each note's code, one of `lazarus.notes.CODES`; none in a result of an older version."""
        return self.record.note_codes

    def save(self, path: str | Path) -> list[str]:
        """Write the result; the suffix names the format, and any other is JSON.

        Each file is written beside its target and renamed, so that nobody reads half of it. Returns the
        files: the one that was named, and before it the rows (`NAME.rows.parquet`) that a page of very many
        prompts leaves out.

        Raises:
            OutputError: the format or the place cannot be written, or the result has nothing to write in it.
            SaveError: the disk gave out on the way; an older file is left as it was.
        """
        save.check_output(str(path), self.record.command)
        return save.save(self.record, str(path), self.vectors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read back what was saved as JSON.

        Raises:
            ResultFileError: it cannot be read, or is no result of this command and schema version.
        """
        record = read_record(path)
        if not isinstance(record, cls.kind):
            raise ResultFileError(
                f"{path}: a result of {record.command}, which is no {cls.__name__}. Use lazarus.load_result."
            )
        return cls(record)


def _is_anonymous(record: Any) -> bool:
    """Return whether the run was asked to leave paths out; a record without settings was not."""
    return bool(getattr(getattr(record, "settings", None), "anonymous", False))


def read_record(path: str | Path) -> Any:
    """The record in a file that was saved as JSON.

    Raises:
        ResultFileError: it cannot be read, or is no result of this schema version.
    """
    text = read_bytes(path, ResultFileError, "Check the path.", None, may_be_piped=True)
    try:
        return read_json(text)
    except ResultFileError as error:
        raise ResultFileError(f"{path}: {error.marked}") from error


def data_frame(columns: Mapping[str, Any]) -> pandas.DataFrame:
    """Columns as a data frame.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingPackageError(
            "to_pandas needs the package pandas. Install it with `pip install 'lazarus-introspect[pandas]'`."
        ) from error
    return pandas.DataFrame(columns)
