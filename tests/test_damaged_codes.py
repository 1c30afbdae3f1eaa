"""Codes that are damaged, or laid out in a way that is not decoded, are refused with what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lazarus.errors import UnsupportedModelError, WeightsError
from lazarus.models.quantised import CodedTensor, Codes
from lazarus.models.stored import read_headers

FOLDER = Path(__file__).parent / "quantised"
MODULE = "model.layers.1.mlp.down_proj"
Edit = Callable[[dict[str, Tensor]], None]


def decode(library: str, variant: str, folder: Path, edit: Edit, **settings: Any) -> dict[str, Tensor]:
    """The decoded weights of a variant after an edit of its tensors and settings."""
    known = json.loads((FOLDER / f"{library}.json").read_text(encoding="utf-8"))[variant]
    every = load_file(FOLDER / f"{library}.safetensors")
    own = {k.partition("/")[2]: t for k, t in every.items() if k.partition("/")[0] == variant}
    edit(own)
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, path, known.get("metadata"))
    stated = {**known["settings"], **settings}
    weights = Codes("model", stated["quant_method"], stated, "F16").weights(read_headers([str(path)]))
    return {key: weight.read() for key, weight in weights.items() if isinstance(weight, CodedTensor)}


def without(name: str) -> Edit:
    def edit(own: dict[str, Tensor]) -> None:
        del own[f"{MODULE}.{name}"]

    return edit


def made(name: str, make: Callable[[Tensor], Tensor]) -> Edit:
    def edit(own: dict[str, Tensor]) -> None:
        own[f"{MODULE}.{name}"] = make(own[f"{MODULE}.{name}"])

    return edit


def cut(name: str, axis: int = 0) -> Edit:
    """Leave out the last half along an axis."""
    return made(name, lambda tensor: tensor.narrow(axis, 0, tensor.shape[axis] // 2))


def put(name: str, value: Tensor) -> Edit:
    return made(name, lambda _: value)


def unchanged(_: dict[str, Tensor]) -> None:
    pass


STATE = "weight.quant_state.bitsandbytes__nf4"
EMPTY = torch.tensor([*b"{}"], dtype=torch.uint8)
ORDER = torch.arange(128, dtype=torch.int32) // 32


@pytest.mark.parametrize(
    ("library", "variant", "edit", "why"),
    [
        ("gptq", "gptq-4-sym", without("scales"), "its scales is missing"),
        ("gptq", "gptq-4-sym", without("qzeros"), "its qzeros is missing"),
        (
            "gptq",
            "gptq-4-sym",
            made("scales", Tensor.int),
            "its scales is stored in I32, and not in BF16 or",
        ),
        ("gptq", "gptq-4-sym", cut("scales"), r"\(codes \[16, 64\], zero points \[4, 8\], scales \[2, 64\]"),
        (
            "gptq",
            "gptq-4-sym",
            cut("qweight"),
            "do not fit 4 bits in groups of 32, as its configuration says",
        ),
        ("gptq", "gptq-4-sym", cut("qweight", 1), "do not fit 4 bits in groups of 32"),
        ("gptq", "gptq-4-sym", cut("qzeros", 1), "do not fit 4 bits in groups of 32"),
        ("gptq", "gptq-4-channel", cut("g_idx"), "do not fit 4 bits in groups of all columns"),
        (
            "gptq",
            "gptq-dynamic",
            cut("scales"),
            "do not fit 4 bits in groups of 32 or 8 bits in groups of 64",
        ),
        (
            "gptq",
            "gptq-4-desc",
            put("g_idx", ORDER - 1),
            "its g_idx names groups beyond the 4 that there are",
        ),
        (
            "gptq",
            "gptq-4-desc",
            put("g_idx", ORDER + 1),
            "its g_idx names groups beyond the 4 that there are",
        ),
        ("gptq", "gptq-4-desc", put("g_idx", ORDER // 2), "its g_idx has 64 columns in one group of 32"),
        ("awq", "awq-gemm", without("qzeros"), "its qzeros is missing"),
        ("awq", "awq-gemm", cut("qweight"), "do not fit 4 bits in groups of 32"),
        ("awq", "awq-gemm", cut("scales", 1), "do not fit 4 bits in groups of 32"),
        ("awq", "autoawq-gemv", cut("qzeros", 1), "do not fit 4 bits in groups of 64"),
        ("bitsandbytes", "bnb-int8", without("weight"), "its weight is missing"),
        ("bitsandbytes", "bnb-int8", cut("SCB"), r"its SCB has the shape \[32\], and its codes \[64, 128\]"),
        ("bitsandbytes", "bnb-nf4", without("weight.absmax"), "its weight.absmax is missing"),
        (
            "bitsandbytes",
            "bnb-nf4",
            cut("weight.absmax"),
            r"its scales are 64, and .* \[64, 128\] in blocks of 64",
        ),
        ("bitsandbytes", "bnb-nf4", cut("weight"), "its codes are 2048, and .* needs 4096"),
        (
            "bitsandbytes",
            "bnb-nf4-double",
            without("weight.nested_absmax"),
            "its weight.nested_absmax is missing",
        ),
        ("bitsandbytes", "bnb-nf4-double", cut("weight.nested_quant_map"), "its scales' table are 128"),
        ("bitsandbytes", "bnb-nf4", cut(STATE), "its quant_state is no JSON"),
        ("bitsandbytes", "bnb-nf4", put(STATE, EMPTY), r"its quant_state \(\{\}\) does not say how"),
        ("hqq", "hqq-4", without("scale"), "its scale is missing"),
        ("hqq", "hqq-4", without("packing"), "its packing is missing"),
        (
            "hqq",
            "hqq-4",
            cut("W_q"),
            r"\(codes \[32, 64\], scales \[128, 1\], zero points \[128, 1\]\) do not fit",
        ),
        ("hqq", "hqq-4", cut("scale"), r"do not fit a weight of the shape \[64, 128\] packed as 4bit_u8"),
        ("hqq", "hqq-3-axis0", cut("zero", 1), "do not fit"),
        ("quanto", "quanto-int8", without("weight._scale"), "its weight._scale is missing"),
        (
            "quanto",
            "quanto-int8",
            cut("weight._data"),
            r"its _scale has the shape \[64, 1\], and its codes \[32,",
        ),
    ],
)
def test_a_damaged_weight_is_refused(
    library: str, variant: str, edit: Edit, why: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=rf"{MODULE}.weight cannot be decoded: .*{why}"):
        decode(library, variant, tmp_path, edit)


@pytest.mark.parametrize(
    ("library", "variant", "settings", "why"),
    [
        ("gptq", "gptq-4-sym", {"checkpoint_format": "marlin"}, "laid out for the marlin kernel"),
        ("gptq", "autogptq-4-sym", {"is_marlin_format": True}, "laid out for the marlin kernel"),
        ("gptq", "gptq-4-sym", {"rotation": "hadamard"}, r"its activations are rotated .* \(hadamard\)"),
        ("awq", "awq-gemm", {"version": "GEMV_FAST"}, "laid out for the gemv_fast kernel"),
        ("awq", "awq-gemm", {"backend": "llm-awq"}, "laid out for the llm-awq kernel"),
        (
            "gptq",
            "gptq-4-sym",
            {"quant_method": "aqlm"},
            "by 'aqlm', which cannot be decoded: its codes stand",
        ),
        ("gptq", "gptq-4-sym", {"quant_method": "tomorrow"}, "which cannot be decoded. The methods that can"),
        (
            "gptq",
            "gptq-4-sym",
            {
                "quant_method": "auto-round",
                "packing_format": "auto_round:llm_compressor",
                "data_type": "mx_fp",
            },
            "packed as 'auto_round:llm_compressor' of the data type 'mx_fp'",
        ),
        (
            "gptq",
            "gptq-4-sym",
            {"quant_method": "auto-round", "act_bits": 8},
            "quantised to 8 bits as it runs",
        ),
    ],
)
def test_another_layout_is_refused(
    library: str, variant: str, settings: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^model: .*{why}.*Compare an unquantised checkpoint.$"):
        decode(library, variant, tmp_path, unchanged, **settings)


def test_codes_for_one_kind_of_gpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"laid out for one kind of GPU \(weight_format 2\)"):
        decode("bitsandbytes", "bnb-int8", tmp_path, put("weight_format", torch.tensor(2, dtype=torch.uint8)))


def test_activations_that_are_scaled_are_refused(tmp_path: Path) -> None:
    def scaled(own: dict[str, Tensor]) -> None:
        own["transformer.h.0.mlp.act.scales"] = torch.ones(4)

    with pytest.raises(UnsupportedModelError, match=r"divided as it runs \(transformer.h.0.mlp.act.scales\)"):
        decode("awq", "awq-gemm", tmp_path, scaled)


def test_codes_in_groups_of_an_unknown_weight_are_refused(tmp_path: Path) -> None:
    def packed(own: dict[str, Tensor]) -> None:
        own[f"{MODULE}.weight._data._data"] = torch.zeros(64, 128, dtype=torch.uint8)

    with pytest.raises(UnsupportedModelError, match="the shapes of the weights are not stored"):
        decode("quanto", "quanto-int8", tmp_path, packed)


def test_groups_that_follow_each_other_need_no_list(tmp_path: Path) -> None:
    """AutoRound leaves the list out, and others left it at zero."""
    expected = decode("gptq", "gptq-4-sym", tmp_path, put("g_idx", ORDER))
    assert expected
    for edit in (without("g_idx"), put("g_idx", ORDER * 0)):
        found = decode("gptq", "gptq-4-sym", tmp_path, edit)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
