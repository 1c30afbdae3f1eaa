"""torchao, as transformers saves it in safetensors.

The header of a file says of each weight which class of torchao it is, with which settings; the
configuration does not describe what is stored. A weight `m.weight` is in `m._weight_qdata`,
`m._weight_scale`, and so on. Layouts and arithmetic are those of the classes of torchao 0.18
(`prototype/safetensors/`, `quantization/quantize_/workflows/` and `prototype/mx_formats/` in
github.com/pytorch/ao).

Two classes have no `dequantize()` there. Of `Int4Tensor` the sum is made in float32, and rounded once to
the dtype of the scales. `Int4TilePackedTo4dTensor` is decoded as by `_dequantize_affine_tinygemm`, where
the product and the sum are rounded; its codes are taken to lie as CUDA's kernel packs them (int4mm.cu in
github.com/pytorch/pytorch), because those of ROCm have the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from lazarus.errors import UnsupportedModelError
from lazarus.foreign import decoded
from lazarus.models.quantised.blocks import Blocks
from lazarus.models.quantised.coded import CodedTensor, Precision, damaged
from lazarus.models.quantised.finding import FLOATS, Checkpoint
from lazarus.models.quantised.packing import from_e2m1, from_e8m0, unpack_nibbles
from lazarus.models.stored import TORCH_DTYPES, StoredTensor

Kind = Literal[
    "Float8Tensor",
    "Int4TilePackedTo4dTensor",
    "Int4Tensor",
    "Int8Tensor",
    "IntxUnpackedToInt8Tensor",
    "MXTensor",
    "NVFP4Tensor",
]
_DTYPES: Mapping[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Float8Tensor": (("F8_E4M3", "F8_E5M2"), FLOATS),
    "Int4TilePackedTo4dTensor": (("I32",), FLOATS),
    "Int4Tensor": (("I8", "U8"), FLOATS),
    "Int8Tensor": (("I8",), FLOATS),
    "IntxUnpackedToInt8Tensor": (("I8",), FLOATS),
    "MXTensor": (("F8_E4M3", "F8_E5M2", "U8"), ("F8_E8M0",)),
    "NVFP4Tensor": (("U8",), ("F8_E4M3",)),
}
"""safetensors' names of the dtypes of codes and scales"""
_SAFETENSORS = {str(dtype).removeprefix("torch."): name for name, dtype in TORCH_DTYPES.items()}
_TILE = (8, 128)
"""rows and columns that lie together in `Int4TilePackedTo4dTensor`: for each of 32 threads, four words"""
_PADDED = 1024
"""what it rounds the number of columns up to a multiple of"""


@dataclass(frozen=True)
class TorchaoDecoder:
    """Decodes one weight of a torchao checkpoint."""

    kind: Kind
    codes: str
    """what a code is, with its bits, such as `int4`"""
    blocks: Blocks
    dtype: str
    """safetensors' name of the dtype that it is decoded to"""
    is_swizzled: bool = False
    """whether the scales lie in the order in which cuBLAS takes them"""

    @property
    def bits(self) -> int:
        """Return how many bits a code has."""
        return int(self.codes[-1])

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        return Precision(f"torchao {self.codes}", self.bits, (self.blocks.height, self.blocks.width))

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Tensor:
        """Return rows start to stop, in the dtype that torchao gives."""
        dtype = TORCH_DTYPES[self.dtype]
        scales, zeros = self._scales(parts, start, stop)
        values = self._values(parts["qdata"], start, stop)
        if self.kind in ("MXTensor", "Int4TilePackedTo4dTensor"):
            values, scales = values.to(dtype), scales.to(dtype)
        elif self.kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
            values = values.to(dtype)
            if zeros is not None:
                values = values - self.blocks.across(zeros).to(dtype)
        else:
            scales = scales.to(torch.float32)
        found = values * self.blocks.across(scales)
        if self.kind in ("Int4Tensor", "Int4TilePackedTo4dTensor") and zeros is not None:
            # A number that is added, and not a code that is taken away.
            found = found + self.blocks.across(zeros).to(found.dtype)
        return found.to(dtype)

    def _values(self, stored: Tensor, start: int, stop: int) -> Tensor:
        """Return what the codes of some rows stand for, in float32."""
        if self.kind == "Int4TilePackedTo4dTensor":
            return (self._from_tiles(stored, start, stop) - 8).to(torch.float32)
        codes = stored.flatten(0, -2)[start:stop]
        if self.kind == "Int4Tensor":
            return (unpack_nibbles(codes.view(torch.uint8)) ^ 8).to(torch.float32) - 8
        if codes.dtype == torch.uint8:
            return from_e2m1(unpack_nibbles(codes))
        if self.kind == "IntxUnpackedToInt8Tensor" and codes.numel():
            limit = 1 << (self.bits - 1)
            if int(codes.min()) < -limit or int(codes.max()) >= limit:
                raise ValueError(
                    f"its qdata has codes beyond {-limit} to {limit - 1}, which {self.codes} holds"
                )
        return codes.to(torch.float32)

    def _from_tiles(self, stored: Tensor, start: int, stop: int) -> Tensor:
        first = start // _TILE[0]
        words = stored[first : -(-stop // _TILE[0])]
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        # A thread has a row of eight and two of each eight columns. Its four words are 32 columns each; the
        # upper half of a word has the odd columns.
        codes = (words[..., None] >> shifts & 15).view(*words.shape[:2], 8, 4, 4, 2, 4)
        rows = codes.permute(0, 2, 1, 4, 6, 3, 5).reshape(len(words) * _TILE[0], -1)
        skipped = first * _TILE[0]
        return rows[start - skipped : stop - skipped, : self.blocks.columns]

    def _scales(self, parts: Mapping[str, Tensor], start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Return the scales and zero points of some rows, one for each block across."""
        if self.kind == "Int4TilePackedTo4dTensor":
            both = parts["scale_and_zero"][: self.blocks.grid[1], start:stop]
            return both[..., 0].T, both[..., 1].T
        scales, zeros = parts["scale"], parts.get("zero_point")
        if self.kind == "Int4Tensor":
            scales, zeros = scales.mT, parts["zero_point"].mT
        scales = self._swizzled(scales, start, stop) if self.is_swizzled else self._down(scales, start, stop)
        if self.kind == "MXTensor":
            scales = from_e8m0(scales.contiguous())
        elif (whole := parts.get("per_tensor_scale")) is not None:
            scales = self.blocks.whole.down(whole, start, stop) * scales.to(torch.float32)
        return scales, None if zeros is None else self._down(zeros, start, stop)

    def _down(self, each: Tensor, start: int, stop: int) -> Tensor:
        return self.blocks.down(each, start, stop)

    def _swizzled(self, scales: Tensor, start: int, stop: int) -> Tensor:
        """Return the scales of some rows out of tiles of 128 × 4, in which row r lies beside row r + 32."""
        n_across = self.blocks.grid[1]
        rows, groups = torch.arange(start, stop)[:, None], torch.arange(n_across)
        tiles = rows // 128 * -(-n_across // 4) + groups // 4
        return scales.flatten()[tiles * 512 + rows % 32 * 16 + rows % 128 // 32 * 4 + groups % 4]


def find(checkpoint: Checkpoint) -> Iterator[CodedTensor]:
    """Yield the weights that the headers of a checkpoint's files describe as tensors of torchao.

    Raises:
        UnsupportedModelError: one is of a class that is not decoded.
        WeightsError: one is not described, a part of it is missing, or has a shape that does not fit.
    """
    described = _described(checkpoint)
    for stored, tensor in checkpoint.stored.items():
        module, _, name = stored.rpartition(".")
        key = f"{module}.{name.removeprefix('_').removesuffix('_qdata')}"
        if name.startswith("_") and name.endswith("_qdata") and key not in described:
            raise damaged(tensor.path, key, "the header of its file does not say how it is stored")
    for key, description in described.items():
        yield _coded(checkpoint, key, description)


def _described(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """Return what the headers of the files say of each quantised weight."""
    found: dict[str, Mapping[str, Any]] = {}
    for path in dict.fromkeys(tensor.path for tensor in checkpoint.stored.values()):
        with safe_open(path, framework="pt") as file:
            header: Mapping[str, str] = file.metadata() or {}
        try:
            entries = {key: decoded(header[key]) for key in decoded(header.get("tensor_names", "[]"))}
            found |= {key: entry for key, entry in entries.items() if entry["_type"] != "Tensor"}
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path, "what its header describes", "that is not as torchao writes it") from error
    return found


def _coded(checkpoint: Checkpoint, key: str, description: Mapping[str, Any]) -> CodedTensor:
    """Return one weight, with the shapes of its parts checked."""
    kind, facts = description["_type"], description.get("_data") or {}
    if kind not in get_args(Kind):
        raise UnsupportedModelError(f"its weights are torchao's {kind}, which is not decoded")
    module, _, name = key.rpartition(".")
    if f"{module}._{name}_act_pre_scale" in checkpoint.stored:
        raise UnsupportedModelError(
            f"the inputs of its layers are scaled as it runs (act_pre_scale of torchao's {kind}), so its "
            "weights alone are not the model"
        )
    codes_dtypes, scale_dtypes = _DTYPES[kind]
    scale_name = "scale_and_zero" if kind == "Int4TilePackedTo4dTensor" else "scale"
    parts = {
        "qdata": checkpoint.part(module, f"_{name}_qdata", codes_dtypes),
        scale_name: checkpoint.part(module, f"_{name}_{scale_name}", scale_dtypes),
    }
    optional = {"zero_point": ("I8", "I32", *FLOATS), "per_tensor_scale": ("F32",)}
    for part, dtypes in optional.items():
        if (stored := checkpoint.optional(module, f"_{name}_{part}", dtypes)) is not None:
            parts[part] = stored
    if kind == "Int4Tensor":
        checkpoint.part(module, f"_{name}_zero_point", FLOATS)
    try:
        shape = _shape(kind, facts, parts["qdata"])
        decoder = _decoder(kind, facts, shape, parts)
        _check(decoder, shape, parts)
    except (ValueError, TypeError, KeyError) as error:
        why = (
            str(error) if type(error) is ValueError else f"the header of its file does not describe a {kind}"
        )
        raise damaged(parts["qdata"].path, key, why) from error
    return CodedTensor(key, shape, decoder.dtype, parts, decoder)


def _shape(kind: Kind, facts: Mapping[str, Any], codes: StoredTensor) -> tuple[int, ...]:
    if kind == "Int4TilePackedTo4dTensor":
        n_rows, n_columns = (int(n) for n in facts["shape"])
        needed = -(-n_rows // _TILE[0]), -(-n_columns // _PADDED) * _PADDED // _TILE[1], 32, 4
        if codes.shape != needed:
            raise ValueError(
                f"its qdata has the shape {[*codes.shape]}, and {n_rows} × {n_columns} codes need {[*needed]}"
            )
        return n_rows, n_columns
    is_paired = kind == "Int4Tensor" or codes.dtype == "U8"
    found = (*codes.shape[:-1], codes.shape[-1] * (2 if is_paired else 1))
    if len(found) < 2 or found != tuple(facts.get("shape", found)):
        raise ValueError(f"its qdata is of {[*found]} codes, and the header says {facts.get('shape')}")
    return found


def _decoder(
    kind: Kind, facts: Mapping[str, Any], shape: tuple[int, ...], parts: Mapping[str, StoredTensor]
) -> TorchaoDecoder:
    block = facts["block_size"]
    *above, height, width = [1, block] if isinstance(block, int) else block
    if any(n != 1 for n in above):
        raise ValueError(f"its block_size is {block}, and several matrices have one scale in common")
    blocks = Blocks.of(shape, int(height), int(width))
    dtypes = facts.get("dtype") or facts.get("orig_dtype")
    scales = parts.get("scale") or parts["scale_and_zero"]
    dtype = _SAFETENSORS[dtypes["_data"]] if dtypes else scales.dtype
    codes = {
        "Float8Tensor": "fp8",
        "Int8Tensor": "int8",
        "MXTensor": "mxfp4" if parts["qdata"].dtype == "U8" else "mxfp8",
        "NVFP4Tensor": "nvfp4",
    }.get(kind, "int4")
    if kind == "IntxUnpackedToInt8Tensor":
        codes = str(facts["target_dtype"]["_data"])
    return TorchaoDecoder(kind, codes, blocks, dtype, bool(facts.get("is_swizzled_scales")))


def _check(decoder: TorchaoDecoder, shape: tuple[int, ...], parts: Mapping[str, StoredTensor]) -> None:
    """Check that there is a scale for each block, and a zero point.

    Raises:
        ValueError: there is not.
    """
    blocks = decoder.blocks
    if decoder.kind == "Int4TilePackedTo4dTensor":
        rows, columns = (-(-n // unit) * unit for n, unit in zip(shape, (_TILE[0], _PADDED), strict=True))
        needed = columns // blocks.width, rows, 2
        if (found := parts["scale_and_zero"].shape) != needed:
            raise ValueError(f"its scale_and_zero has the shape {[*found]}, and not {[*needed]}")
        return
    grids = {name: parts[name].shape for name in ("scale", "zero_point") if name in parts}
    if decoder.kind == "Int4Tensor":
        grids = {name: (*grid[:-2], *grid[:-3:-1]) for name, grid in grids.items()}
    if "per_tensor_scale" in parts and prod(whole := parts["per_tensor_scale"].shape) != 1:
        blocks.whole.check("per_tensor_scale", whole)
    if decoder.is_swizzled:
        n_down, n_across = blocks.grid
        needed_bytes = -(-n_down // 128) * 128 * -(-n_across // 4) * 4
        if blocks.stack or prod(grids.pop("scale")) != needed_bytes:
            raise ValueError(f"its scales are not the {needed_bytes} of a matrix in tiles of 128 × 4")
    for name, grid in grids.items():
        blocks.check(name, grid)
