"""The header of one GGUF file: its metadata, and where each of its tensors is.

It is read here because the package gguf makes an array of every token of the vocabulary, which takes seconds.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lazarus.bounds import MOST_ENTRIES, MOST_STRINGS, exceeds
from lazarus.errors import UnsupportedModelError, WeightsError
from lazarus.models.files import Identity, same_file

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32 = 6
_LONGEST = 4096
_DIMENSIONS = 4
"""of a tensor, at most: as ggml has them"""
_ALIGNMENT = 32


@dataclass(frozen=True)
class Array:
    """A metadata array that is too long to be a setting, such as a vocabulary: its length is kept."""

    length: int


@dataclass(frozen=True)
class StoredArray:
    """Place of one tensor in the file: `shape` has the rows first, `start` is a byte offset."""

    kind: Any
    """gguf's GGMLQuantizationType"""
    shape: tuple[int, ...]
    start: int
    n_bytes: int
    path: str = field(repr=False, compare=False)
    identity: Identity = field(repr=False, compare=False)
    """of the file, when its header was read"""

    def data(self) -> NDArray[Any]:
        """Return what is stored: elements where numpy has their dtype, else rows of bytes.

        It is read and not mapped: a mapped file that is cut short kills the process that looks at it.

        Raises:
            OSError: the file is missing or too short, or has changed.
        """
        with open(self.path, "rb", buffering=0) as file:
            same_file(self.path, file.fileno(), self.identity)
            raw = np.fromfile(file, np.uint8, self.n_bytes, offset=self.start)
        if len(raw) < self.n_bytes:
            raise OSError(f"{self.path}: cut short")
        if (plain := _numpy_types().get(self.kind)) is not None:
            typed: NDArray[Any] = raw.view(plain)
            return typed.reshape(self.shape)
        import gguf

        rows: tuple[int, ...] = gguf.quant_shape_to_byte_shape(self.shape, self.kind)
        return raw.reshape(rows)

    def elements(self) -> NDArray[Any]:
        """Return the elements in float32."""
        import gguf

        found: NDArray[Any] = gguf.dequantize(self.data(), self.kind)
        return found


@dataclass(frozen=True)
class Header:
    """The metadata of one file by its keys, and its tensors by their names."""

    path: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredArray]


def read_header(name: str, path: str) -> Header:
    """Read the header of one file; `name` is what the user calls the model.

    Raises:
        WeightsError: it is no GGUF file, or is damaged.
        UnsupportedModelError: it is of a version, a byte order or a ggml type that is not read.
        OSError: it cannot be opened.
    """
    identity, file = Identity.of(path), Path(path).name
    name = name if name.endswith(file) else f"{name}: {file}"
    try:
        return _read(name, os.path.abspath(path), identity)
    except (ValueError, struct.error) as error:
        raise WeightsError(
            f"{name}: the weights cannot be read: {error}. The file is damaged or cut short: fetch it again."
        ) from error


@lru_cache(maxsize=64)
def _read(name: str, path: str, identity: Identity) -> Header:
    with Path(path).open("rb") as file:
        same_file(path, file.fileno(), identity)
        if file.read(4) != _MAGIC:
            raise WeightsError(
                f"{name}: not a GGUF file: it does not begin with `GGUF`. It is damaged, or another file "
                "under that name: fetch it again."
            )
        return _parse(name, path, _Bytes(file, identity.n_bytes), identity)


