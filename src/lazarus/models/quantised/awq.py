"""AWQ: whole numbers in words that run along the rows of a weight, which is stored transposed.

The layout and the arithmetic are those of `dequantize_gemm` in AutoAWQ 0.2.9 (`awq/utils/packing_utils.py` in
github.com/casper-hansen/AutoAWQ), and in gptqmodel 7.7, which has other bits than 4 too
(`quantization/awq/utils/packing_utils.py` in github.com/ModelCloud/GPTQModel). Kernels for GPUs round elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from lazarus.errors import UnsupportedModelError
from lazarus.models.quantised.blocks import Blocks
from lazarus.models.quantised.coded import CodedTensor, Precision, damaged
from lazarus.models.quantised.finding import FLOATS, Checkpoint
from lazarus.models.quantised.groups import Shapes, fitting
from lazarus.models.quantised.packing import unpack_words

_LAYOUTS = ("gemm", "exllama", "ipex")
"""versions of AutoAWQ that differ in what runs them; their files are the same"""
_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""where in a word each of 8 codes is"""


@dataclass(frozen=True)
class AwqDecoder:
    """Decodes one weight of an AWQ checkpoint."""

    method: str
    bits: int
    blocks: Blocks

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        return Precision(f"{self.method} int{self.bits}", self.bits, (1, self.blocks.width))

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Tensor:
        """Return rows start to stop, in the dtype of the scales."""
        codes = self._unpacked(parts["codes"], start, stop).contiguous()
        codes -= self.blocks.across(self._unpacked(parts["zero points"], start, stop))
        scales = parts["scales"][:, start:stop].T
        return codes.to(scales.dtype) * self.blocks.across(scales)

    def _unpacked(self, words: Tensor, start: int, stop: int) -> Tensor:
        """Return the numbers of some rows of the weight, which are columns here, [rows, columns]."""
        # 32 of them begin and end with a word, whatever their bits.
        first, last = start // 32, -(-stop // 32)
        words = words[:, first * self.bits : last * self.bits]
        codes = unpack_words(words, self.bits, words.shape[1] * 32 // self.bits)
        if self.bits == 4:
            codes = codes.view(len(codes), -1, 8)[:, :, _ORDER].flatten(1)
        return codes[:, start - 32 * first : stop - 32 * first].T


def find(checkpoint: Checkpoint) -> Iterator[CodedTensor]:
    """Yield the coded weights of an AWQ checkpoint.

    Raises:
        UnsupportedModelError: they are in a layout that is not decoded.
        WeightsError: a part of one is missing, or has a shape that does not fit.
    """
    settings = checkpoint.settings
    layout = str(settings.get("version") or settings.get("checkpoint_format") or "gemm").lower()
    if layout not in _LAYOUTS:
        raise UnsupportedModelError(
            f"its codes are laid out for the {layout} kernel, which is not decoded; gemm is"
        )
    for module in checkpoint.modules("qweight"):
        yield coded(checkpoint, module, "awq")


def coded(checkpoint: Checkpoint, module: str, method: str) -> CodedTensor:
    """Return one weight, with the shapes of its parts checked.

    Raises:
        WeightsError: a part of it is missing, or has a shape that does not fit.
    """
    parts = {
        "codes": checkpoint.part(module, "qweight", ("I32",)),
        "zero points": checkpoint.part(module, "qzeros", ("I32",)),
        "scales": checkpoint.part(module, "scales", FLOATS),
    }
    key = f"{module}.weight"
    try:
        bits, blocks = fitting(parts, checkpoint.settings, _blocks)
    except ValueError as error:
        raise damaged(parts["codes"].path, key, str(error)) from error
    shape = (blocks.rows, blocks.columns)
    return CodedTensor(key, shape, parts["scales"].dtype, parts, AwqDecoder(method, bits, blocks))


def _blocks(shapes: Shapes, bits: int, width: int | None) -> Blocks | None:
    """Return the groups of a weight with these parts, or None where the parts do not fit them."""
    blocks = Blocks.of((shapes["scales"][1], shapes["codes"][0]), 1, width)
    n_words, n_groups = -(-blocks.rows * bits // 32), blocks.grid[1]
    fits = (
        shapes["codes"][1] == n_words
        and shapes["scales"][0] == n_groups
        and shapes["zero points"] == (n_groups, n_words)
    )
    # 8 codes of 4 bits are out of order in their word, so it has to be full.
    return blocks if fits and (bits != 4 or blocks.rows % 8 == 0) else None
