"""Every kind of quantised weight is decoded to the bits that the format's own library makes of it.

tests/quantised/README.md says by which version of which library the weights and the digests were made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lazarus.models.quantised import CodedTensor, Codes, Weight
from lazarus.models.stored import read_headers

FOLDER = Path(__file__).parent / "quantised"
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
VARIANTS = [
    pytest.param(path.stem, name, id=name)
    for path in sorted(FOLDER.glob("*.json"))
    for name in json.loads(path.read_text(encoding="utf-8"))
]
ROUNDED_LATER = {"fp8"}
"""formats that are decoded to float32, and rounded to the model's dtype where they are put into it"""


def opened(library: str, variant: str, folder: Path) -> tuple[dict[str, Weight], Mapping[str, Any]]:
    """One variant as a checkpoint of its own, and what its library makes of it."""
    known = json.loads((FOLDER / f"{library}.json").read_text(encoding="utf-8"))[variant]
    every = load_file(FOLDER / f"{library}.safetensors")
    own = {k.partition("/")[2]: t for k, t in every.items() if k.partition("/")[0] == variant}
    path = folder / "model.safetensors"
    save_file(own, path, known.get("metadata"))
    settings = known["settings"]
    codes = Codes(variant, settings["quant_method"], settings, SAFETENSORS_DTYPES[known["dtype"]])
    return codes.weights(read_headers([str(path)])), known["decoded"]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def coded(weights: Mapping[str, Weight]) -> Iterator[CodedTensor]:
    return (weight for weight in weights.values() if isinstance(weight, CodedTensor))


@pytest.mark.parametrize(("library", "variant"), VARIANTS)
def test_a_weight_is_what_its_own_library_makes_of_it(library: str, variant: str, tmp_path: Path) -> None:
    weights, expected = opened(library, variant, tmp_path)
    assert {weight.key for weight in coded(weights)} == expected.keys()
    for weight in coded(weights):
        decoded, known = weight.read(), expected[weight.key]
        dtype = getattr(torch, known["dtype"])
        assert list(weight.shape) == known["shape"]
        if library in ROUNDED_LATER:
            assert decoded.dtype == torch.float32
        else:
            assert decoded.dtype == dtype
        assert digest(decoded.to(dtype)) == known["sha256"]


@pytest.mark.parametrize(("library", "variant"), VARIANTS)
def test_any_rows_are_those_of_the_whole_weight(library: str, variant: str, tmp_path: Path) -> None:
    for weight in coded(opened(library, variant, tmp_path)[0]):
        whole, rows = weight.read().view(-1, weight.shape[-1]), weight.open()
        for start, stop in ((0, 1), (3, 20), (len(whole) - 5, len(whole))):
            assert digest(rows.read(start, stop)) == digest(whole[start:stop])


@pytest.mark.parametrize(("library", "variant"), VARIANTS)
def test_nothing_of_a_quantised_weight_is_left_over(library: str, variant: str, tmp_path: Path) -> None:
    """Or it would be reported as a tensor without a place."""
    weights, _ = opened(library, variant, tmp_path)
    assert [key for key in weights if not key.endswith((".weight", ".bias", "_proj", "_bias"))] == []
