"""Dequantised weights against the model that a format's own library makes of the same checkpoint, on a CPU.

A test is skipped where that library is not installed: `make test-upstream` installs them all. bitsandbytes is
not among them: on a CPU its kernels round scales and inputs to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import lazarus
from factories import save_model, tiny_llama, tiny_tokenizer
from packed import quantised_copy

PROMPTS = ["Hello there", "The cat", "17 + 15 ="]


def compressed_4(base: Path, folder: Path) -> Path:
    return quantised_copy(base, folder)


def compressed_8(base: Path, folder: Path) -> Path:
    return quantised_copy(base, folder, bits=8)


def torchao_config(settings: Any, base: Path, folder: Path) -> Path:
    config: Any = transformers.TorchAoConfig(settings)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def torchao_int8(base: Path, folder: Path) -> Path:
    torchao: Any = import_module("torchao.quantization")
    return torchao_config(torchao.Int8WeightOnlyConfig(), base, folder)


def torchao_intx4(base: Path, folder: Path) -> Path:
    torchao: Any = import_module("torchao.quantization")
    int4: Any = vars(torch)["int4"]
    return torchao_config(torchao.IntxWeightOnlyConfig(int4, torchao.PerGroup(32)), base, folder)


def torchao_float8(base: Path, folder: Path) -> Path:
    torchao: Any = import_module("torchao.quantization")
    return torchao_config(torchao.Float8WeightOnlyConfig(), base, folder)


@pytest.mark.parametrize(
    ("package", "quantise"),
    [
        ("compressed_tensors", compressed_4),
        ("compressed_tensors", compressed_8),
        ("torchao", torchao_int8),
        ("torchao", torchao_intx4),
        ("torchao", torchao_float8),
    ],
)
def test_it_is_the_model_that_the_library_runs(
    package: str, quantise: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    """Up to the noise, and the two differ from the model before by the same at every layer."""
    pytest.importorskip(package)
    base = save_model(tmp_path / "base", tiny_llama(), tiny_tokenizer())
    folder = quantise(base, tmp_path / "quantised")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    same = lazarus.activation_diff(
        theirs, folder, PROMPTS, tokenizer=str(folder), dequantize="always", dtype="float32"
    )
    assert same.summary.verdict in ("identical", "within_noise")
    own, upstream = (
        lazarus.activation_diff(
            base, other, PROMPTS, tokenizer=str(base), dequantize="always", dtype="float32"
        )
        for other in (folder, theirs)
    )
    assert own.summary.verdict == upstream.summary.verdict == "changed"
    for ours, other in zip(own.layers, upstream.layers, strict=True):
        assert ours.noise_floor is not None
        assert abs((ours.relative_l2 or 0) - (other.relative_l2 or 0)) <= ours.noise_floor
