"""compressed-tensors: the format of llm-compressor.

Layouts and arithmetic follow compressed-tensors 0.18 (`quantization/lifecycle/forward_helpers.py` and
`compressors/` in github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lazarus.errors import UnsupportedModelError
from lazarus.models.quantised.blocks import Blocks
from lazarus.models.quantised.coded import CodedTensor, Precision, damaged
from lazarus.models.quantised.finding import FLOATS, Checkpoint, Settings, matches
from lazarus.models.quantised.packing import from_e2m1, from_e2m3, from_e8m0, unpack_nibbles, unpack_words
from lazarus.models.stored import StoredTensor

Kind = Literal["packed", "plain", "nvfp4", "mxfp4", "mxfp6", "mxfp8"]
_KINDS: dict[str, Kind] = {
    "pack-quantized": "packed",
    "int-quantized": "plain",
    "float-quantized": "plain",
    "naive-quantized": "plain",
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
    "mxfp6-pack-quantized": "mxfp6",
    "mxfp8-quantized": "mxfp8",
}
_CODES = {"packed": "int", "nvfp4": "nvfp", "mxfp4": "mxfp", "mxfp6": "mxfp", "mxfp8": "mxfp"}
_WIDTHS = {"nvfp4": 16, "mxfp4": 32, "mxfp6": 32, "mxfp8": 32}
_PRESETS = {"W8A16": 8, "W4A16": 4, "W4A16_ASYM": 4, "W4AFP8": 4}
"""names that stand for a group of settings, and the bits of their weights; of others the file tells"""


@dataclass(frozen=True)
class CompressedDecoder:
    """Decodes one weight of a compressed-tensors checkpoint."""

    kind: Kind
    codes: Literal["int", "float"]
    bits: int
    blocks: Blocks

    @property
    def precision(self) -> Precision:
        """Return how finely the weight is quantised."""
        name = _CODES.get(self.kind, "fp" if self.codes == "float" else "int")
        scheme = f"compressed-tensors {name}{self.bits}"
        return Precision(scheme, self.bits, (self.blocks.height, self.blocks.width))

    def decode(self, parts: Mapping[str, Tensor], start: int, stop: int, /) -> Tensor:
        """Return rows start to stop, in the dtype of the scales; of the 4- and 6-bit floats in bfloat16."""
        rows = parts["codes"][start:stop]
        columns = self._columns(parts.get("g_idx"))
        scales, zeros = parts["scales"], parts.get("zero points")
        if self.kind in ("mxfp4", "mxfp6", "mxfp8"):
            scales = from_e8m0(scales).nan_to_num(nan=torch.inf).to(torch.bfloat16)
        elif self.kind == "nvfp4":
            # A division, as upstream: the product with the inverse has other bits.
            scales = scales.to(torch.float32) / parts["global scale"]
        codes = self._codes(rows).to(scales.dtype)
        if zeros is not None:
            zeros = self._zeros(zeros).to(scales.dtype)
            codes = codes - self.blocks.spread(zeros, start, stop, columns)
        found = codes * self.blocks.spread(scales, start, stop, columns)
        return found.to(torch.bfloat16) if self.kind == "nvfp4" else found

    def _codes(self, rows: Tensor) -> Tensor:
        n_columns = self.blocks.columns
        if self.kind == "packed":
            return self._unpacked(rows, n_columns) - (1 << (self.bits - 1))
        if self.kind in ("nvfp4", "mxfp4"):
            return from_e2m1(unpack_nibbles(rows)[:, :n_columns])
        if self.kind == "mxfp6":
            words = rows.reshape(len(rows), -1, 3).to(torch.int32)
            joined = words[..., 0] | words[..., 1] << 8 | words[..., 2] << 16
            shifts = torch.arange(0, 24, 6, dtype=torch.int32)
            return from_e2m3((joined[..., None] >> shifts & 63).reshape(len(rows), -1)[:, :n_columns])
        return rows

    def _unpacked(self, words: Tensor, n_codes: int) -> Tensor:
        per_word = 32 // self.bits
        # Until 0.16 a word held whole codes alone, and the upper bits of 3, 5, 6 and 7 bits were left free.
        if 32 % self.bits and words.shape[1] == -(-n_codes // per_word):
            shifts = torch.arange(per_word, dtype=torch.int32) * self.bits
            codes = (words[:, :, None] >> shifts) & ((1 << self.bits) - 1)
            return codes.reshape(len(words), -1)[:, :n_codes]
        return unpack_words(words, self.bits, n_codes)

    def _zeros(self, zeros: Tensor) -> Tensor:
        if zeros.dtype != torch.int32:
            return zeros
        # Packed along the rows of the weight: a column of words holds those of one group.
        unpacked = self._unpacked(zeros.T.contiguous(), self.blocks.grid[0]).T
        return unpacked - (1 << (self.bits - 1))

    def _columns(self, groups: Tensor | None) -> Tensor | None:
        """Return the group of each column, where they do not follow each other."""
        if groups is None or bool((groups == -1).any()):
            return None
        if bool((groups < 0).any()) or bool((groups >= self.blocks.grid[1]).any()):
            raise ValueError(f"its g_idx names groups beyond the {self.blocks.grid[1]} that there are")
        return groups.to(torch.int64)


def find(checkpoint: Checkpoint) -> Iterator[CodedTensor]:
    """Yield the coded weights of a compressed-tensors checkpoint.

    Raises:
        UnsupportedModelError: they are in a format that is not decoded.
        WeightsError: a part of one is missing, or has a shape that does not fit.
    """
    settings = checkpoint.settings
    _check(settings)
    for module in list(checkpoint.modules("weight_scale")):
        group = _group_of(module, settings)
        kind = _kind(group.get("format") or settings.get("format"), group)
        yield _coded(checkpoint, module, kind, group.get("weights") or {})


def _check(settings: Settings) -> None:
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise UnsupportedModelError(f"its weights are sparse ({sparsity}), which is not decoded")
    transforms = (settings.get("transform_config") or {}).get("config_groups") or {}
    places = {
        str(each.get("location")) for transform in transforms.values() for each in transform.get("apply", ())
    }
    if online := sorted(places - {"weight_input", "weight_output"}):
        raise UnsupportedModelError(
            f"its activations are rotated as it runs ({online[0]}), so its weights alone are not the model"
        )


def _group_of(module: str, settings: Settings) -> Mapping[str, Any]:
    """Return the settings of the group that a module belongs to: by its name, a pattern, or its class."""
    groups = settings.get("config_groups") or {}
    found = {
        name: g if isinstance(g, Mapping) else {"targets": g, **_preset(name)} for name, g in groups.items()
    }
    by_name = [(t, g) for g in found.values() for t in g.get("targets", ())]
    exact = [g for t, g in by_name if t == module]
    by_pattern = [g for t, g in sorted(by_name, key=lambda each: each[0]) if matches(module, t)]
    is_embedding = module.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings")
    by_class = [g for t, g in by_name if t == ("Embedding" if is_embedding else "Linear")]
    return next(iter((*exact, *by_pattern, *by_class, *(g for _, g in by_name))), {})


def _preset(name: str) -> dict[str, Any]:
    return {"weights": {"num_bits": _PRESETS[name]}} if name in _PRESETS else {}


def _kind(name: str | None, group: Mapping[str, Any]) -> Kind:
    if name in _KINDS:
        return _KINDS[name]
    raise UnsupportedModelError(
        f"its weights are in the format {name!r} of compressed-tensors, which is not decoded"
    )


def _coded(checkpoint: Checkpoint, module: str, kind: Kind, weights: Mapping[str, Any]) -> CodedTensor:
    """Return one weight, with the shapes of its parts checked."""
    is_packed = kind in ("packed", "nvfp4", "mxfp4", "mxfp6")
    dtypes = {"packed": ("I32",), "plain": ("I8", "F8_E4M3"), "mxfp8": ("F8_E4M3",)}.get(kind, ("U8",))
    codes = checkpoint.part(module, "weight_packed" if is_packed else "weight", dtypes)
    scale_dtypes = {"nvfp4": ("F8_E4M3",), "packed": FLOATS, "plain": FLOATS}.get(kind, ("U8", "F8_E8M0"))
    scales = checkpoint.part(module, "weight_scale", scale_dtypes)
    zeros = checkpoint.optional(module, "weight_zero_point", ("I8", "I32"))
    groups = checkpoint.optional(module, "weight_g_idx", ("I32", "I64"))
    parts = {"codes": codes, "scales": scales}
    parts |= {"zero points": zeros} if zeros is not None else {}
    parts |= {"g_idx": groups} if groups is not None else {}
    if kind == "nvfp4":
        parts["global scale"] = checkpoint.part(module, "weight_global_scale", ("F32",))
    codes_kind: Literal["int", "float"] = "float" if codes.dtype == "F8_E4M3" or kind != "packed" else "int"
    if codes.dtype == "I8":
        codes_kind = "int"
    bits = {"nvfp4": 4, "mxfp4": 4, "mxfp6": 6, "mxfp8": 8}.get(kind) or int(weights.get("num_bits", 8))
    key = f"{module}.weight"
    try:
        shape = _shape(checkpoint, module, kind, codes, bits)
        blocks = _blocks(kind, shape, weights, scales)
        blocks.check("weight_scale", scales.shape)
    except ValueError as error:
        raise damaged(codes.path, key, str(error)) from error
    dtype = {"packed": scales.dtype, "plain": scales.dtype}.get(kind, "BF16")
    return CodedTensor(key, shape, dtype, parts, CompressedDecoder(kind, codes_kind, bits, blocks))


def _shape(
    checkpoint: Checkpoint, module: str, kind: Kind, codes: StoredTensor, bits: int
) -> tuple[int, int]:
    """Return the shape of the weight.

    Raises:
        ValueError: its codes are too few for it.
    """
    rows, stored = codes.shape
    if kind != "packed":
        return rows, {"nvfp4": 2 * stored, "mxfp4": 2 * stored, "mxfp6": stored // 3 * 4}.get(kind, stored)
    shape = checkpoint.part(module, "weight_shape", ("I64", "I32"))
    found = tuple(int(n) for n in shape.read())
    if len(found) != 2:
        raise ValueError(f"its weight_shape is {list(found)}, and a matrix has two axes")
    n_rows, n_columns = found
    dense, whole = -(-n_columns * bits // 32), -(-n_columns // (32 // bits))
    if n_rows != rows or stored not in (dense, whole):
        raise ValueError(
            f"its weight_packed has the shape {[rows, stored]}, and {bits}-bit codes of a weight of "
            f"{n_rows} × {n_columns} need [{n_rows}, {dense}]"
        )
    return n_rows, n_columns


def _blocks(kind: Kind, shape: tuple[int, int], weights: Mapping[str, Any], scales: StoredTensor) -> Blocks:
    if kind in _WIDTHS:
        return Blocks.of(shape, 1, _WIDTHS[kind])
    size, block = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or ("group" if (size or 0) > 0 else "channel" if size == -1 else None)
    if isinstance(block, str):
        block = [int(n) for n in block.lower().split("x")]
    if strategy == "block" and block:
        return Blocks.of(shape, int(block[0]), int(block[1]))
    if strategy in ("group", "tensor_group") and size:
        return Blocks.of(shape, 1, int(size))
    # By the scales themselves: older versions did not write the strategy.
    n_scales = 1
    for n in scales.shape:
        n_scales *= n
    return Blocks.of(shape, None if n_scales == 1 else 1, None)
