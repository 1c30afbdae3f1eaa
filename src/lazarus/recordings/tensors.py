"""Tensors in a safetensors file, by NumPy: added in any order, and read one by one.

The format: 8 bytes with the length of the header, little-endian; the header, JSON; the data, row by row.
NumPy has no bfloat16, so its bits are held as integers and widened to float32, which is exact.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lazarus.errors import RecordingError, SaveError
from lazarus.foreign import decoded

_HELD_AS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
}
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"} | {
    "int64": "I64",
    "int32": "I32",
}
_MOST_HEADER_BYTES = 100_000_000
"""as safetensors has it"""
_ENTRY_BYTES = 192
"""the most that one tensor takes in a header: its name, its shape, and two offsets of 16 digits"""
PART = ".part"


@dataclass(frozen=True)
class BFloat16Bits:
    """An array of bfloat16 by its bits, for those who have no NumPy type for it."""

    bits: NDArray[np.uint16]


Array = NDArray[Any] | BFloat16Bits


@dataclass(frozen=True)
class Spec:
    """The dtype, as safetensors names it, and the shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: Array) -> Spec:
        """Return the dtype and the shape of an array.

        Raises:
            TypeError: a recording holds no array of this dtype.
        """
        if isinstance(array, BFloat16Bits):
            return cls("BF16", array.bits.shape)
        if array.dtype.name not in _NAMES:
            raise TypeError(f"an array of {array.dtype}, and a recording holds {', '.join(_NAMES)}")
        return cls(_NAMES[array.dtype.name], array.shape)

    @property
    def is_whole(self) -> bool:
        """Return whether it is of whole numbers."""
        return self.dtype in ("I64", "I32")

    @property
    def n_bytes(self) -> int:
        """Return the size of the data."""
        return prod(self.shape) * _HELD_AS[self.dtype].itemsize


class TensorWriter:
    """A file to which tensors are added in any order; it appears under its name when it is whole."""

    def __init__(self, path: Path, n_tensors: int) -> None:
        """Begin the file, with room in front for the header of so many tensors.

        Raises:
            SaveError: the disk has no room.
        """
        self._path, self._part = path, path.with_name(path.name + PART)
        self._places: dict[str, tuple[Spec, int]] = {}
        self._room = -(-n_tensors * _ENTRY_BYTES // 8) * 8 + 8  # data is aligned to 8 bytes
        self.n_bytes = 8 + self._room
        try:
            # Open as long as this object: tensors come one by one.
            self._stream = self._part.open("w+b")
            self._stream.seek(self.n_bytes)
        except OSError as error:
            raise self._fault(error) from error

    def put(self, name: str, array: Array) -> None:
        """Add one tensor.

        Raises:
            SaveError: the disk gave out.
            TypeError: a recording holds no array of this dtype.
        """
        spec = Spec.of(array)
        held = array.bits if isinstance(array, BFloat16Bits) else array
        if held.dtype.name == "bfloat16":
            held = held.view(np.uint16)
        try:
            self._stream.write(np.ascontiguousarray(held, _HELD_AS[spec.dtype]).data)
        except OSError as error:
            raise self._fault(error) from error
        self._places[name] = spec, self.n_bytes - 8 - self._room
        self.n_bytes += spec.n_bytes

    def close(self) -> None:
        """Write the header, and make the file appear.

        Raises:
            SaveError: the disk gave out.
        """
        header = _encoded_header(self._places)
        assert len(header) <= self._room, (len(header), self._room)
        try:
            self._stream.seek(0)
            self._stream.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._part.replace(self._path)
        except OSError as error:
            self.discard()
            raise self._fault(error) from error

    def discard(self) -> None:
        """Remove what was written."""
        # On a full disk the rest of the buffer cannot be written, and need not be.
        with suppress(OSError):
            self._stream.close()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _fault(self, error: OSError) -> SaveError:
        return SaveError(
            f"{self._path}: cannot be written: {error.strerror or error}. Make room there, or record fewer "
            "tokens."
        )


class TensorReader:
    """The tensors of a file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Read the header, and check that the data is all there and nothing else.

        Raises:
            RecordingError: the file is not there, was cut short, or its header is damaged.
        """
        self._path = path
        try:
            if path.exists() and not path.is_file():
                raise self._fault("it is no regular file, but a folder, a device or a pipe")
            with path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                length = int.from_bytes(stream.read(8), "little")
                if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                    raise self._fault(f"its header has {length:,} bytes, and the file {size:,}")
                header = stream.read(length)
        except OSError as error:
            raise self._fault(f"it cannot be read: {error.strerror or error}") from error
        self._data = 8 + length
        self._places: dict[str, tuple[Spec, int]] = {}
        end = 0
        for name, (spec, start, stop) in sorted(self._entries(header).items(), key=lambda item: item[1][1:]):
            if start != end or stop - start != spec.n_bytes:
                raise self._fault(f"its header is damaged at {name!r}: {spec} from byte {start} to {stop}")
            self._places[name] = spec, start
            end = stop
        if self._data + end != size:
            raise self._fault(f"its header asks for {self._data + end:,} bytes, and it has {size:,}")

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Return the dtype and the shape of each tensor."""
        return {name: spec for name, (spec, _) in self._places.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return one tensor, or its rows from `start` to `stop`, in its dtype; bfloat16 as float32.

        Raises:
            RecordingError: the file has changed or cannot be read any more.
        """
        spec, place = self._places[name]
        held, n_rows, width = _HELD_AS[spec.dtype], spec.shape[0], prod(spec.shape[1:])
        n_read = (n_rows if stop is None else stop) - start
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._data + place + start * width * held.itemsize)
                found = np.fromfile(stream, held, n_read * width)
        except OSError as error:
            raise self._fault(f"it cannot be read: {error.strerror or error}") from error
        if found.size != n_read * width:
            raise self._fault("it was cut short while it was read")
        shaped = found.reshape(n_read, *spec.shape[1:])
        return widened(shaped) if spec.dtype == "BF16" else shaped

    def _entries(self, header: bytes) -> dict[str, tuple[Spec, int, int]]:
        try:
            found = decoded(header)
            found.pop("__metadata__", None)
            return {name: _entry(entry) for name, entry in found.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._fault(f"its header is damaged: {error}") from error

    def _fault(self, why: str) -> RecordingError:
        return RecordingError(f"{self._path}: {why}. Record again, or copy the file again.")


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 as float32, from its bits: they are the upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _encoded_header(places: Mapping[str, tuple[Spec, int]]) -> bytes:
    header = {
        name: {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.n_bytes],
        }
        for name, (spec, start) in places.items()
    }
    return json.dumps(header, separators=(",", ":")).encode()


def _entry(entry: Mapping[str, Any]) -> tuple[Spec, int, int]:
    (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
    if entry["dtype"] not in _HELD_AS:
        raise ValueError(f"a tensor of {entry['dtype']!r}")
    numbers = (start, stop, *shape)
    if not all(
        isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers
    ):
        raise ValueError("a shape or an offset that is no number of elements")
    return Spec(entry["dtype"], shape), start, stop