@dataclass
class _Bytes:
    """The bytes of a header, read from the front."""

    file: BinaryIO
    n_bytes: int
    place: int = 4

    def numbers(self, form: str) -> tuple[Any, ...]:
        """Read numbers in struct's `form`."""
        return struct.unpack(f"<{form}", self.skip(struct.calcsize(f"<{form}")))

    def text(self) -> str:
        """Read a string."""
        (length,) = self.numbers("Q")
        return str(self.skip(length), "utf-8")

    def skip(self, length: int) -> bytes:
        """Read so many bytes."""
        if self.place + length > self.n_bytes:
            raise ValueError(f"its header goes on after the last of its {self.n_bytes} bytes")
        self.place += length
        if len(found := self.file.read(length)) < length:
            raise ValueError("it was cut short while it was read")
        return found

    def value(self, kind: int) -> Any:
        """Read a value of metadata."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            kind, length = self.numbers("IQ")
            if kind == _ARRAY:
                raise ValueError("its metadata has an array of arrays")
            if length <= _LONGEST:
                return [self.value(kind) for _ in range(length)]
            if kind in _SCALARS:
                self.skip(length * struct.calcsize(f"<{_SCALARS[kind]}"))
            elif exceeds(length, MOST_STRINGS):
                raise ValueError(
                    f"its metadata has a list of {length} texts, and the limit is {MOST_STRINGS}"
                )
            # Strings have their lengths before them, so that they can only be skipped one by one.
            for _ in range(0 if kind in _SCALARS else length):
                self.value(kind)
            return Array(length)
        if kind not in _SCALARS:
            raise ValueError(f"its metadata has a value of the unknown type {kind}")
        (number,) = self.numbers(_SCALARS[kind])
        # What was 1e-05 before it was stored in float32 is 1e-05 again, and not 9.99999974e-06.
        return float(str(np.float32(number))) if kind == _FLOAT32 else number


def _parse(name: str, path: str, file: _Bytes, identity: Identity) -> Header:
    (version,) = file.numbers("I")
    # A small number whose bytes are in the other order has its low half empty.
    if version & 0xFFFF == 0:
        raise UnsupportedModelError(
            f"{name}: this file is big-endian, and transformers reads little-endian GGUF files. Convert a "
            "copy with `gguf-convert-endian FILE little`, of the package gguf."
        )
    if version not in _VERSIONS:
        raise UnsupportedModelError(
            f"{name}: this file is of GGUF's version {version}, and versions 2 and 3 are read. Convert the "
            "model again with a newer llama.cpp."
        )
    n_tensors, n_keys = file.numbers("QQ")
    if exceeds(max(n_tensors, n_keys), MOST_ENTRIES):
        raise ValueError(f"it has {n_tensors} tensors and {n_keys} keys, and the limit is {MOST_ENTRIES}")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = file.text()
        (kind,) = file.numbers("I")
        metadata[key] = file.value(kind)
    listed = _listed(file, n_tensors)
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"its general.alignment is {alignment!r}")
    # Offsets count from the end of the header, rounded up to the alignment.
    begin = -(-file.place // alignment) * alignment
    tensors = {}
    for tensor, (kind, shape, start) in listed.items():
        known, n_bytes = _type_of(name, tensor, kind, shape)
        if begin + start + n_bytes > file.n_bytes:
            raise ValueError(f"{tensor} ends at byte {begin + start + n_bytes}, the file at {file.n_bytes}")
        tensors[tensor] = StoredArray(known, shape, begin + start, n_bytes, path, identity)
    return Header(path, metadata, tensors)


def _listed(file: _Bytes, n_tensors: int) -> dict[str, tuple[int, tuple[int, ...], int]]:
    """Read the type, the shape and the start of each tensor."""
    listed: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        tensor = file.text()
        (n_dimensions,) = file.numbers("I")
        if n_dimensions > _DIMENSIONS:
            raise ValueError(f"a tensor of {n_dimensions} dimensions, and ggml has {_DIMENSIONS}")
        shape = file.numbers(f"{n_dimensions}Q")[::-1]  # ggml has the fastest dimension first
        kind, start = file.numbers("IQ")
        if tensor in listed:
            raise ValueError(f"it holds two tensors {tensor}")
        listed[tensor] = kind, shape, start
    return listed


def _type_of(name: str, tensor: str, kind: int, shape: tuple[int, ...]) -> tuple[Any, int]:
    """Return the ggml type of a tensor, and how many bytes it takes."""
    import gguf

    if kind not in {each.value for each in gguf.GGMLQuantizationType}:
        raise UnsupportedModelError(
            f"{name}: {tensor} is stored in ggml's type {kind}, which the package gguf here does not know. "
            "Upgrade gguf, or use a file of another type."
        )
    known = gguf.GGMLQuantizationType(kind)
    block, n_bytes = gguf.GGML_QUANT_SIZES[known]
    if shape and shape[-1] % block:
        raise ValueError(f"{tensor} has rows of {shape[-1]} elements, and {known.name} has blocks of {block}")
    return known, prod(shape) // block * n_bytes


@cache
def _numpy_types() -> dict[Any, Any]:
    import gguf

    names = {"F64": "f8", "F32": "f4", "F16": "f2", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8"}
    return {gguf.GGMLQuantizationType[name]: np.dtype(f"<{form}") for name, form in names.items()}
