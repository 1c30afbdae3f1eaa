"""The tensors of a GGUF model as they are loaded, dequantised a few rows or a tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lazarus.models.gguf.parts import Gguf
from lazarus.models.gguf.tensors import SETTINGS, translate
from lazarus.models.quantised import Precision
from lazarus.names.parts import Take, as_matrix
from lazarus.weights.views import MemoryView, Rows, View

_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps\.weight")
_PLAIN = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""the ggml types that are dtypes of torch too"""
_WIDTHS = {
    **dict.fromkeys(("Q2_K", "Q3_K", "Q6_K", "IQ1_M", "IQ2_S", "IQ2_XS", "NVFP4"), 16),
    **dict.fromkeys(("Q4_K", "Q5_K", "IQ1_S", "IQ2_XXS", "IQ3_S", "IQ3_XXS", "IQ4_XS"), 32),
}
"""columns that have one scale, where that is not the whole block (llama.cpp, ggml/src/ggml-common.h)"""
_N_BYTES = 2**22
"""how much of two tensors is compared at once"""
_KEPT = 2
"""Whole tensors that are kept beside those that are being read."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, or one expert of a stack."""

    key: str
    path: str
    """what it is called in the model, or would be if it were a parameter of its own"""
    target: str
    """the model's parameter that it makes, or a part of it"""
    expert: int | None
    view: View


class GgufFile:
    """The tensors of one model, by the names that they have in the empty `model`."""

    def __init__(self, file: Gguf, model: PreTrainedModel) -> None:
        self._tensors = file.tensors
        self._translation = translate(file, model)
        # Several components may be parts of one tensor, which is then dequantised once for them.
        self.whole = lru_cache(maxsize=_KEPT)(self._whole)

    def tensors(self) -> Iterator[GgufTensor]:
        """Every tensor; of the stacks, every expert by itself."""
        for key, tensor in self._tensors.items():
            if SETTINGS.fullmatch(key):
                continue
            target = self._translation.target(key) or key
            stack = _EXPERTS.fullmatch(key)
            if stack is None:
                yield GgufTensor(key, target, target, None, self.view(key, None, None))
                continue
            module = target.removesuffix(".weight").rpartition(".")[0]
            for expert in range(tensor.shape[0]):
                # The name that a checkpoint has for one expert where it does not stack them.
                path = f"{module}.{expert}.{stack[1]}_proj.weight"
                yield GgufTensor(key, path, target, expert, self.view(key, expert, None))

    @property
    def rule(self) -> object:
        """Return what decides how transformers lays the tensors out."""
        return self._translation.rule

    def data(self, key: str, expert: int | None) -> NDArray[Any]:
        """Return what is stored of a tensor, or of one expert of a stack."""
        data = self._tensors[key].data()
        return data if expert is None else data[expert]

    def view(self, key: str, expert: int | None, take: Take | None) -> View:
        """A tensor, one expert of a stack, or a part of either."""
        rows = _GgufRows(self.data(key, expert), self._tensors[key].kind)
        change = "nothing" if expert is not None else self._translation.changes(key, rows.shape)
        if change == "nothing" and take is None:
            return rows
        return _WholeView(self, key, rows, take, expert, has_whole_blocks=change != "anything")

    def _whole(self, key: str, expert: int | None) -> Tensor:
        tensor = self._tensors[key]
        if expert is not None:
            return _GgufRows(self.data(key, expert), tensor.kind).everything()
        return torch.from_numpy(np.array(self._translation.processed(key, tensor.elements())))


