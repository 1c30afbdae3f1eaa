"""Codes of the formats of floats, and torchao's, that are damaged or laid out otherwise, are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lazarus.errors import UnsupportedModelError, WeightsError
from lazarus.models.quantised import Codes
from lazarus.models.stored import read_headers
from test_damaged_codes import FOLDER, MODULE, Edit, cut, decode, made, without

EXPERTS = "model.layers.0.mlp.experts"


def renamed(name: str, new: str) -> Edit:
    def edit(own: dict[str, Tensor]) -> None:
        own[new] = own.pop(name)

    return edit


def narrowed(name: str, axis: int) -> Edit:
    """Leave out the last part of an expert's tensor along an axis."""

    def edit(own: dict[str, Tensor]) -> None:
        key = f"{EXPERTS}.{name}"
        own[key] = own[key].narrow(axis, 0, own[key].shape[axis] - 1)

    return edit


@pytest.mark.parametrize(
    ("variant", "edit", "why"),
    [
        ("fp8-block", without("weight_scale_inv"), "its scales are missing"),
        ("fp8-block", cut("weight_scale_inv"), r"its scale has the shape \[1, 4\], .* needs \[2, 4\]"),
        ("fp8-block", made("weight_scale_inv", Tensor.int), "its scales are stored in I32"),
        ("fp8-block", cut("weight", 1), r"its scale has the shape \[2, 4\], .* needs \[2, 2\]"),
        ("fbgemm-fp8", cut("weight_scale"), r"its scale has the shape \[32, 1\], .* needs \[64, 1\]"),
        ("mxfp8", cut("weight_scale_inv", 1), r"its scale has the shape \[64, 2\], .* needs \[64, 4\]"),
        ("modelopt-fp8", without("weight_scale"), "its weight_scale is missing"),
        ("modelopt-fp8-pcpt", cut("weight_scale"), r"weight_scale has the shape \[32\], .* needs \[64, 1\]"),
        ("modelopt-nvfp4", without("weight_scale_2"), "its weight_scale_2 is missing"),
        (
            "modelopt-nvfp4",
            cut("weight_scale", 1),
            r"weight_scale has the shape \[64, 4\], .* needs \[64, 8\]",
        ),
        ("modelopt-nvfp4", cut("weight", 1), r"weight_scale has the shape \[64, 8\], .* needs \[64, 4\]"),
        ("modelopt-nvfp4", made("weight_scale", Tensor.int), "its weight_scale is stored in I32"),
        (
            "modelopt-mxfp8",
            made("weight_scale", lambda t: t.view(torch.float8_e4m3fn)),
            "are of no kind that",
        ),
        ("modelopt-int4-awq", cut("weight_scale"), r"weight_scale has the shape \[64, 2\]"),
        ("modelopt-int4-awq", cut("pre_quant_scale"), r"its pre_quant_scale has the shape \[128\]"),
        (
            "ao-int8-wo-group",
            cut("_weight_scale", 1),
            r"its scale has the shape \[64, 2\], .* needs \[64, 4\]",
        ),
        ("ao-int8-wo-group", without("_weight_scale"), "its _weight_scale is missing"),
        ("ao-int8-wo-group", without("_weight_qdata"), "its _weight_qdata is missing"),
        ("ao-intx4-asym", made("_weight_qdata", lambda t: t * 2), "its qdata has codes beyond -8 to 7"),
        ("ao-int4-wo-plain", without("_weight_zero_point"), "its _weight_zero_point is missing"),
        ("ao-int4-wo-plain", cut("_weight_scale", 1), r"its scale has the shape \[32, 4\]"),
        (
            "ao-int4-wo-plain",
            cut("_weight_qdata", 1),
            r"its qdata is of \[64, 64\] codes, and the header says",
        ),
        ("ao-int4-tile", cut("_weight_qdata", 1), r"its qdata has the shape \[8, 4, 32, 4\]"),
        ("ao-int4-tile", cut("_weight_scale_and_zero"), r"its scale_and_zero has the shape \[16, 64, 2\]"),
        ("ao-mxfp8-swizzled", cut("_weight_scale"), "its scales are not the 512 of a matrix in tiles"),
    ],
)
def test_a_damaged_weight_is_refused(variant: str, edit: Edit, why: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"{MODULE}.weight cannot be decoded: .*{why}"):
        decode(library_of(variant), variant, tmp_path, edit)


@pytest.mark.parametrize(
    ("variant", "edit", "why"),
    [
        (
            "fp8-experts",
            narrowed("down_proj_scale_inv", 0),
            r"its scale has the shape \[2, 2, 1\], and a weight of 3 ×",
        ),
        ("fbgemm-experts", narrowed("down_proj_scale", 1), r"its scale has the shape \[3, 1, 31\]"),
        (
            "modelopt-nvfp4-experts",
            narrowed("down_proj_weight_scale", 1),
            r"its weight_scale has the shape \[3, 1, 48\]",
        ),
        (
            "modelopt-nvfp4-experts",
            narrowed("down_proj_weight_scale_2", 0),
            r"its weight_scale_2 has the shape \[2\]",
        ),
        ("mxfp4-gptoss", narrowed("down_proj_scales", 2), r"its blocks and scales have the shapes"),
        (
            "mxfp4-gptoss",
            renamed(f"{EXPERTS}.down_proj_scales", "elsewhere"),
            "its down_proj_scales is missing",
        ),
    ],
)
def test_damaged_experts_are_refused(variant: str, edit: Edit, why: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"{EXPERTS}.* cannot be decoded: {why}"):
        decode(library_of(variant), variant, tmp_path, edit)


@pytest.mark.parametrize(
    ("variant", "edit", "why"),
    [
        (
            "modelopt-nvfp4",
            lambda own: own.update({f"{MODULE}.svdquant_lora_a": torch.ones(2, 2)}),
            "SVDQuant",
        ),
        (
            "ao-int8-da",
            lambda own: own.update({f"{MODULE}._weight_act_pre_scale": torch.ones(2)}),
            "the inputs of its layers are scaled as it runs",
        ),
    ],
)
def test_another_function_is_refused(variant: str, edit: Edit, why: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^model: .*{why}.*Compare an unquantised checkpoint.$"):
        decode(library_of(variant), variant, tmp_path, edit)


@pytest.mark.parametrize(
    ("header", "error", "why"),
    [
        (None, WeightsError, "the header of its file does not say how it is stored"),
        ({"tensor_names": "[4"}, WeightsError, "is not as torchao writes it"),
        (
            {"tensor_names": '["lm_head.weight"]', "lm_head.weight": '{"_type": "Int4PlainInt32Tensor"}'},
            UnsupportedModelError,
            "torchao's Int4PlainInt32Tensor, which is not decoded",
        ),
    ],
)
def test_a_header_must_describe_the_weights_of_torchao(
    header: dict[str, str] | None, error: type[Exception], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"lm_head._weight_qdata": torch.ones(2, 2, dtype=torch.int8)}, path, header)
    with pytest.raises(error, match=why):
        Codes("model", "torchao", {}, "BF16").weights(read_headers([str(path)]))


def library_of(variant: str) -> str:
    """Return the file that has a variant."""
    return next(
        path.stem for path in FOLDER.glob("*.json") if variant in json.loads(path.read_text(encoding="utf-8"))
    )
