"""HQQ: whole numbers with a zero point between them, in groups of a weight that is reshaped for it.

The layout and the arithmetic are those of HQQ 0.2.8 (`Quantizer.dequantize` in `hqq/core/quantize.py`, and
`hqq/core/bitpack.py`, in github.com/mobiusml/hqq): a difference and a product, each rounded to the dtype that
was quantised. Each module stores its own settings as tensors; those of the configuration are not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from lazarus.errors import UnsupportedModelError
from lazarus.models.quantised.coded import CodedTensor, Precision, damaged
from lazarus.models.quantised.finding import FLOATS, Checkpoint
from lazarus.models.stored import StoredTensor

_PACKINGS = {
    "8bit_u8": (8, 1, torch.uint8),
    "4bit_u8": (4, 2, torch.uint8),
    "3bit_32": (3, 10, torch.int32),
    "2bit_u8": (2, 4, torch.uint8),
    "1bit_u8": (1, 8, torch.uint8),
}
"""the bits of a code, how many there are in a word, and the word"""
_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
_NEEDED = ("shape", "axis", "packing", "nbits", "compute_dtype")
_SETTINGS = (
    *_NEEDED,
    *("group_size", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "offload_meta"),
    *("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
)


@dataclass(frozen=True)
class HqqDecoder:
    """Decodes one weight: its elements, row after row, are a grid of other rows and columns."""

    bits: int
    packing: str
    columns: int
    grid: tuple[int, int]
    axis: int
    """along which axis of the grid elements have a scale in common"""
    dtype: torch.dtype

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        return Precision(
            f"hqq int{self.bits}", self.bits, (1, self.grid[1]) if self.axis else (self.grid[0], 1)
        )

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Tensor:
        """Return rows start to stop, in the dtype that was quantised."""
        width = self.grid[1]
        first, last = start * self.columns, stop * self.columns
        lines = torch.arange(first // width, -(-last // width), device=parts["codes"].device)
        scales, zeros = (parts[name].to(self.dtype) for name in ("scales", "zero points"))
        if self.axis:
            scales, zeros = scales[lines], zeros[lines]
        found = self._codes(parts["codes"], lines).to(self.dtype)
        found = found.sub_(zeros).mul_(scales).flatten()
        return found[first % width :][: last - first].view(-1, self.columns)

    def _codes(self, words: Tensor, lines: Tensor) -> Tensor:
        """Return some lines of the grid. The words of the first ones are those of lines further down too."""
        bits, per_word, word = _PACKINGS[self.packing]
        words = words.view(word)
        shifts = bits * (per_word - 1 - lines // len(words))
        return words[lines % len(words)] >> shifts[:, None].to(word) & ((1 << bits) - 1)


def find(checkpoint: Checkpoint) -> Iterator[CodedTensor]:
    """Yield the coded weights of an HQQ checkpoint.

    Raises:
        UnsupportedModelError: they are in a layout that is not decoded.
        WeightsError: a part of one is missing, or has a shape that does not fit.
    """
    for module in checkpoint.modules("W_q"):
        yield _coded(checkpoint, module)


def _coded(checkpoint: Checkpoint, module: str) -> CodedTensor:
    parts = {
        "codes": checkpoint.part(module, "W_q", ("U8", "I32", *FLOATS)),
        "scales": checkpoint.part(module, "scale", FLOATS),
        "zero points": checkpoint.part(module, "zero", FLOATS),
    }
    settings = {name: checkpoint.stored.get(f"{module}.{name}") for name in _SETTINGS}
    parts |= {name: stored for name, stored in settings.items() if stored is not None}
    key, path = f"{module}.weight", parts["codes"].path
    if missing := [name for name in _NEEDED if name not in parts]:
        raise damaged(path, key, f"its {missing[0]} is missing")
    packing, dtype = _text(parts["packing"]), _text(parts["compute_dtype"])
    if packing not in _PACKINGS or dtype not in _DTYPES:
        raise UnsupportedModelError(f"its codes are packed as {packing!r} of {dtype}, which is not decoded")
    shape, axis = tuple(int(n) for n in parts["shape"].read()), int(parts["axis"].read())
    grid = _grid(shape, axis, parts["scales"])
    _, per_word, word = _PACKINGS[packing]
    needed = -(-grid[0] // per_word) * grid[1] * word.itemsize
    fits = len(shape) == 2 and axis in (0, 1) and prod(grid) == prod(shape)
    if not fits or needed != parts["codes"].n_bytes or parts["zero points"].shape != parts["scales"].shape:
        told = ", ".join(f"{name} {list(parts[name].shape)}" for name in ("codes", "scales", "zero points"))
        weight = f"a weight of the shape {list(shape)} packed as {packing}"
        raise damaged(path, key, f"the shapes of its parts ({told}) do not fit {weight}")
    n_bits = ceil(float(parts["nbits"].read()))  # 1.58 bits are stored in 2
    decoder = HqqDecoder(n_bits, packing, shape[-1], grid, axis, getattr(torch, dtype.removeprefix("torch.")))
    return CodedTensor(key, shape, _DTYPES[dtype], parts, decoder)


def _grid(shape: tuple[int, ...], axis: int, scales: StoredTensor) -> tuple[int, int]:
    """Return the rows and columns of the grid in which each row (axis 1) or each column has one scale."""
    n_groups = max(prod(scales.shape), 1)
    size = prod(shape) // n_groups
    return (n_groups, size) if axis else (size, n_groups)


def _text(stored: StoredTensor) -> str:
    return bytes(stored.read().to(torch.uint8).numpy()).decode("ascii", "replace")
