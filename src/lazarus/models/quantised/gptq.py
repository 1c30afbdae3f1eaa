"""GPTQ: whole numbers in words that run along the columns of a weight, which is stored transposed.

Layouts and arithmetic follow gptqmodel 7.7 (`nn_modules/qlinear/__init__.py`, `utils/model.py` and
`utils/planar_packing.py` in github.com/ModelCloud/GPTQModel) and AutoGPTQ 0.7.1
(`nn_modules/qlinear/qlinear_cuda.py` in github.com/AutoGPTQ/AutoGPTQ). A weight has the dtype of its scales,
as AutoGPTQ decodes it; gptqmodel would round scales in bfloat16 to float16 first.

Version 1 of the format stores each zero point less one, and writers differ in what they make of 0: gptqmodel
borrows from the next one in the word, or in 3 bits wraps around; AutoGPTQ spoils the rest of the word, and
its own reader takes that as it is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lazarus.errors import UnsupportedModelError
from lazarus.models.quantised.blocks import Blocks
from lazarus.models.quantised.coded import CodedTensor, Precision, damaged
from lazarus.models.quantised.finding import FLOATS, Checkpoint, Settings
from lazarus.models.quantised.groups import Shapes, fitting
from lazarus.models.quantised.packing import unpack_planes, unpack_words

Zeros = Literal["as they are", "borrowed", "borrowed from others", "wrapped", "less one"]
"""how zero points are stored: where each is stored less one, what its writer made of 0"""
_BORROWED = {2: (0x55555555,), 4: (0x11111111,), 8: (0x01010101,)}
"""a one in every place of a word"""
_BORROWED_FROM_OTHERS = (0x24924924, 0x92492492, 0x49249249)
"""what gptqmodel before 7.0 took off 3-bit zero points: of three words the first and last were mixed up"""


@dataclass(frozen=True)
class GptqDecoder:
    """Decodes one weight of a GPTQ checkpoint."""

    method: str
    bits: int
    blocks: Blocks
    is_planar: bool
    zeros: Zeros

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        return Precision(f"{self.method} int{self.bits}", self.bits, (1, self.blocks.width))

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Tensor:
        """Return rows start to stop, in the dtype of the scales."""
        groups = self._groups(parts.get("g_idx"))
        codes = self._unpacked(parts["codes"][:, start:stop].T.contiguous(), self.blocks.columns)
        zeros = self._zeros(parts["zero points"], start, stop)
        scales = parts["scales"][:, start:stop].T
        codes -= self.blocks.across(zeros, groups)
        return codes.to(scales.dtype) * self.blocks.across(scales, groups)

    def _unpacked(self, words: Tensor, n_codes: int) -> Tensor:
        return (unpack_planes if self.is_planar else unpack_words)(words, self.bits, n_codes)

    def _zeros(self, words: Tensor, start: int, stop: int) -> Tensor:
        """Return the zero points of some rows, [rows, groups]."""
        # 32 of them begin and end with a word, whatever their bits.
        first, last = start // 32, -(-stop // 32)
        words = words[:, first * self.bits : last * self.bits]
        if self.zeros.startswith("borrowed"):
            ones = _BORROWED[self.bits] if self.zeros == "borrowed" else _BORROWED_FROM_OTHERS
            each = torch.tensor(ones, device=words.device).repeat(-(-words.shape[1] // len(ones)))
            # Of 32 bits: the sum wraps around.
            words = words + each[: words.shape[1]].to(torch.int32)
        zeros = self._unpacked(words, stop - 32 * first)[:, start - 32 * first :]
        if self.zeros in ("wrapped", "less one"):
            zeros = zeros + 1
        return (zeros & ((1 << self.bits) - 1) if self.zeros == "wrapped" else zeros).T

    def _groups(self, g_idx: Tensor | None) -> Tensor | None:
        """Return the group of each column, or None where they follow each other.

        Some early writers left it at zero, and readers take that for no order (exllamav2, `ext.py`).
        """
        if g_idx is None or not bool(g_idx.any()):
            return None
        n_groups = self.blocks.grid[1]
        if bool((g_idx < 0).any()) or bool((g_idx >= n_groups).any()):
            raise ValueError(f"its g_idx names groups beyond the {n_groups} that there are")
        most = int(torch.bincount(g_idx).max())
        if most > self.blocks.width:
            raise ValueError(f"its g_idx has {most} columns in one group of {self.blocks.width}")
        return g_idx.to(torch.int64)


def find(checkpoint: Checkpoint) -> Iterator[CodedTensor]:
    """Yield the coded weights of a GPTQ checkpoint.

    Raises:
        UnsupportedModelError: they are in a layout that is not decoded.
        WeightsError: a part of one is missing, or has a shape that does not fit.
    """
    settings = checkpoint.settings
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    layout = "marlin" if settings.get("is_marlin_format") else layout
    if layout not in ("gptq", "gptq_v2", "gptq_p"):
        raise UnsupportedModelError(
            f"its codes are laid out for the {layout} kernel, which is not decoded; gptq, gptq_v2 and gptq_p "
            "are"
        )
    if settings.get("rotation"):
        raise UnsupportedModelError(
            f"its activations are rotated as it runs ({settings['rotation']}), so its weights alone are not "
            "the model"
        )
    for module in checkpoint.modules("qweight"):
        yield coded(checkpoint, module, "gptq", layout)


def coded(checkpoint: Checkpoint, module: str, method: str, layout: str) -> CodedTensor:
    """Return one weight, with the shapes of its parts checked.

    Raises:
        WeightsError: a part of it is missing, or has a shape that does not fit.
    """
    parts = {
        "codes": checkpoint.part(module, "qweight", ("I32",)),
        "zero points": checkpoint.part(module, "qzeros", ("I32",)),
        "scales": checkpoint.part(module, "scales", FLOATS),
    }
    g_idx = checkpoint.optional(module, "g_idx", ("I32", "I64"))
    parts |= {"g_idx": g_idx} if g_idx is not None else {}
    codes, key = parts["codes"], f"{module}.weight"
    try:
        bits, blocks = fitting(parts, checkpoint.settings, _blocks)
    except ValueError as error:
        raise damaged(codes.path, key, str(error)) from error
    # Of 2, 4 and 8 bits the planes are the codes.
    is_planar = layout == "gptq_p" and 32 % bits != 0
    zeros = _zeros(checkpoint.settings, bits) if layout == "gptq" else "as they are"
    decoder = GptqDecoder(method, bits, blocks, is_planar, zeros)
    return CodedTensor(key, (blocks.rows, blocks.columns), parts["scales"].dtype, parts, decoder)


def _blocks(shapes: Shapes, bits: int, width: int | None) -> Blocks | None:
    """Return the groups of a weight with these parts, or None where the parts do not fit them."""
    n_words, n_rows = shapes["codes"]
    n_columns = shapes["g_idx"][0] if "g_idx" in shapes else n_words * 32 // bits
    blocks = Blocks.of((n_rows, n_columns), 1, width)
    n_groups = blocks.grid[1]
    fits = (
        n_words == -(-n_columns * bits // 32)
        and shapes["scales"] == (n_groups, n_rows)
        and shapes["zero points"] == (n_groups, -(-n_rows * bits // 32))
    )
    return blocks if fits else None


def _zeros(settings: Settings, bits: int) -> Zeros:
    """Return how the writer of a checkpoint of version 1 stored zero points."""
    found = re.search(r"gptqmodel:(\d+)", str((settings.get("meta") or {}).get("quantizer")))
    if found is None or bits in (5, 6, 7):
        return "less one"
    if bits == 3:
        return "wrapped" if int(found[1]) >= 7 else "borrowed from others"
    return "borrowed"
