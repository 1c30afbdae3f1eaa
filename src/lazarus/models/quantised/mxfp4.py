"""MXFP4 as gpt-oss stores it: stacked experts in 4-bit floats, with a power of two for 32 inputs.

`X_blocks`, [experts, outputs, groups, 16], has two codes in each byte, and `X_scales`, [experts, outputs,
groups], the exponents. The model's own parameter X has the inputs before the outputs. The arithmetic is
that of transformers' `convert_moe_packed_tensors` (integrations/mxfp4.py), in which exponent 255 is not
NaN, but 2^128.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lazarus.models.quantised.coded import CodedTensor, Precision, damaged
from lazarus.models.quantised.finding import Checkpoint
from lazarus.models.quantised.packing import from_e2m1, unpack_nibbles
from lazarus.models.stored import TORCH_DTYPES

_WIDTH = 32
"""inputs that have one scale in common"""


@dataclass(frozen=True)
class Mxfp4Decoder:
    """Decodes one stack of experts."""

    n_inputs: int
    dtype: str
    """safetensors' name of the dtype in which the model runs"""

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        return Precision("mxfp4", 4, (_WIDTH, 1))

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Tensor:
        """Return rows start to stop, which are inputs of the experts."""
        # A loop over experts, because the rows of each are columns of what is stored.
        return torch.cat(
            [
                self._of_expert(parts["codes"][expert], parts["scales"][expert], max(first, 0), last)
                for expert in range(start // self.n_inputs, -(-stop // self.n_inputs))
                for first, last in [(start - expert * self.n_inputs, stop - expert * self.n_inputs)]
            ]
        )

    def _of_expert(self, codes: Tensor, scales: Tensor, first: int, last: int) -> Tensor:
        groups = slice(first // _WIDTH, -(-min(last, self.n_inputs) // _WIDTH))
        values = from_e2m1(unpack_nibbles(codes[:, groups]))
        exponents = scales[:, groups, None].to(torch.int32) - 127
        rows = torch.ldexp(values, exponents).flatten(1).to(TORCH_DTYPES[self.dtype]).T
        return rows[first - groups.start * _WIDTH : last - groups.start * _WIDTH]


def find(checkpoint: Checkpoint) -> Iterator[CodedTensor]:
    """Yield the experts that are stored in blocks.

    Raises:
        WeightsError: the scales of one are missing, or do not fit its blocks.
    """
    for stored in checkpoint.stored:
        key = stored.removesuffix("_blocks")
        if key == stored:
            continue
        module, _, name = key.rpartition(".")
        codes = checkpoint.part(module, f"{name}_blocks", ("U8",))
        scales = checkpoint.part(module, f"{name}_scales", ("U8",))
        if len(codes.shape) != 4 or codes.shape[-1] * 2 != _WIDTH or codes.shape[:-1] != scales.shape:
            needed = "[experts, outputs, groups, 16] and [experts, outputs, groups]"
            why = (
                f"its blocks and scales have the shapes {[*codes.shape]} and {[*scales.shape]}, not {needed}"
            )
            raise damaged(codes.path, key, why)
        n_experts, n_outputs, n_groups, _ = codes.shape
        shape = (n_experts, n_groups * _WIDTH, n_outputs)
        parts = {"codes": codes, "scales": scales}
        yield CodedTensor(key, shape, checkpoint.dtype, parts, Mxfp4Decoder(shape[1], checkpoint.dtype))
