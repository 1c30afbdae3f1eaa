"""What config.json claims of quantisation, where the stored weights say otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import lazarus
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from layouts import compare, edit_json, edit_weights
from lazarus.errors import UnsupportedModelError, WeightsError
from lazarus.models.quantised import stored_codes
from lazarus.models.stored import StoredTensor

Tensors = dict[str, Tensor]
CLAIMS: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "gptq": {"bits": 4, "group_size": 32},
    "fp8": {"weight_block_size": [16, 16], "activation_scheme": "dynamic"},
    "mxfp4": {},
    "compressed-tensors": {"format": "int-quantized", "config_groups": {}},
    "a method of tomorrow": {},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("quantised")
    base = save_model(root / "base", tiny_llama(), tiny_tokenizer())
    return base, save_model(root / "other", perturbed(tiny_llama()), tiny_tokenizer())


def claiming(folder: Path, copy: Path, method: str) -> Path:
    shutil.copytree(folder, copy)
    edit_json(copy / "config.json", quantization_config={"quant_method": method, **CLAIMS[method]})
    return copy


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("method", CLAIMS)
def test_a_claim_that_no_weight_bears_out_is_ignored(
    method: str, memory: Any, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """As it is left over where a model was dequantised and saved again."""
    base, other = folders
    left_over = claiming(other, tmp_path / "left-over", method)
    for run, more in (
        (lazarus.activation_diff, {"prompts": ["Hello"], "memory": memory}),
        (lazarus.weight_diff, {}),
    ):
        plain, claimed = (run(base, each, **more) for each in (other, left_over))
        assert claimed.summary == plain.summary
        assert claimed.summary.verdict == "changed"
        [note] = set(claimed.notes) - set(plain.notes)
        assert f"claims that its weights are quantised ({method}), and none of them is" in note
    assert compare(other, left_over).summary.verdict == "identical"


def int8(tensors: Tensors, weight: str, column: Tensor) -> None:
    tensors[weight] = (tensors[weight] * 127 / column).round().to(torch.int8)
    tensors[f"{weight}_scale"] = column / 127


def float8(tensors: Tensors, weight: str, column: Tensor) -> None:
    tensors[weight] = (tensors[weight] * 448 / column).to(torch.float8_e4m3fn)
    tensors[f"{weight}_scale_inv"] = column / 448


def gptq(tensors: Tensors, weight: str, _: Tensor) -> None:
    module, (rows, columns) = weight.removesuffix(".weight"), tensors.pop(weight).shape
    tensors[f"{module}.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
    tensors[f"{module}.scales"] = torch.ones(1, rows, dtype=torch.float16)
    tensors[f"{module}.qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)


def nf4(tensors: Tensors, weight: str, _: Tensor) -> None:
    tensors[weight] = torch.zeros(tensors[weight].numel() // 2, 1, dtype=torch.uint8)
    tensors[f"{weight}.absmax"] = torch.ones(4)


@pytest.mark.parametrize("quantise", [int8, float8, gptq, nf4])
def test_codes_without_a_claim_are_refused(
    quantise: Callable[[Tensors, str, Tensor], None], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """transformers would read 8-bit codes as elements."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            quantise(tensors, name, tensors[name].abs().amax(1, keepdim=True))

    codes = edit_weights(folders[0], tmp_path / "codes", edit)
    for run in (compare, lazarus.weight_diff):
        with pytest.raises(WeightsError, match=r"codes: 28 of its weights are stored as a quantiser's codes"):
            run(folders[0], codes)


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_a_claim_may_be_in_a_file_of_its_own(file: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """As AutoGPTQ and AutoAWQ wrote it, before configurations had a place for it."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            gptq(tensors, name, tensors[name])

    codes = edit_weights(folders[0], tmp_path / "codes", edit)
    settings = {"bits": 4, "group_size": -1, "quant_method": "gptq"}
    (codes / file).write_text(json.dumps(settings), encoding="utf-8")
    for run in (compare, lazarus.weight_diff):
        result = run(folders[0], codes)
        assert result.summary.verdict != "identical"
    assert lazarus.weight_diff(codes, codes).summary.verdict == "identical"
    (codes / file).write_text("[4", encoding="utf-8")
    with pytest.raises(WeightsError, match=rf"{file}: cannot be read: no JSON: .*\. Fetch the model again\."):
        compare(folders[0], codes)


def test_weights_that_a_method_transposes_are_refused(tmp_path: Path) -> None:
    """Where one is square, its shape would not tell."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=512, n_positions=64))
    base = save_model(tmp_path / "base", model, tiny_tokenizer())
    claim = claiming(base, tmp_path / "claim", "gptq")
    codes = edit_weights(
        claim,
        tmp_path / "codes",
        lambda t: gptq(t, "transformer.h.0.mlp.c_fc.weight", t["transformer.wpe.weight"]),
    )
    with pytest.raises(UnsupportedModelError, match="gptq stores the weights of gpt2 transposed"):
        lazarus.weight_diff(base, codes)


def test_elements_in_8_bits_are_no_codes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A float8 tensor without a scale is read as it is, and so is a table of whole numbers."""

    def edit(tensors: Tensors) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    cast = edit_weights(folders[0], tmp_path / "cast", edit)
    assert compare(folders[0], cast).summary.verdict == "changed"
    assert lazarus.weight_diff(folders[0], cast).summary.verdict != "identical"


def test_an_unknown_quantisation_of_codes_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    claim = claiming(folders[0], tmp_path / "claim", "a method of tomorrow")
    codes = edit_weights(
        claim,
        tmp_path / "codes",
        lambda t: int8(t, "lm_head.weight", t["lm_head.weight"].abs().amax(1, keepdim=True)),
    )
    for run in (compare, lazarus.weight_diff):
        with pytest.raises(UnsupportedModelError, match="quantised by 'a method of tomorrow', which"):
            run(folders[0], codes)


@pytest.mark.parametrize("method", ["modelopt", "fp8"])
def test_fp8_that_transformers_reads_wrongly_is_decoded(
    method: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """It would take the codes for elements: of ModelOpt, and of AutoFP8, whose scales have another name."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            float8(tensors, name, tensors[name].abs().max())
            tensors[f"{name}_scale"] = tensors.pop(f"{name}_scale_inv")

    base = folders[0]
    codes = edit_weights(base, tmp_path / "codes", edit)
    if method == "modelopt":
        settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
        (codes / "hf_quant_config.json").write_text(json.dumps(settings), encoding="utf-8")
    else:
        claim = {"quant_method": "fp8", "activation_scheme": "static"}
        edit_json(codes / "config.json", quantization_config=claim)
    assert lazarus.weight_diff(base, codes).summary.verdict == "changed"
    assert 0 < (compare(base, codes).summary.max_divergence or 0) < 0.1
    with pytest.raises(UnsupportedModelError, match=f"quantised by '{method}', which transformers does not"):
        compare(base, codes, dequantize="never")


def test_stacked_experts_are_codes_where_scales_have_their_name() -> None:
    codes, scales = (StoredTensor("", dtype, (2, 4, 4), 0, 0) for dtype in ("F8_E4M3", "F32"))
    for ending in ("_scale", "_scale_inv", "_weight_scale"):
        stored = {"experts.down_proj": codes, f"experts.down_proj{ending}": scales, "experts.up_proj": scales}
        assert list(stored_codes(stored)) == ["experts.down_proj"]
