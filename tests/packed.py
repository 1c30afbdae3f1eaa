"""Checkpoints quantised in compressed-tensors' format, packed here by plain arithmetic."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16
Tensors = dict[str, Tensor]


def quantised_copy(folder: Path, copy: Path, bits: int = 4, dequantised: Path | None = None) -> Path:
    """A copy of a model with its matrices rounded to nearest, in groups of 16 columns.

    `dequantised` is where the same model goes with its weights as plain elements.
    """
    shutil.copytree(folder, copy)
    plain = load_file(folder / "model.safetensors")
    coded: Tensors = {}
    for key, weight in list(plain.items()):
        if not key.endswith("_proj.weight"):
            coded[key] = weight
            continue
        module, most = key.removesuffix(".weight"), 2 ** (bits - 1)
        groups = weight.float().reshape(len(weight), -1, GROUP)
        scales = (groups.abs().amax(-1) / (most - 1)).to(weight.dtype)
        codes = (groups / scales[..., None].float()).round().clamp(-most, most - 1).to(torch.int64)
        plain[key] = (codes.to(weight.dtype) * scales[..., None]).reshape(weight.shape)
        coded[f"{module}.weight_packed"] = words_of(codes.reshape(weight.shape) + most, bits)
        coded[f"{module}.weight_scale"] = scales
        coded[f"{module}.weight_shape"] = torch.tensor(weight.shape)
    save_file(coded, copy / "model.safetensors", {"format": "pt"})
    scheme = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": GROUP}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
    }
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(
        json.dumps(config | {"quantization_config": settings}), encoding="utf-8"
    )
    if dequantised is not None:
        shutil.copytree(folder, dequantised)
        save_file(plain, dequantised / "model.safetensors", {"format": "pt"})
    return copy


def words_of(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes as words of 32 bits: each row is a number in base 2^bits, lowest digit first."""
    rows = []
    for row in codes.to(torch.int64).tolist():
        number = sum(code << (i * bits) for i, code in enumerate(row))
        n_bytes = -(-len(row) * bits // 32) * 4
        rows.append(torch.frombuffer(bytearray(number.to_bytes(n_bytes, "little")), dtype=torch.int32))
    return torch.stack(rows)


def edited(folder: Path, copy: Path, edit: Callable[[Tensors], None]) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy
