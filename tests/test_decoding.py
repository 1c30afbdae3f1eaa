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

from lazarus.models.quantised import UNKNOWN, CodedTensor, Codes, Weight
from lazarus.models.quantised.activations import quantised_activations
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


@pytest.mark.parametrize(
    ("library", "variant", "expected"),
    [
        ("auto-round", "autoround-4-sym", None),
        ("awq", "awq-gemm", None),
        ("bitsandbytes", "bnb-int8", "int8, dynamic, but for outliers"),
        ("bitsandbytes", "bnb-nf4", None),
        ("compressed-tensors", "ct-int4-group", None),
        ("compressed-tensors", "ct-fp8-naive-weightonly", None),
        ("compressed-tensors", "ct-fp8-tensor-static", "fp8, static"),
        ("compressed-tensors", "ct-w8a8-int-channel", "int8, dynamic"),
        ("compressed-tensors", "ct-nvfp4-w4a4", "fp4, dynamic"),
        ("compressed-tensors", "ct-mixed", "fp8, dynamic"),
        ("compressed-tensors", "ct-kv", "fp8, dynamic; KV cache fp8, static"),
        ("fp8", "fbgemm-fp8", "fp8, dynamic"),
        ("fp8", "fp8-autofp8", "fp8, static"),
        ("fp8", "mxfp8", "mxfp8, dynamic"),
        ("gptq", "gptq-4-desc", None),
        ("hqq", "hqq-4", None),
        ("modelopt", "modelopt-fp8", "fp8, static"),
        ("modelopt", "modelopt-fp8-pb", None),
        ("modelopt", "modelopt-int4-awq", None),
        ("modelopt", "modelopt-nvfp4-experts", "NVFP4"),
        ("mxfp4", "mxfp4-gptoss", None),
        ("quanto", "quanto-int8", None),
        ("torchao", "ao-int8-wo-f32", None),
        ("torchao", "ao-int8-da", "Int8DynamicActivationInt8WeightConfig"),
        ("torchao", "ao-8da4w-emb", "Int8DynamicActivationIntxWeightConfig"),
    ],
)
def test_it_is_known_how_activations_are_quantised(library: str, variant: str, expected: str | None) -> None:
    settings = json.loads((FOLDER / f"{library}.json").read_text(encoding="utf-8"))[variant]["settings"]
    assert quantised_activations(settings["quant_method"], settings) == expected


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("auto-round", {"act_bits": 8, "act_data_type": "int"}, "int8"),
        ("compressed-tensors", {"config_groups": {"W4A16": ["Linear"]}}, None),
        ("compressed-tensors", {"config_groups": {"FP8_DYNAMIC": ["Linear"]}}, "FP8_DYNAMIC"),
        ("compressed-tensors", {}, UNKNOWN),
        ("modelopt", {}, UNKNOWN),
        ("quanto", {"model.layers.0.mlp": {"weights": "qint8", "activations": "qint8"}}, "qint8"),
        ("quanto", {"model.layers.0.mlp": {"weights": "qint8", "activations": "none"}}, None),
        ("torchao", {}, UNKNOWN),
        (
            "torchao",
            {"quant_type": "int8_dynamic_activation_int8_weight"},
            "int8_dynamic_activation_int8_weight",
        ),
    ],
)
def test_settings_that_do_not_tell_are_not_taken_for_weights_alone(
    method: str, settings: dict[str, Any], expected: str | None
) -> None:
    assert quantised_activations(method, settings) == expected
