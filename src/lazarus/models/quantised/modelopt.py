"""NVIDIA ModelOpt: FP8, INT8, INT4, NVFP4, MXFP4 and MXFP8, as `export_hf_checkpoint` writes them.

Layouts are those of modelopt 0.47 (`export/quant_utils.py`, `export/unified_export_hf.py` in
github.com/NVIDIA/Model-Optimizer), and the arithmetic that of `quantization/qtensor/`: codes and scales of
8 bits are rounded to the dtype that the model runs in, and then multiplied in it. (vLLM keeps such scales
in float32.) The smaller floats are multiplied in float32, and rounded once.

INT4 is decoded like INT8, because no class of ModelOpt reads what it exports. `pre_quant_scale` (AWQ,
SmoothQuant) multiplies the inputs of a layer as it runs. Here it multiplies the columns of the decoded
weight, which is then rounded once more: the same function, and a weight that can be compared with one that
was never scaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from lazarus.errors import UnsupportedModelError
from lazarus.models.quantised.blocks import Blocks
from lazarus.models.quantised.coded import CodedTensor, Precision, damaged
from lazarus.models.quantised.finding import FLOATS, Checkpoint
from lazarus.models.quantised.packing import from_e2m1, from_e8m0, unpack_nibbles
from lazarus.models.stored import TORCH_DTYPES, StoredTensor

Kind = Literal["fp8", "int8", "int4", "nvfp4", "mxfp4", "mxfp8"]
_WIDTHS = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}
_FP8_BLOCK = 128
_SCALES = (*FLOATS, "F8_E4M3", "U8", "F8_E8M0")


@dataclass(frozen=True)
class ModelOptDecoder:
    """Decodes one weight of a ModelOpt checkpoint."""

    kind: Kind
    blocks: Blocks
    dtype: str
    """safetensors' name of the dtype in which the model runs"""
    down_rows: bool
    """whether two codes that are in one byte are of two rows, and not of two columns"""

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        bits = 4 if "4" in self.kind else 8
        return Precision(f"modelopt {self.kind}", bits, (self.blocks.height, self.blocks.width))

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Tensor:
        """Return rows start to stop, in the dtype in which the model runs."""
        dtype = TORCH_DTYPES[self.dtype]
        codes = self._codes(parts["codes"].flatten(0, -2), start, stop)
        scales = self.blocks.down(parts["scales"], start, stop)
        if self.kind in ("mxfp4", "mxfp8"):
            scales = from_e8m0(scales)
        elif self.kind == "nvfp4":
            scales = scales.to(torch.float32) * self.blocks.whole.down(parts["second scale"], start, stop)
        else:
            codes, scales = codes.to(dtype), scales.to(dtype)
        found = (codes * self.blocks.across(scales)).to(dtype)
        if (inputs := parts.get("pre_quant_scale")) is not None:
            found = (found.to(torch.float32) * inputs.to(torch.float32)).to(dtype)
        return found

    def _codes(self, stored: Tensor, start: int, stop: int) -> Tensor:
        if self.kind in ("fp8", "int8", "mxfp8"):
            return stored[start:stop].to(torch.float32)
        if self.down_rows:
            pairs = stored[start // 2 : -(-stop // 2)]
            rows = torch.stack((pairs & 15, pairs >> 4), dim=1).flatten(0, 1)
            codes = rows[start % 2 : start % 2 + stop - start]
        else:
            codes = unpack_nibbles(stored[start:stop])
        if self.kind == "int4":
            return (codes ^ 8).to(torch.float32) - 8
        # ModelOpt's table for NVFP4 has +0.0 for code 8, and for MXFP4 −0.0.
        return from_e2m1(codes) + 0.0 if self.kind == "nvfp4" else from_e2m1(codes)


def find(checkpoint: Checkpoint) -> Iterator[CodedTensor]:
    """Yield the coded weights of a ModelOpt checkpoint.

    Raises:
        UnsupportedModelError: they are in a form that is not decoded.
        WeightsError: a part of one is missing, or has a shape that does not fit.
    """
    for key, codes in checkpoint.stored.items():
        if "svdquant_lora" in key:
            raise UnsupportedModelError("its weights have low-rank parts (SVDQuant), which are not decoded")
        module, _, name = key.rpartition(".")
        if codes.dtype not in ("U8", "I8", "F8_E4M3") or len(codes.shape) not in (2, 3) or "_scale" in name:
            continue
        prefix = "" if name == "weight" else f"{name}_"
        if f"{module}.{prefix}weight_scale" in checkpoint.stored or name == "weight":
            yield _coded(checkpoint, key, codes, (module, prefix))


def _coded(checkpoint: Checkpoint, key: str, codes: StoredTensor, names: tuple[str, str]) -> CodedTensor:
    """Return one weight, with the shapes of its parts checked.

    `names` are its module, and what the names of its parts begin with.
    """
    module, prefix = names
    scales = checkpoint.part(module, f"{prefix}weight_scale", _SCALES)
    parts = {"codes": codes, "scales": scales}
    kind = _kind(codes, scales)
    if kind == "nvfp4":
        parts["second scale"] = checkpoint.part(module, f"{prefix}weight_scale_2", ("F32",))
    if (inputs := checkpoint.optional(module, f"{prefix}pre_quant_scale", FLOATS)) is not None:
        parts["pre_quant_scale"] = inputs
    try:
        if kind is None:
            raise ValueError(f"{scales.dtype} scales of {codes.dtype} codes are of no kind that is known")
        shape, blocks, down_rows = _layout(kind, codes.shape, scales.shape)
        if kind == "nvfp4" and prod(second := parts["second scale"].shape) != 1:
            blocks.whole.check("weight_scale_2", second)
        if inputs is not None and inputs.shape != shape[-1:]:
            raise ValueError(
                f"its pre_quant_scale has the shape {[*inputs.shape]}, and its rows have {shape[-1]} elements"
            )
    except ValueError as error:
        raise damaged(codes.path, key, str(error)) from error
    decoder = ModelOptDecoder(kind, blocks, checkpoint.dtype, down_rows)
    return CodedTensor(key, shape, checkpoint.dtype, parts, decoder)


def _kind(codes: StoredTensor, scales: StoredTensor) -> Kind | None:
    kinds: dict[tuple[str, str], Kind] = {
        ("U8", "F8_E4M3"): "nvfp4",
        ("U8", "U8"): "mxfp4",
        ("F8_E4M3", "U8"): "mxfp8",
        ("U8", "float"): "int4",
        ("F8_E4M3", "float"): "fp8",
        ("I8", "float"): "int8",
    }
    return kinds.get((codes.dtype, "float" if scales.dtype in FLOATS else scales.dtype))


def _layout(
    kind: Kind, codes: tuple[int, ...], scales: tuple[int, ...]
) -> tuple[tuple[int, ...], Blocks, bool]:
    """Return the shape of a weight, its blocks, and whether two codes in one byte are of two rows.

    Raises:
        ValueError: the scales do not fit the codes.
    """
    *stack, rows, columns = codes
    if kind == "int4":
        shape = (*stack, 2 * rows, columns)
        n_groups = scales[-1] if len(scales) == len(codes) else 1
        blocks = Blocks.of(shape, 1, -(-columns // max(n_groups, 1)))
    elif kind in ("fp8", "int8"):
        return codes, _scaled(codes, scales), False
    elif kind in ("nvfp4", "mxfp4") and stack and scales[-1] == columns:
        # Experts of Llama 4 and gpt-oss: their inputs come before their outputs, and are what is packed.
        shape = (*stack, 2 * rows, columns)
        blocks = Blocks.of(shape, _WIDTHS[kind], 1)
    else:
        shape = (*stack, rows, columns if kind == "mxfp8" else 2 * columns)
        blocks = Blocks.of(shape, 1, _WIDTHS[kind])
    blocks.check("weight_scale", scales)
    return shape, blocks, shape[-2] != rows


def _scaled(shape: tuple[int, ...], scales: tuple[int, ...]) -> Blocks:
    """Return the blocks of a weight of 8-bit codes, which its scales tell.

    Raises:
        ValueError: the scales do not fit the weight.
    """
    *stack, rows, columns = shape
    if prod(scales) == 1:
        return Blocks.of((prod(stack) * rows, columns), None, None)
    if len(scales) == 4 and scales[1::2] == (1, 1):
        # Blocks are axes of their own: [down, 1, across, 1].
        blocks, scales = Blocks.of(shape, _FP8_BLOCK, _FP8_BLOCK), scales[::2]
    elif stack and prod(scales) == prod(stack):
        blocks = Blocks.of(shape, None, None)
    elif stack and scales[-1] == columns != rows:
        blocks = Blocks.of(shape, None, 1)
    else:
        blocks = Blocks.of(shape, 1, None)
    blocks.check("weight_scale", scales)
    return blocks
