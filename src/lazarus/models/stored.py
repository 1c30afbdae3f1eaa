"""The tensors that safetensors files store: where each is, reading it, and whether two are the same."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lazarus.models.files import Identity, same_file

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    # No parameter of a model is made from these.
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_FLOATS = {"F64", "F32", "F16", "BF16"}
_PREFIX = 4096
_CHUNK = 2**22
"""how many bytes (elements, where two dtypes meet) are compared at first, and then at a time"""
_ALIGNMENT = 64


@dataclass(frozen=True)
class StoredTensor:
    """Place of one tensor in the file: `start` is a byte offset, `dtype` is safetensors' name."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int
    identity: Identity | None = field(default=None, repr=False, compare=False)
    """of the file, when its header was read; None where no file is meant"""

    def open(self) -> io.FileIO:
        """Open the file, unbuffered: bytes go straight into a tensor's memory.

        Raises:
            FileChangedError: it is not the file whose header was read.
            OSError: it is missing.
        """
        file = io.FileIO(self.path)
        try:
            same_file(self.path, file.fileno(), self.identity)
        except OSError:
            file.close()
            raise
        return file

    def read(self) -> Tensor:
        """Return the tensor in its stored dtype.

        It is read into memory of its own, because a view of a mapped file stays in memory for as long as
        the file is open. The memory has the same alignment as that view: kernels choose their path by it, and
        then sums differ in the last bit.

        Raises:
            OSError: the file is missing or too short, or has changed.
        """
        memory = torch.empty(self.n_bytes + 2 * _ALIGNMENT, dtype=torch.uint8)
        # A mapping begins at a page, so its view is aligned as `start` is.
        shift = (self.start - memory.data_ptr()) % _ALIGNMENT
        taken = memory[shift : shift + self.n_bytes]
        with self.open() as file:
            file.seek(self.start)
            _fill(memoryview(taken.numpy().data), file)
        return taken.view(TORCH_DTYPES[self.dtype]).view(self.shape)


def read_headers(files: Sequence[str]) -> dict[str, StoredTensor]:
    """Return every tensor of these files by its key; of two with one key, that of the later file.

    Raises:
        SafetensorError: a file is damaged or cut short.
        OSError: a file is missing, or is no file.
    """
    stored: dict[str, StoredTensor] = {}
    for path in files:
        identity = Identity.of(path)  # first: to open a pipe would wait for whoever writes to it
        # The header is read twice: safe_open checks it, but does not say at which byte a tensor begins.
        with safe_open(path, framework="pt"):  # it checks the header against the file
            pass
        with Path(path).open("rb") as file:
            same_file(path, file.fileno(), identity)
            n_header = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(n_header))
        for key, entry in header.items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                place = 8 + n_header + begin
                stored[key] = StoredTensor(path, entry["dtype"], shape, place, end - begin, identity)
    return stored


def same_elements(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors hold the same elements, bit for bit.

    Reading stops at the first difference. Elements of two floating-point dtypes are compared in a dtype that
    holds both exactly.

    Raises:
        OSError: a file is gone, or was cut short since its header was read.
    """
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        return _place(one) == _place(other) or _alike(one, other, (1, 1), bytes.__eq__)
    if not {one.dtype, other.dtype} <= _FLOATS:
        return False
    types = TORCH_DTYPES[one.dtype], TORCH_DTYPES[other.dtype]
    wider = torch.promote_types(*types)
    # Two of these four dtypes promote to float32 or float64, never to 16 bits. As integers, NaN equals NaN.
    bits = torch.int64 if wider.itemsize == 8 else torch.int32

    def widened(part: bytes, dtype: torch.dtype) -> Tensor:
        # A bytearray, because torch warns of a buffer that it cannot write to.
        return torch.frombuffer(bytearray(part), dtype=dtype).to(wider).view(bits)

    return _alike(
        one,
        other,
        (types[0].itemsize, types[1].itemsize),
        lambda ours, theirs: torch.equal(widened(ours, types[0]), widened(theirs, types[1])),
    )


def _place(stored: StoredTensor) -> tuple[str, int]:
    return os.path.realpath(stored.path), stored.start


def _alike(
    one: StoredTensor, other: StoredTensor, units: tuple[int, int], same: Callable[[bytes, bytes], bool]
) -> bool:
    """Return whether all parts of two tensors are the same, by `same`.

    `units` are the sizes in bytes of what both have the same number of: elements, or single bytes.
    """
    with one.open() as ours, other.open() as theirs:
        ours.seek(one.start)
        theirs.seek(other.start)
        left, size = one.n_bytes // units[0], _PREFIX
        while left:
            size = min(size, left)
            parts = _read(ours, size * units[0]), _read(theirs, size * units[1])
            for stored, part, unit in zip((one, other), parts, units, strict=True):
                if len(part) < size * unit:  # two files that end too soon are not the same for that
                    raise OSError(f"{stored.path}: cut short")
            if not same(*parts):
                return False
            left, size = left - size, _CHUNK
    return True


def _read(file: io.FileIO, n_bytes: int) -> bytes:
    """Return the next bytes; fewer where the file ends."""
    parts = []
    while n_bytes and (part := file.read(n_bytes)):
        parts.append(part)
        n_bytes -= len(part)
    return b"".join(parts)


def _fill(memory: memoryview, file: io.FileIO) -> None:
    """Read until the memory is full: one call of the system reads at most two gigabytes."""
    done = 0
    while done < len(memory):
        n_read = file.readinto(memory[done:])
        if not n_read:
            raise OSError(f"{file.name}: cut short")
        done += n_read


def read_rows(stored: StoredTensor, rows: Sequence[int]) -> Tensor:
    """Return some rows of a stored matrix, [rows, columns], in its stored dtype."""
    n_bytes = stored.n_bytes // stored.shape[0]
    taken = bytearray()
    with stored.open() as file:
        # Rows that follow each other have one difference to their index, and are read in one go.
        for _, run in groupby(enumerate(rows), key=lambda item: item[1] - item[0]):  # neighbours at once
            wanted = [row for _, row in run]
            file.seek(stored.start + wanted[0] * n_bytes)
            part = _read(file, len(wanted) * n_bytes)
            if len(part) < len(wanted) * n_bytes:
                raise OSError(f"{stored.path}: cut short")
            taken += part
    return torch.frombuffer(taken, dtype=TORCH_DTYPES[stored.dtype]).view(len(rows), *stored.shape[1:])