@dataclass(frozen=True, eq=False)
class _GgufRows:
    """A tensor that is taken as it is, dequantised as many rows at a time as are read."""

    data: NDArray[Any]
    kind: Any

    @property
    def dtype(self) -> str:
        """Return the name of its stored dtype, or of its ggml type."""
        return _PLAIN.get(self.kind.name, str(self.kind.name))

    @property
    def precision(self) -> Precision | None:
        """Return how finely it is quantised; None of plain elements."""
        name = str(self.kind.name)
        bits = re.search(r"\d+", name)
        if self.data.dtype != np.uint8 or name in _PLAIN or bits is None:
            return None
        import gguf

        width = _WIDTHS.get(name) or gguf.GGML_QUANT_SIZES[self.kind][0]
        return Precision(name, int(bits[0]), (1, width))

    @property
    def has_whole_blocks(self) -> bool:
        """Return whether its rows are those of the codes."""
        return True

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Return what it is once it is dequantised."""
        # Codes, and bfloat16, are rows of bytes; no ggml type has unsigned bytes as its elements.
        if self.data.dtype != np.uint8:
            return self.data.shape
        import gguf

        return tuple(int(n) for n in gguf.quant_shape_from_byte_shape(self.data.shape, self.kind))

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns under which it is read."""
        return as_matrix(self.shape)

    def read(self, start: int, stop: int, /) -> Float32[Tensor, "rows columns"]:
        """Rows start to stop in float32."""
        if len(self.shape) < 2:
            return self.everything().reshape(-1, 1)[start:stop]
        rows = self.data.reshape(-1, self.data.shape[-1])[start:stop]
        return self._numbers(rows).reshape(stop - start, -1)

    def same_codes(self, other: object) -> bool:
        """Return whether the same codes are stored; if not, the elements may still be equal."""
        return isinstance(other, _GgufRows) and self.kind == other.kind and _same(self.data, other.data)

    def everything(self) -> Tensor:
        """The whole tensor in float32."""
        return self._numbers(self.data).reshape(self.shape)

    def _numbers(self, data: NDArray[Any]) -> Tensor:
        import gguf

        numbers = gguf.dequantize(np.ascontiguousarray(data), self.kind)
        return torch.from_numpy(np.array(numbers))  # a copy: what is mapped cannot be written to


@dataclass(frozen=True, eq=False)
class _WholeView:
    """A tensor that has to be dequantised whole, or a part of one; the file keeps the last few."""

    file: GgufFile
    key: str
    stored: _GgufRows
    take: Take | None
    expert: int | None
    has_whole_blocks: bool
    """whether its rows, before the take, are those of the codes in any order"""

    @property
    def dtype(self) -> str:
        """Return the name of its stored dtype, or of its ggml type."""
        return self.stored.dtype

    @property
    def precision(self) -> Precision | None:
        """Return how finely it is quantised; None of plain elements."""
        return self.stored.precision

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Return what it is, after the take."""
        return self._view().shape

    @cached_property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns under which it is read."""
        return self._view().matrix

    def read(self, start: int, stop: int, /) -> Float32[Tensor, "rows columns"]:
        """Rows start to stop in float32."""
        return self._view().read(start, stop)

    def same_codes(self, other: object) -> bool:
        """Return whether the same codes are stored, and the same is made of them.

        If not, the elements may still be equal.
        """
        return (
            isinstance(other, _WholeView)
            and (self.key, self.dtype, self.take) == (other.key, other.dtype, other.take)
            and self.file.rule == other.file.rule
            and _same(self.file.data(self.key, self.expert), other.file.data(other.key, other.expert))
        )

    def rows(self) -> AbstractContextManager[Rows]:
        """The rows of the tensor, which is in memory as long as they are read."""
        return nullcontext(self._view())

    def _view(self) -> MemoryView:
        return MemoryView(self.file.whole(self.key, self.expert), self.dtype, self.take)


def _same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Return whether two arrays hold the same, a few rows at a time."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    step = max(1, _N_BYTES * len(one) // max(one.nbytes, 1))
    parts = (slice(start, start + step) for start in range(0, len(one), step))
    # As bytes: codes may look like NaN, which is not equal to itself.
    return all(one[part].tobytes() == other[part].tobytes() for part in parts)
