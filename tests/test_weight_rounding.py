"""weight_diff's verdict `rounding`: merges as PEFT makes them, right and wrong, and narrower copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from architectures import build
from factories import save_model, tiny_llama
from layouts import WEIGHTS, edit_json, edit_weights, save_adapter, scattered
from lazarus import WeightDiff, weight_diff
from lazarus.errors import GateNotMetError
from lazarus.weights import rounding
from test_weight_adapters import CONFIGS

SIXTEEN = [torch.bfloat16, torch.float16]
ADAPTER = "adapter_model.safetensors"


def changed(adapter: Path, folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of an adapter with other tensors."""
    shutil.copytree(adapter, folder)
    tensors = {key: change(key, tensor).contiguous() for key, tensor in load_file(folder / ADAPTER).items()}
    save_file(tensors, folder / ADAPTER)
    return folder


def scaled(factor: float) -> Callable[[str, Tensor], Tensor]:
    return lambda key, tensor: tensor * factor if "lora_B" in key or "lora_embedding_B" in key else tensor


def skipped(key: str, tensor: Tensor) -> Tensor:
    return tensor * (0 if "lora_B" in key and "layers.2." in key else 1)


WRONG = {"5 % less": scaled(0.95), "5 % more": scaled(1.05), "twice": scaled(2.0), "one layer": skipped}


def merge(
    base: Path, adapter: Path, folder: Path, dtype: torch.dtype, stored: torch.dtype | None = None
) -> Path:
    """PEFT's merge in a dtype, stored in that or in another."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged: Any = PeftModel.from_pretrained(model, adapter)
    return save_model(folder, merged.merge_and_unload().to(stored or dtype))


@pytest.fixture(scope="module", params=[torch.float32, *SIXTEEN], ids=str)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = scattered(tiny_llama(attention_bias=True)).to(request.param)
    return save_model(tmp_path_factory.mktemp("base") / "base", model)


def dtype_of(base: Path) -> torch.dtype:
    return next(iter(load_file(base / WEIGHTS).values())).dtype


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_right_merge_differs_by_rounding(kind: str, base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", base, CONFIGS[kind]())
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged", dtype_of(base))
    both = f"{base}+{tmp_path / 'adapter'}"
    for diff in (weight_diff(both, merged), weight_diff(merged, both)):
        if kind != "norms":  # it replaces a tensor, and what replaces it is stored as it is
            assert diff.summary.verdict == "rounding"
        assert {row.rounding for row in diff.results if row.n_changed} <= {True}
        diff.check_gates(expect="identical")
        with pytest.raises(GateNotMetError):
            diff.check_gates(expect="changed")


@pytest.mark.parametrize("size", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_merge_is_a_change(wrong: str, size: float, base: Path, tmp_path: Path) -> None:
    """By a hundredth, most of an update is below half a unit of bfloat16."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    save_adapter(tmp_path / "whole", base, config)
    right = changed(tmp_path / "whole", tmp_path / "right", scaled(size))
    used = changed(right, tmp_path / "wrong", WRONG[wrong])
    diff = weight_diff(f"{base}+{right}", merge(base, used, tmp_path / "merged", dtype_of(base)))
    assert diff.summary.verdict == "changed"
    with pytest.raises(GateNotMetError):
        diff.check_gates(expect="identical")
    wrong_rows = [row for row in diff.results if row.rounding is False]
    assert {row.layer for row in wrong_rows} == ({2} if wrong == "one layer" else {0, 1, 2, 3})


