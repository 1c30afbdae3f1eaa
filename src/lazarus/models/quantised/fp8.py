"""FP8 weights with a scale for each block, or one for all: DeepSeek's format, which transformers writes too.

The arithmetic is that of DeepSeek-V3's `weight_dequant` (inference/kernel.py, github.com/deepseek-ai) and of
transformers' `Fp8Dequantize`: the product in float32. It is then rounded to the dtype that the model runs in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lazarus.models.quantised.blocks import Blocks
from lazarus.models.quantised.coded import CodedTensor, Precision, damaged
from lazarus.models.quantised.finding import FLOATS, Checkpoint
from lazarus.models.quantised.packing import from_e8m0
from lazarus.models.stored import StoredTensor

_SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale")
"""what the scales are called, by who wrote the checkpoint"""


@dataclass(frozen=True)
class Fp8Decoder:
    """Decodes one weight of 8-bit floats."""

    blocks: Blocks

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        return Precision("fp8", 8, (self.blocks.height, self.blocks.width))

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Tensor:
        """Return rows start to stop, in float32."""
        scales = parts["scales"]
        if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
            scales = from_e8m0(scales)
        spread = self.blocks.spread(scales.to(torch.float32), start, stop)
        codes = parts["codes"].reshape(-1, self.blocks.columns)[start:stop]
        return codes.to(torch.float32) * spread


def find(checkpoint: Checkpoint) -> Iterator[CodedTensor]:
    """Yield the weights that are stored as 8-bit floats with scales beside them.

    Raises:
        WeightsError: the scales of one do not fit it.
    """
    for key, codes in checkpoint.stored.items():
        if codes.dtype in ("F8_E4M3", "F8_E5M2") and len(codes.shape) in (2, 3):
            scales = _scales(checkpoint, key)
            if scales is not None:
                yield _coded(checkpoint, key, codes, scales)


def _scales(checkpoint: Checkpoint, key: str) -> StoredTensor | None:
    """Return the scales of a weight; of stacked experts they have its name with an ending."""
    module = key.rpartition(".")[0]
    names = [f"{module}.{name}" for name in _SCALES] if key.endswith(".weight") else []
    names += [f"{key}_scale_inv", f"{key}_scale"]
    return next((checkpoint.stored[name] for name in names if name in checkpoint.stored), None)


def _coded(checkpoint: Checkpoint, key: str, codes: StoredTensor, scales: StoredTensor) -> CodedTensor:
    if scales.dtype not in (*FLOATS, "U8", "F8_E8M0"):
        raise damaged(scales.path, key, f"its scales are stored in {scales.dtype}")
    *stack, rows, columns = codes.shape
    block = checkpoint.settings.get("weight_block_size")
    n_scales = 1
    for n in scales.shape:
        n_scales *= n
    try:
        if n_scales == 1:
            blocks = Blocks.of((rows, columns), None, None)
        elif block:
            blocks = Blocks.of((rows, columns), int(block[0]), int(block[1]))
        else:
            blocks = Blocks.of((rows, columns), 1, None)
        if not stack:
            blocks.check("scale", scales.shape)
    except ValueError as error:
        raise damaged(codes.path, key, str(error)) from error
    return CodedTensor(key, codes.shape, "F32", {"codes": codes, "scales": scales}, Fp8Decoder(blocks))
