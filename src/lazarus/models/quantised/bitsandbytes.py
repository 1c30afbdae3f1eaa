"""bitsandbytes: whole numbers with a scale for each row, or places in a table of 16 with one for each block.

Layouts and arithmetic follow bitsandbytes 0.50 (`functional.py`, `_ops.py` and `backends/default/ops.py` in
github.com/bitsandbytes-foundation/bitsandbytes): products in float32, rounded once. Weights of 8 bits stay in
float32, and are rounded to the dtype that the model runs in where they are put into it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lazarus.errors import UnsupportedModelError
from lazarus.foreign import decoded
from lazarus.models.quantised.coded import CodedTensor, Precision, damaged
from lazarus.models.quantised.finding import FLOATS, Checkpoint
from lazarus.models.stored import StoredTensor

_STATE = ".quant_state.bitsandbytes__"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_STORAGE = ("U8", "I8", *FLOATS)
"""the bytes of 4-bit codes may be stored as elements of any of these"""


@dataclass(frozen=True)
class Int8Decoder:
    """Decodes one weight of 8-bit whole numbers."""

    columns: int

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        return Precision("bitsandbytes int8", 8, (1, self.columns))

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Tensor:
        """Return rows start to stop, in float32."""
        # Two products, as upstream: a division by 127 has other bits.
        return parts["codes"][start:stop] * parts["scales"].view(-1, 1)[start:stop] * 7.874015718698502e-3


@dataclass(frozen=True)
class TableDecoder:
    """Decodes one weight of 4-bit codes; blocks run through its elements row after row."""

    kind: str
    columns: int
    block: int
    dtype: torch.dtype
    nested_block: int
    """how many scales have a scale in common; 0 where they are not quantised themselves"""
    offset: float

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        return Precision(f"bitsandbytes {self.kind}", 4, (1, self.block))

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Tensor:
        """Return rows start to stop, in the dtype that was quantised."""
        first, last = start * self.columns, stop * self.columns
        packed = parts["codes"].reshape(-1).view(torch.uint8)[first // 2 : -(-last // 2)]
        # The upper half of a byte comes first.
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[first % 2 :][: last - first]
        block = first // self.block
        scales = self._scales(parts, block, -(-last // self.block)).repeat_interleave(self.block)
        found = parts["table"][codes.to(torch.int32)]
        found *= scales[first - block * self.block :][: last - first]
        return found.to(self.dtype).view(-1, self.columns)

    def _scales(self, parts: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
        scales = parts["scales"][start:stop]
        if not self.nested_block:
            return scales.to(torch.float32)
        outer = torch.arange(start, stop, device=scales.device) // self.nested_block
        found = parts["scales' table"][scales.to(torch.int32)] * parts["scales' scales"][outer]
        return found + torch.tensor(self.offset, device=scales.device)


def find(checkpoint: Checkpoint) -> Iterator[CodedTensor]:
    """Yield the coded weights of a bitsandbytes checkpoint.

    Raises:
        UnsupportedModelError: they are in a layout that is not decoded.
        WeightsError: a part of one is missing, or has a shape that does not fit.
    """
    for module in checkpoint.modules("SCB"):
        yield _int8(checkpoint, module)
    for key in checkpoint.stored:
        weight, found, kind = key.partition(_STATE)
        if found:
            yield _table(checkpoint, weight, kind)


def _int8(checkpoint: Checkpoint, module: str) -> CodedTensor:
    codes = checkpoint.part(module, "weight", ("I8",))
    scales = checkpoint.part(module, "SCB", ("F32",))
    parts, key = {"codes": codes, "scales": scales}, f"{module}.weight"
    layout = checkpoint.optional(module, "weight_format", ("U8",))
    if layout is not None:
        parts["layout"] = layout
        if int(layout.read()):
            raise UnsupportedModelError(
                f"the 8-bit codes of {key} are laid out for one kind of GPU (weight_format "
                f"{int(layout.read())}), which is not decoded"
            )
    if len(codes.shape) != 2 or prod(scales.shape) != codes.shape[0]:
        why = f"its SCB has the shape {list(scales.shape)}, and its codes {list(codes.shape)}"
        raise damaged(codes.path, key, why)
    return CodedTensor(key, codes.shape, "F32", parts, Int8Decoder(codes.shape[1]))


def _table(checkpoint: Checkpoint, key: str, kind: str) -> CodedTensor:
    module, _, name = key.rpartition(".")
    state = _state(checkpoint.stored[f"{key}{_STATE}{kind}"], key)
    is_nested = "nested_blocksize" in state
    parts = {
        "codes": checkpoint.part(module, name, _STORAGE),
        "scales": checkpoint.part(module, f"{name}.absmax", ("U8",) if is_nested else FLOATS),
        "table": checkpoint.part(module, f"{name}.quant_map", ("F32",)),
        "state": checkpoint.stored[f"{key}{_STATE}{kind}"],
    }
    try:
        shape = tuple(int(n) for n in state["shape"])
        block, nested = int(state["blocksize"]), int(state["nested_blocksize"]) if is_nested else 0
        dtype, offset = _DTYPES[state["dtype"]], float(state["nested_offset"]) if is_nested else 0.0
        n_blocks = -(-prod(shape) // block)
        needed = {"codes": -(-prod(shape) // 2), "scales": n_blocks, "table": 16}
        if is_nested:
            parts["scales' scales"] = checkpoint.part(module, f"{name}.nested_absmax", ("F32",))
            parts["scales' table"] = checkpoint.part(module, f"{name}.nested_quant_map", ("F32",))
            needed |= {"scales' scales": -(-n_blocks // nested), "scales' table": 256}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        why = f"its quant_state ({json.dumps(state)}) does not say how it is quantised"
        raise damaged(parts["codes"].path, key, why) from error
    for name, number in needed.items():
        found = parts[name].n_bytes if name == "codes" else prod(parts[name].shape)
        if found != number:
            weight = f"a weight of the shape {list(shape)} in blocks of {block}"
            why = f"its {name} are {found}, and {weight} needs {number}"
            raise damaged(parts["codes"].path, key, why)
    decoder = TableDecoder(kind, shape[-1], block, getattr(torch, state["dtype"]), nested, offset)
    return CodedTensor(key, shape, dtype, parts, decoder)


def _state(stored: StoredTensor, key: str) -> dict[str, Any]:
    """Return what the library stores of a quantisation beside tensors: JSON in a tensor of bytes.

    Raises:
        WeightsError: it is no JSON.
    """
    try:
        found: dict[str, Any] = decoded(bytes(stored.read().numpy()))
    except ValueError as error:
        raise damaged(stored.path, key, "its quant_state is no JSON") from error
    return found
