"""A flipped bit of a checkpoint's file is told by name, where it makes a number that no training makes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lazarus
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from lazarus.models import fault_of

NORM, MATRIX = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base, other = tiny_llama().to(torch.bfloat16), perturbed(tiny_llama()).to(torch.bfloat16)
    return (
        save_model(folder / "base", base, tiny_tokenizer()),
        save_model(folder / "other", other, tiny_tokenizer()),
    )


def flipped(source: Path, folder: Path, name: str) -> Path:
    """A copy of a checkpoint in which the top bit of the exponent of an element is another one."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    bits = tensors[name].view(torch.int16).flatten()
    tensors[name].flatten()[3] = 0.9
    bits[3] ^= 0x4000
    assert tensors[name].flatten()[3] > 1e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", [NORM, MATRIX])
@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("side", [0, 1])
def test_activation_diff_names_it(
    name: str, memory: str, side: int, models: tuple[Path, Path], tmp_path: Path
) -> None:
    pair: Any = list(models)
    pair[side] = flipped(models[side], tmp_path / "spoilt", name)
    found = lazarus.activation_diff(pair[0], pair[1], ["t5 t17 t80"], memory=memory)
    told = [n for n, c in zip(found.notes, found.note_codes, strict=True) if c == "absurd-weights"]
    assert len(told) == 1
    assert "spoilt" in told[0]
    assert name in told[0]


@pytest.mark.parametrize("name", [NORM, MATRIX])
@pytest.mark.parametrize("side", [0, 1])
def test_weight_diff_names_it(name: str, side: int, models: tuple[Path, Path], tmp_path: Path) -> None:
    pair: Any = list(models)
    pair[side] = flipped(models[side], tmp_path / "spoilt", name)
    found = lazarus.weight_diff(*pair)
    told = [n for n, c in zip(found.notes, found.note_codes, strict=True) if c == "absurd-weights"]
    # Where both have the tensor's other elements in common, the number is in one of the two alone.
    assert [note.split(":")[0] for note in told] == [("base", "fine-tuned")[side]]
    assert name in told[0]


def test_a_pair_without_one_has_no_note(models: tuple[Path, Path]) -> None:
    assert "absurd-weights" not in lazarus.activation_diff(*models, ["t5 t17 t80"]).note_codes
    assert "absurd-weights" not in lazarus.weight_diff(*models).note_codes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_real_models_hold_is_not_absurd(dtype: torch.dtype) -> None:
    ordinary = torch.randn(64, 64).to(dtype)
    for value in (60_000.0, -60_000.0):  # more than any norm or sink
        ordinary[3, 5] = value
        assert fault_of(ordinary) is None
    if dtype != torch.float16:
        assert fault_of(torch.full((4, 4), torch.finfo(dtype).min, dtype=dtype)) is None  # of a mask
        ordinary[3, 5] = -3e30
        assert fault_of(ordinary) == "absurd"
    ordinary[0, 0] = torch.inf
    assert fault_of(ordinary) == "not finite"
    ordinary[0, 0] = torch.nan
    assert fault_of(ordinary) == "not finite"
    assert fault_of(torch.empty(0, dtype=dtype)) is None
