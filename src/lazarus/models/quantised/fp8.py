"""FP8 weights with a scale for each block, row or tensor, and the 4-bit experts that may be among them.

DeepSeek's format, which transformers writes too (`fp8`), its form with a scale for 32 columns (`mxfp8`),
and FBGEMM's with a scale for each output (`fbgemm_fp8`). The arithmetic is that of DeepSeek-V3's
`weight_dequant` (inference/kernel.py, github.com/deepseek-ai) and of transformers' `Fp8Dequantize`: the
product in float32. It is then rounded to the dtype that the model runs in. FBGEMM has no dequantisation;
its kernel multiplies the sums in float32 by the same scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lazarus.models.quantised.blocks import Blocks
from lazarus.models.quantised.coded import CodedTensor, Precision, damaged
from lazarus.models.quantised.finding import FLOATS, Checkpoint
from lazarus.models.quantised.packing import from_e2m1, from_e8m0, unpack_nibbles
from lazarus.models.stored import StoredTensor

_SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale")
"""what the scales are called, by who wrote the checkpoint"""
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_PACKED_WIDTH = 32
"""columns of 4-bit codes that have one scale in common: DeepSeek-V4's experts, two codes in each I8"""


@dataclass(frozen=True)
class Fp8Decoder:
    """Decodes one weight of 8-bit floats, or of 4-bit floats in pairs."""

    blocks: Blocks
    bits: int = 8

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        return Precision(f"fp{self.bits}", self.bits, (self.blocks.height, self.blocks.width))

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Tensor:
        """Return rows start to stop, in float32."""
        scales = self.blocks.down(parts["scales"], start, stop)
        is_exponent = scales.dtype in (torch.uint8, torch.float8_e8m0fnu)
        scales = from_e8m0(scales) if is_exponent else scales.to(torch.float32)
        codes = parts["codes"].flatten(0, -2)[start:stop]
        if self.bits == 4:
            values = from_e2m1(unpack_nibbles(codes.view(torch.uint8)))
        else:
            values = codes.to(torch.float32)
        return values * self.blocks.across(scales)


def find(checkpoint: Checkpoint) -> Iterator[CodedTensor]:
    """Yield the weights that are stored as 8-bit floats, or as pairs of 4-bit ones, with scales beside them.

    Raises:
        WeightsError: the scales of one are missing, or do not fit it.
    """
    for key, codes in checkpoint.stored.items():
        if codes.dtype in (*_FLOAT8, "I8") and len(codes.shape) in (2, 3):
            scales = _scales(checkpoint, key)
            if scales is not None:
                yield _coded(checkpoint, key, codes, scales)
            elif codes.dtype in _FLOAT8:
                raise damaged(codes.path, key, "its scales are missing")


def _scales(checkpoint: Checkpoint, key: str) -> StoredTensor | None:
    """Return the scales of a weight; of stacked experts they have its name with an ending."""
    module = key.rpartition(".")[0]
    names = [f"{module}.{name}" for name in _SCALES] if key.endswith(".weight") else []
    names += [f"{key}_scale_inv", f"{key}_scale"]
    return next((checkpoint.stored[name] for name in names if name in checkpoint.stored), None)


def _coded(checkpoint: Checkpoint, key: str, codes: StoredTensor, scales: StoredTensor) -> CodedTensor:
    if scales.dtype not in (*FLOATS, "U8", "F8_E8M0"):
        raise damaged(scales.path, key, f"its scales are stored in {scales.dtype}")
    bits = 4 if codes.dtype == "I8" else 8
    shape = (*codes.shape[:-1], codes.shape[-1] * 8 // bits)
    try:
        blocks = _blocks(checkpoint, shape, bits, scales.shape)
    except ValueError as error:
        raise damaged(codes.path, key, str(error)) from error
    return CodedTensor(key, shape, "F32", {"codes": codes, "scales": scales}, Fp8Decoder(blocks, bits))


def _blocks(checkpoint: Checkpoint, shape: tuple[int, ...], bits: int, scales: tuple[int, ...]) -> Blocks:
    """Return the blocks of a weight.

    Raises:
        ValueError: the scales do not fit them.
    """
    stack = shape[:-2]
    if stack and checkpoint.settings.get("quant_method") == "fbgemm_fp8":
        # Stored the other way round than a linear layer's, with the outputs last. The scales of the down
        # projections have the shape [experts, outputs, 1], and are of the outputs too (transformers'
        # integrations/fbgemm_fp8.py).
        blocks = Blocks.of(shape, None, 1)
        blocks.check("scale", (*scales[:-2], *sorted(scales[-2:])))
        return blocks
    block = checkpoint.settings.get("weight_block_size")
    if bits == 4:
        blocks = Blocks.of(shape, 1, _PACKED_WIDTH)
    elif prod(scales) == prod(stack):
        blocks = Blocks.of(shape, None, None)
    elif block:
        blocks = Blocks.of(shape, int(block[0]), int(block[1]))
    else:
        blocks = Blocks.of(shape, 1, None)
    blocks.check("scale", scales)
    return blocks
