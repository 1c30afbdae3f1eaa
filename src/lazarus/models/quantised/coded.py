"""A weight that is stored as codes: which stored tensors hold it, and how its elements come of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor

from lazarus.errors import WeightsError
from lazarus.models.stored import TORCH_DTYPES, StoredTensor, same_elements

_DECODED_BYTES = 2**24
"""how many bytes of a decoded weight are made at once"""


@dataclass(frozen=True)
class Precision:
    """Fineness of a weight's quantisation."""

    scheme: str
    """the method and the kind of its codes, such as `gptq int4`; ggml's name of the type, such as `Q4_K`"""
    bits: int
    block: tuple[int, int]
    """rows and columns that have one scale in common"""

    @property
    def is_integer(self) -> bool:
        """Return whether the codes are whole numbers, equally far apart."""
        return re.search(r"\bu?int\d|^Q\d", self.scheme) is not None


@runtime_checkable
class Decoder(Protocol):
    """Decodes one kind of codes. Equal decoders make the same elements of the same parts."""

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        ...

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Shaped[Tensor, "rows columns"]:
        """Return rows start to stop of the weight as a matrix, in the dtype that it is decoded to.

        Raises:
            ValueError: the parts contradict each other; the message says how.
        """
        ...


@dataclass(frozen=True)
class CodedTensor:
    """One weight that is stored as codes, under the key that it has where it is not quantised."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name of the dtype that it is decoded to"""
    parts: Mapping[str, StoredTensor] = field(hash=False)
    """the stored tensors that hold it, by what they are: codes, scales, …"""
    decoder: Decoder

    @property
    def path(self) -> str:
        """Return the file that holds its codes."""
        return next(iter(self.parts.values())).path

    @property
    def n_bytes(self) -> int:
        """Return the stored size of all its parts."""
        return sum(part.n_bytes for part in self.parts.values())

    def same_codes(self, other: CodedTensor) -> bool:
        """Return whether the same codes are stored, and decoded the same way; if not, elements may be equal.

        Raises:
            OSError: a file is gone, or was cut short since its header was read.
        """
        return (self.shape, self.decoder, self.parts.keys()) == (
            other.shape,
            other.decoder,
            other.parts.keys(),
        ) and all(same_elements(part, other.parts[name]) for name, part in self.parts.items())

    def open(self) -> Decoded:
        """Read its codes into memory, to be decoded a few rows at a time.

        Raises:
            OSError: a file is missing or too short.
        """
        return Decoded(self, {name: part.read() for name, part in self.parts.items()})

    def read(self) -> Tensor:
        """Return the whole weight.

        Raises:
            OSError: a file is missing or too short.
            WeightsError: its parts contradict each other.
        """
        found = torch.empty(self.shape, dtype=TORCH_DTYPES[self.dtype])
        if not found.numel():
            return found
        matrix, decoded = found.view(-1, self.shape[-1]), self.open()
        step = max(1, _DECODED_BYTES // matrix[0].nbytes)
        for start in range(0, len(matrix), step):
            stop = min(len(matrix), start + step)
            matrix[start:stop] = decoded.read(start, stop)
        return found


@dataclass(frozen=True, eq=False)
class Decoded:
    """The codes of one weight in memory."""

    coded: CodedTensor
    parts: Mapping[str, Tensor]

    def read(self, start: int, stop: int, /) -> Shaped[Tensor, "rows columns"]:
        """Return rows start to stop of the weight as a matrix.

        Raises:
            WeightsError: the parts contradict each other.
        """
        try:
            return self.coded.decoder.decode(self.parts, start, stop)
        except ValueError as error:
            raise damaged(self.coded.path, self.coded.key, str(error)) from error


def damaged(path: str, key: str, why: str) -> WeightsError:
    """Return an error on the codes of a weight that cannot be decoded."""
    return WeightsError(f"{path}: {key} cannot be decoded: {why}. Fetch the checkpoint again.")
