"""Tensors in a safetensors file, by NumPy: of known names and shapes, written in any order, read one by one.

The format: 8 bytes with the length of the header, little-endian; the header, JSON; the data, row by row.
NumPy has no bfloat16, so its bits are held as integers and widened to float32, which is exact.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lazarus.errors import RecordingError, SaveError

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
        """Return those of an array.

        Raises:
            TypeError: a recording holds no array of this dtype.
        """
        if isinstance(array, BFloat16Bits):
            return cls("BF16", array.bits.shape)
        if array.dtype.name not in _NAMES:
            raise TypeError(f"an array of {array.dtype}, and a recording holds {', '.join(_NAMES)}")
        return cls(_NAMES[array.dtype.name], array.shape)

    @classmethod
    def named(cls, dtype: str, shape: tuple[int, ...]) -> Spec:
        """Return that of a dtype by its name in NumPy and torch, such as `bfloat16`."""
        return cls(_NAMES[dtype], shape)

    @property
    def n_bytes(self) -> int:
        """The size of the data."""
        return prod(self.shape) * _HELD_AS[self.dtype].itemsize


class TensorWriter:
    """A file whose tensors are known beforehand and put in any order; it appears when it is whole."""

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        """Write the header, and take up the room on the disk.

        Raises:
            SaveError: the disk has no room.
        """
        self._path, self._part = path, path.with_name(path.name + PART)
        self._specs, self._starts, end = dict(specs), dict[str, int](), 0
        for name, spec in specs.items():
            self._starts[name] = end
            end += spec.n_bytes
        self._left = set(specs)
        header = _encoded_header(specs, self._starts)
        self._data = 8 + len(header)
        self.n_bytes = self._data + end
        try:
            # Open as long as this object: pieces come one by one.
            self._stream = self._part.open("w+b")
            self._stream.write(len(header).to_bytes(8, "little") + header)
            self._stream.truncate(self.n_bytes)
        except OSError as error:
            raise self._fault(error) from error

    def put(self, name: str, array: Array) -> None:
        """Write one tensor in its place.

        Raises:
            SaveError: the disk gave out.
            ValueError: it has another dtype or shape than was said.
        """
        spec = self._specs[name]
        if Spec.of(array) != spec:
            raise ValueError(f"{name}: {Spec.of(array)} where {spec} was announced")
        held = array.bits if isinstance(array, BFloat16Bits) else array
        if held.dtype.itemsize != _HELD_AS[spec.dtype].itemsize or held.dtype.name == "bfloat16":
            held = held.view(np.uint16)
        try:
            self._stream.seek(self._data + self._starts[name])
            self._stream.write(np.ascontiguousarray(held, _HELD_AS[spec.dtype]).data)
        except OSError as error:
            raise self._fault(error) from error
        self._left.discard(name)

    def close(self) -> None:
        """Make the file appear under its name.

        Raises:
            SaveError: the disk gave out.
            ValueError: a tensor was never put.
        """
        if self._left:
            raise ValueError(f"{self._path.name}: {min(self._left)} was not written")
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._part.replace(self._path)
        except OSError as error:
            raise self._fault(error) from error

    def discard(self) -> None:
        """Remove what was written."""
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
            f"{self._path}: cannot be written: {error.strerror or error}. It takes {self.n_bytes:,} bytes: "
            "make room, or record fewer tokens."
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
        """The dtype and shape of each tensor."""
        return {name: spec for name, (spec, _) in self._places.items()}

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor, in its dtype; bfloat16 as float32.

        Raises:
            RecordingError: the file has changed or cannot be read any more.
        """
        spec, start = self._places[name]
        held = _HELD_AS[spec.dtype]
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._data + start)
                found = np.fromfile(stream, held, prod(spec.shape))
        except OSError as error:
            raise self._fault(f"it cannot be read: {error.strerror or error}") from error
        if found.size != prod(spec.shape):
            raise self._fault("it was cut short while it was read")
        shaped = found.reshape(spec.shape)
        return widened(shaped) if spec.dtype == "BF16" else shaped

    def _entries(self, header: bytes) -> dict[str, tuple[Spec, int, int]]:
        try:
            found = json.loads(header)
            found.pop("__metadata__", None)
            return {name: _entry(entry) for name, entry in found.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._fault(f"its header is damaged: {error}") from error

    def _fault(self, why: str) -> RecordingError:
        return RecordingError(f"{self._path}: {why}. Record again, or copy the file again.")


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 as float32, from its bits: they are the upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _encoded_header(specs: Mapping[str, Spec], starts: Mapping[str, int]) -> bytes:
    header = {
        name: {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [starts[name], starts[name] + spec.n_bytes],
        }
        for name, spec in specs.items()
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # so that the data is aligned


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
