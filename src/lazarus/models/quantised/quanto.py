"""Quanto: 8-bit codes with a scale for each row.

The layout and the arithmetic are those of optimum-quanto 0.2.7 (`tensor/weights/qbytes.py` and
`tensor/qbytes.py` in github.com/huggingface/optimum-quanto). Codes of 4 and 2 bits are refused: they are
stored as a grid of groups, and the shape of their weight is that of the module alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from lazarus.errors import UnsupportedModelError
from lazarus.models.quantised.blocks import Blocks
from lazarus.models.quantised.coded import CodedTensor, Precision, damaged
from lazarus.models.quantised.finding import FLOATS, Checkpoint

_KINDS = {"I8": "int8", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}


@dataclass(frozen=True)
class QuantoDecoder:
    """Decodes one weight of a Quanto checkpoint."""

    kind: str
    blocks: Blocks

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        return Precision(f"quanto {self.kind}", 8, (self.blocks.height, self.blocks.width))

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Tensor:
        """Return rows start to stop, in the dtype of the scales."""
        scales = parts["scales"]
        codes = parts["codes"].reshape(-1, self.blocks.columns)[start:stop]
        return codes.to(scales.dtype) * self.blocks.spread(scales, start, stop)


def find(checkpoint: Checkpoint) -> Iterator[CodedTensor]:
    """Yield the coded weights of a Quanto checkpoint.

    Raises:
        UnsupportedModelError: they have codes of 4 or 2 bits.
        WeightsError: a part of one is missing, or has a shape that does not fit.
    """
    for key in checkpoint.stored:
        if key.endswith(".weight._data._data"):
            raise UnsupportedModelError(
                "its weights have codes of 4 or 2 bits (qint4 or qint2 of Quanto) in groups, and the shapes "
                "of the weights are not stored"
            )
    for key in checkpoint.modules("_data"):
        yield _coded(checkpoint, key)


def _coded(checkpoint: Checkpoint, key: str) -> CodedTensor:
    module, _, name = key.rpartition(".")
    codes = checkpoint.part(module, f"{name}._data", tuple(_KINDS))
    scales = checkpoint.part(module, f"{name}._scale", FLOATS)
    *stack, columns = codes.shape
    # The rows of a convolution are those of its kernels: all of one output have its scale.
    height = prod(stack[1:]) if scales.shape else prod(stack)
    blocks = Blocks.of((prod(stack), columns), height, None)
    if prod(scales.shape) != blocks.grid[0]:
        why = f"its _scale has the shape {list(scales.shape)}, and its codes {list(codes.shape)}"
        raise damaged(codes.path, key, why)
    decoder = QuantoDecoder(_KINDS[codes.dtype], blocks)
    return CodedTensor(key, codes.shape, scales.dtype, {"codes": codes, "scales": scales}, decoder)
