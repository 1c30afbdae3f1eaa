"""AWQ: whole numbers in words that run along the rows of a weight, which is stored transposed (GEMM), or not.

The layout and the arithmetic are those of `dequantize_gemm` in AutoAWQ 0.2.9 (`awq/utils/packing_utils.py`
in github.com/casper-hansen/AutoAWQ), and in gptqmodel 7.7, which has other bits than 4 too
(`quantization/awq/utils/packing_utils.py` in github.com/ModelCloud/GPTQModel). Kernels for GPUs round
elsewhere, and GEMV has no others: it is packed by `awq/modules/linear/gemv.py`, and decoded as GEMM is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lazarus.errors import UnsupportedModelError
from lazarus.models.quantised.blocks import Blocks
from lazarus.models.quantised.coded import CodedTensor, Precision, damaged
from lazarus.models.quantised.finding import FLOATS, Checkpoint
from lazarus.models.quantised.groups import Shapes, fitting
from lazarus.models.quantised.packing import unpack_words

_TRANSPOSED = ("gemm", "exllama", "ipex")
"""versions of AutoAWQ that differ in what runs them; their files are the same"""
Order = Literal["interleaved", "in order", "rows"]
"""of codes along the rows of a weight; or rows, where a weight is not transposed"""
_INTERLEAVED = [0, 4, 1, 5, 2, 6, 3, 7]
"""where of 8 codes each is"""


@dataclass(frozen=True)
class AwqDecoder:
    """Decodes one weight of an AWQ checkpoint."""

    method: str
    bits: int
    blocks: Blocks
    order: Order

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        return Precision(f"{self.method} int{self.bits}", self.bits, (1, self.blocks.width))

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Tensor:
        """Return rows start to stop, in the dtype of the scales."""
        columns, groups = self.blocks.columns, self.blocks.grid[1]
        codes = self._unpacked(parts["codes"], start, stop, columns).contiguous()
        codes -= self.blocks.across(self._unpacked(parts["zero points"], start, stop, groups))
        scales = parts["scales"]
        scales = scales[start:stop, :groups] if self.order == "rows" else scales[:, start:stop].T
        return codes.to(scales.dtype) * self.blocks.across(scales)

    def _unpacked(self, words: Tensor, start: int, stop: int, n_codes: int) -> Tensor:
        """Return the first numbers of some rows of the weight, [rows, codes]."""
        if self.order == "rows":
            return unpack_words(words[start:stop], self.bits, n_codes)
        # 32 of them begin and end with a word, whatever their bits.
        first, last = start // 32, -(-stop // 32)
        words = words[:, first * self.bits : last * self.bits]
        codes = unpack_words(words, self.bits, words.shape[1] * 32 // self.bits)
        if self.order == "interleaved":
            codes = codes.view(len(codes), -1, 8)[:, :, _INTERLEAVED].flatten(1)
        return codes[:, start - 32 * first : stop - 32 * first].T


def find(checkpoint: Checkpoint) -> Iterator[CodedTensor]:
    """Yield the coded weights of an AWQ checkpoint.

    Raises:
        UnsupportedModelError: they are in a layout that is not decoded.
        WeightsError: a part of one is missing, or has a shape that does not fit.
    """
    settings = checkpoint.settings
    layout = str(settings.get("version") or settings.get("checkpoint_format") or "gemm").lower()
    layout = "llm-awq" if settings.get("backend") == "llm-awq" else layout
    if layout not in (*_TRANSPOSED, "gemv"):
        raise UnsupportedModelError(
            f"its codes are laid out for the {layout} kernel, which is not decoded; gemm and gemv are"
        )
    scaled = next((key for key in checkpoint.stored if key.endswith(".act.scales")), None)
    if scaled is not None:
        raise UnsupportedModelError(
            f"its activations are divided as it runs ({scaled}), which no unquantised model does"
        )
    for module in checkpoint.modules("qweight"):
        yield coded(checkpoint, module, "awq", by_rows=layout == "gemv")


def coded(checkpoint: Checkpoint, module: str, method: str, *, by_rows: bool = False) -> CodedTensor:
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
        bits, blocks = fitting(parts, checkpoint.settings, _blocks if by_rows else _transposed_blocks)
    except ValueError as error:
        raise damaged(parts["codes"].path, key, str(error)) from error
    # gptqmodel interleaves 4 bits alone, AutoRound all that it packs like this.
    is_by_auto_round = "auto-round" in (method, checkpoint.settings.get("provider"))
    order: Order = "interleaved" if bits == 4 or is_by_auto_round else "in order"
    decoder = AwqDecoder(method, bits, blocks, "rows" if by_rows else order)
    return CodedTensor(key, (blocks.rows, blocks.columns), parts["scales"].dtype, parts, decoder)


def _transposed_blocks(shapes: Shapes, bits: int, width: int | None) -> Blocks | None:
    """Return the groups of a weight with these parts, or None where the parts do not fit them."""
    blocks = Blocks.of((shapes["scales"][1], shapes["codes"][0]), 1, width)
    n_words, n_groups = -(-blocks.rows * bits // 32), blocks.grid[1]
    fits = (
        shapes["codes"][1] == n_words
        and shapes["scales"][0] == n_groups
        and shapes["zero points"] == (n_groups, n_words)
    )
    # Where codes are interleaved, it is 8 of them.
    return blocks if fits and blocks.rows % 8 == 0 else None


def _blocks(shapes: Shapes, bits: int, width: int | None) -> Blocks | None:
    """Return the groups of a weight that is not transposed; there may be room for more groups than it has."""
    n_rows, n_words = shapes["codes"]
    blocks = Blocks.of((n_rows, n_words * 32 // bits), 1, width)
    n_places = shapes["scales"][1]
    fits = (
        n_places >= blocks.grid[1]
        and shapes["scales"][0] == n_rows
        and shapes["zero points"] == (n_rows, n_places * bits // 32)
    )
    return blocks if fits and bits == 4 else None