def test_how_much_of_the_update_a_wrong_merge_holds_is_said(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "right", base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for factor in (0.5, 2.0):
        used = changed(tmp_path / "right", tmp_path / f"{factor}", scaled(factor))
        merged = merge(base, used, tmp_path / f"merged-{factor}", dtype_of(base))
        diff = weight_diff(f"{base}+{tmp_path / 'right'}", merged)
        shares = [row.merged_share for row in diff.results if row.rounding is False]
        assert shares == pytest.approx([factor] * 8, abs=0.02)
        assert any(
            f"8 of the 8 tensors that the adapter changes hold {factor:.2f} times" in n for n in diff.notes
        )


@pytest.mark.parametrize(
    ("merged_in", "stored"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_a_merge_of_a_wide_base_may_round_before_or_after(
    merged_in: torch.dtype, stored: torch.dtype, tmp_path: Path
) -> None:
    """Base in float32 is read in the dtype of the merge first, or the merge is rounded when it is saved."""
    base = save_model(tmp_path / "base", scattered(tiny_llama()))
    save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    both = f"{base}+{tmp_path / 'adapter'}"
    right = merge(base, tmp_path / "adapter", tmp_path / "merged", merged_in, stored)
    diff = weight_diff(both, right)
    assert diff.summary.verdict == "rounding"
    (cause,) = diff.summary.causes
    assert cause.startswith("fine-tuned is base with the adapter ")
    assert cause.endswith(f"merged and rounded to {str(stored).removeprefix('torch.')}")
    assert "by rounding alone" in str(diff)
    assert "accepted by --expect identical" in str(diff)
    assert "stored-types" not in diff.note_codes
    half = changed(tmp_path / "adapter", tmp_path / "half", scaled(0.95))
    wrong = merge(base, half, tmp_path / "wrong", merged_in, stored)
    assert weight_diff(both, wrong).summary.verdict == "changed"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_merge_into_experts(name: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", build(name).to(torch.bfloat16))
    config = LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    save_adapter(tmp_path / "adapter", base, config)
    both = f"{base}+{tmp_path / 'adapter'}"
    right = merge(base, tmp_path / "adapter", tmp_path / "merged", torch.bfloat16)
    assert weight_diff(both, right).summary.verdict == "rounding"
    half = changed(tmp_path / "adapter", tmp_path / "half", scaled(0.95))
    wrong = merge(base, half, tmp_path / "wrong", torch.bfloat16)
    assert weight_diff(both, wrong).summary.verdict == "changed"


def test_a_merge_of_trained_tokens(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama(tie_word_embeddings=True).to(torch.bfloat16))
    save_adapter(tmp_path / "adapter", base, TrainableTokensConfig(token_indices=[5, 6]))
    path = tmp_path / "adapter" / ADAPTER
    save_file({key: tensor.float() * 1.001 for key, tensor in load_file(path).items()}, path)
    both = f"{base}+{tmp_path / 'adapter'}"
    right = merge(base, tmp_path / "adapter", tmp_path / "merged", torch.bfloat16)
    assert weight_diff(both, right).summary.verdict == "rounding"
    assert weight_diff(both, base).summary.verdict == "changed"


def test_an_update_that_vanishes_is_said_to_be_too_small_to_tell(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", scattered(tiny_llama()).to(torch.bfloat16))
    copy = shutil.copytree(base, tmp_path / "copy")
    save_adapter(tmp_path / "whole", base, LoraConfig(r=4, target_modules=["q_proj"]))
    tiny = changed(tmp_path / "whole", tmp_path / "tiny", scaled(1e-12))
    diff = weight_diff(f"{base}+{tiny}", copy)
    assert diff.summary.verdict == "rounding"
    assert any(
        "of 4 of the 4 tensors that the adapter changes, a merge with a scaling" in n for n in diff.notes
    )
    assert weight_diff(base, tiny).summary.verdict == "changed"  # nothing was merged


def test_where_an_update_is_too_small_a_wrong_rounding_is_not_known_to_be_its_merge(tmp_path: Path) -> None:
    """Within a unit of right, and as far from a merge with any other scaling."""
    base = save_model(tmp_path / "base", scattered(tiny_llama()))
    save_adapter(tmp_path / "whole", base, LoraConfig(r=4, target_modules=["q_proj"]))
    tiny = changed(tmp_path / "whole", tmp_path / "tiny", scaled(1e-12))

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors.update({k: upper_half(v) if "q_proj" in k else v.bfloat16() for k, v in tensors.items()})

    diff = weight_diff(f"{base}+{tiny}", edit_weights(base, tmp_path / "cut", cut))
    assert diff.summary.verdict == "changed"
    assert {row.rounding for row in diff.results if row.component == "attn_q"} == {None}
    assert {row.rounding for row in diff.results if row.n_changed and row.component != "attn_q"} == {True}
    assert "not known of 4 of the 4 tensors that the adapter changes" in " ".join(diff.notes)


def test_another_fine_tune_is_no_merge(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=["q_proj"]))
    other = edit_weights(base, tmp_path / "other", nudge)
    diff = weight_diff(f"{base}+{tmp_path / 'adapter'}", other)
    assert diff.summary.verdict == "changed"
    assert all(row.merged_share is None for row in diff.results if row.component == "attn_q")


def nudge(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(5)
    for key, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator) * 0.1
        tensors[key] = (tensor.float() + noise).to(tensor.dtype)


# --- Copies


def numpy_rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to nearest, ties to even, without torch."""
    numbers = tensor.numpy()
    if dtype == torch.float16:
        return torch.from_numpy(numbers.astype(np.float16))
    whole = numbers.view(np.uint32)
    upper = (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16
    return torch.from_numpy(upper.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def edges(tensor: Tensor) -> Tensor:
    """The same with elements at the ends of binades, between two numbers, subnormal in float16, and zeros."""
    found = tensor.clone().flatten()
    special = [0.0, -0.0, 1.00390625, 1.01171875, -1.998, 65472.0, 6e-8, 3e-8, -2.9e-8, 5.96e-8, 1e-30, 255.5]
    found[: len(special)] = torch.tensor(special)
    return found.view(tensor.shape)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_copy_in_a_narrower_dtype_is_a_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    plain = save_model(tmp_path / "plain", scattered(tiny_llama()))
    wide = edit_weights(plain, tmp_path / "wide", lambda t: t.update({key: edges(t[key])}))
    narrow = edit_weights(
        wide, tmp_path / "narrow", lambda t: t.update({k: numpy_rounded(v, dtype) for k, v in t.items()})
    )
    name = str(dtype).removeprefix("torch.")
    diff = weight_diff(wide, narrow)
    assert (diff.summary.verdict, diff.summary.causes) == (
        "rounding",
        [f"fine-tuned is base rounded to {name}"],
    )
    edit_json(wide / "config.json", hidden_act="gelu")  # what is not compared takes no cause away
    assert weight_diff(narrow, wide).summary.causes == [f"base is fine-tuned rounded to {name}"]
    diff.check_gates(expect="identical")


def test_a_copy_whose_last_bits_were_cut_off_is_a_rounding(tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide", scattered(tiny_llama()))
    cut = edit_weights(wide, tmp_path / "cut", lambda t: t.update({k: upper_half(v) for k, v in t.items()}))
    assert weight_diff(wide, cut).summary.verdict == "rounding"


def upper_half(tensor: Tensor) -> Tensor:
    """A float32's upper 16 bits: bfloat16, rounded toward zero."""
    return (tensor.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def test_a_copy_that_was_rounded_in_two_ways_is_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To nearest in the first rows, which are read first, and toward zero in the others."""
    monkeypatch.setattr(rounding, "N_ELEMENTS", 64)
    wide = save_model(tmp_path / "wide", scattered(tiny_llama()))

    def mixed(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            nearest, cut = tensor.bfloat16(), upper_half(tensor)
            nearest[len(nearest) // 2 :] = cut[len(cut) // 2 :]
            tensors[key] = nearest

    diff = weight_diff(wide, edit_weights(wide, tmp_path / "narrow", mixed))
    assert diff.summary.verdict == "changed"


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_one_element_by_one_unit_is_a_change(dtype: torch.dtype, tmp_path: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    wide = save_model(tmp_path / "wide", scattered(tiny_llama()))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        tensors[key].view(torch.int16).view(-1)[7] += 1

    diff = weight_diff(wide, edit_weights(wide, tmp_path / "narrow", change))
    assert diff.summary.verdict == "changed"
    assert [row.name for row in diff.results if row.rounding is False] == [key]
    assert not any(row.rounding is None for row in diff.results if row.n_changed)


def test_a_light_fine_tune_in_a_narrower_dtype_is_a_change(tmp_path: Path) -> None:
    """Every element is within one unit of base's: that alone is no rounding."""
    wide = save_model(tmp_path / "wide", scattered(tiny_llama()))
    tuned = edit_weights(
        wide,
        tmp_path / "tuned",
        lambda t: t.update({k: (v * (1 + 5e-4)).to(torch.bfloat16) for k, v in t.items()}),
    )
    diff = weight_diff(wide, tuned)
    assert (diff.summary.relative_change or 1) < 0.01
    assert diff.summary.verdict == "changed"
    assert any("stored in different types" in note for note in diff.notes)


def test_overflow_is_no_rounding(tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide", scattered(tiny_llama()))
    huge = edit_weights(wide, tmp_path / "huge", lambda t: t["model.norm.weight"].fill_(7e4))
    narrow = edit_weights(huge, tmp_path / "narrow", lambda t: t.update({k: v.half() for k, v in t.items()}))
    assert weight_diff(huge, narrow).summary.verdict == "changed"


def test_what_has_no_counterpart_is_no_rounding(tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide", scattered(tiny_llama()))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()})
        tensors.pop("model.layers.3.mlp.up_proj.weight")

    diff = weight_diff(wide, edit_weights(wide, tmp_path / "narrow", change))
    assert diff.summary.verdict == "changed"
    assert {row.rounding for row in diff.results if row.n_changed} == {True}


def test_two_that_round_each_other_are_a_change(tmp_path: Path) -> None:
    """Each was stored narrower in one tensor: neither is a copy of the other."""
    wide = save_model(tmp_path / "wide", scattered(tiny_llama()))

    def narrowed(key: str, folder: str) -> Path:
        return edit_weights(wide, tmp_path / folder, lambda t: t.update({key: t[key].bfloat16()}))

    one = narrowed("model.layers.0.mlp.up_proj.weight", "one")
    other = narrowed("model.layers.1.mlp.up_proj.weight", "other")
    assert weight_diff(one, other).summary.verdict == "changed"


def test_a_saved_result_keeps_the_verdict(tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide", scattered(tiny_llama()))
    narrow = edit_weights(
        wide, tmp_path / "narrow", lambda t: t.update({k: v.bfloat16() for k, v in t.items()})
    )
    diff = weight_diff(wide, narrow)
    diff.save(tmp_path / "diff.json")
    again = WeightDiff.load(tmp_path / "diff.json")
    assert again.record == diff.record
    assert "Only by rounding" in save_page(diff, tmp_path)
    again.check_gates(expect="identical")


def save_page(diff: WeightDiff, folder: Path) -> str:
    diff.save(folder / "diff.html")
    return (folder / "diff.html").read_text(encoding="utf-8")
