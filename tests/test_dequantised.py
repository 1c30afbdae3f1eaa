"""A quantised checkpoint is compared as if it held the weights that its codes stand for."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import lazarus
from factories import save_model, tiny_llama, tiny_tokenizer
from layouts import edit_json, save_adapter
from lazarus.errors import ModelError, OutputError, UnsupportedModelError
from packed import GROUP, quantised_copy

PROMPTS = ["Hello there", "The cat", "17 + 15 ="]


def saved_page(diff: lazarus.ActivationDiff, path: Path) -> str:
    diff.save(path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dequantised")
    base = save_model(root / "base", tiny_llama(), tiny_tokenizer())
    coded = quantised_copy(base, root / "w4", dequantised=root / "plain")
    return {"base": base, "w4": coded, "plain": root / "plain", "root": root}


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_it_runs_on_the_weights_that_its_codes_stand_for(memory: Any, folders: dict[str, Path]) -> None:
    coded, plain = (
        lazarus.activation_diff(folders["base"], folders[name], PROMPTS, memory=memory, localize=True)
        for name in ("w4", "plain")
    )
    assert coded.layers == plain.layers
    assert coded.record.output == plain.record.output
    assert coded.summary.verdict == "changed"
    assert coded.record.finetuned.stored_dtype == "compressed-tensors int4"
    same = lazarus.activation_diff(folders["plain"], folders["w4"], PROMPTS, memory=memory)
    assert same.summary.verdict == "identical"
    assert same.summary.weights_identical


def test_what_each_block_costs_is_measured_without_being_asked_for(folders: dict[str, Path]) -> None:
    diff = lazarus.activation_diff(folders["base"], folders["w4"], PROMPTS)
    assert {"weights-dequantised", "quantised-pair"} <= set(diff.record.note_codes)
    local = [layer.local.relative_l2 for layer in diff.layers if layer.local is not None]
    assert len(local) == len(diff.layers)
    most = max(range(len(local)), key=lambda layer: local[layer] or 0.0)
    assert f"Blocks that cost most, by their local change: {most} (" in str(diff)
    assert any("it quantises weights alone" in note for note in diff.notes)
    page = saved_page(diff, folders["root"] / "report.html")
    ranked = re.search(r"Blocks in the order of what their quantisation costs.*?</table>", page, re.DOTALL)
    assert ranked is not None
    order = sorted(range(len(local)), key=lambda layer: -(local[layer] or 0.0))
    assert [int(n) for n in re.findall(r'<th scope="row">(\d+)', ranked[0])] == order
    assert "Which block costs most?" in page
    both = lazarus.activation_diff(folders["w4"], folders["w4"], PROMPTS)
    assert all(layer.local is None for layer in both.layers)


def test_what_was_not_applied_to_activations_is_noted(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = quantised_copy(folders["base"], tmp_path / "w4a8")
    settings = json.loads((copy / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    scheme = {"num_bits": 8, "type": "int", "dynamic": True}
    settings["config_groups"]["group_0"]["input_activations"] = scheme
    edit_json(copy / "config.json", quantization_config=settings)
    diff = lazarus.activation_diff(folders["base"], copy, PROMPTS)
    assert any("its quantisation of activations (int8, dynamic) was not applied" in n for n in diff.notes)


def test_codes_that_the_claimed_format_does_not_have_are_named(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = quantised_copy(folders["base"], tmp_path / "other")
    edit_json(copy / "config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 16})
    said = r"28 of its weights are stored as codes in a layout that is not one of 'gptq'.*weight_packed \(I32"
    for run in (partial(lazarus.activation_diff, prompts=PROMPTS), lazarus.weight_diff):
        with pytest.raises(UnsupportedModelError, match=said):
            run(folders["base"], copy)


def test_compare_reads_it_as_well(folders: dict[str, Path]) -> None:
    coded, plain = (lazarus.compare(folders["base"], folders[name], "The cat") for name in ("w4", "plain"))
    assert [pair.js for pair in coded.record.layers] == [pair.js for pair in plain.record.layers]


def test_it_can_be_asked_for_and_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Where it is refused, transformers loads the checkpoint, which needs the package of its format here."""
    with pytest.raises(ModelError, match="compressed-tensors"):
        lazarus.activation_diff(folders["base"], folders["w4"], PROMPTS, dequantize="never")
    always = lazarus.activation_diff(folders["base"], folders["w4"], PROMPTS, dequantize="always")
    assert always.record.settings.dequantize == "always"
    other = quantised_copy(folders["base"], tmp_path / "other")
    edit_json(other / "config.json", quantization_config={"quant_method": "aqlm"})
    with pytest.raises(UnsupportedModelError, match="quantised by 'aqlm'"):
        lazarus.activation_diff(folders["base"], other, PROMPTS, dequantize="always")


def test_weight_diff_gives_what_it_gives_of_the_plain_weights(folders: dict[str, Path]) -> None:
    coded, plain = (lazarus.weight_diff(folders["base"], folders[name]) for name in ("w4", "plain"))
    assert coded.summary == plain.summary
    for ours, theirs in zip(coded.record.results, plain.record.results, strict=True):
        assert ours.relative_change == theirs.relative_change
        assert ours.n_changed == theirs.n_changed
    assert lazarus.weight_diff(folders["plain"], folders["w4"]).summary.verdict == "identical"
    assert lazarus.weight_diff(folders["w4"], folders["w4"]).summary.verdict == "identical"


def test_the_error_of_a_quantisation_is_what_float64_says(folders: dict[str, Path]) -> None:
    before = load_file(folders["base"] / "model.safetensors")
    after = load_file(folders["plain"] / "model.safetensors")
    for one, other, role in (("base", "w4", "finetuned"), ("w4", "base", "base")):
        rows = [r for r in lazarus.weight_diff(folders[one], folders[other]).record.results if r.quantisation]
        assert len(rows) == 28
        for row in rows:
            found = row.quantisation
            assert found is not None
            key = f"{row.name.removesuffix('.weight')}.weight"
            weight, error = before[key].double(), after[key].double() - before[key].double()
            groups = weight.reshape(len(weight), -1, GROUP)
            scale = groups.abs().amax(-1, keepdim=True) * 2 / 15
            nearest = (groups / scale).round().clamp(-8, 7) * scale - groups
            squares = error.square().sum(0).sort(descending=True).values
            assert (found.role, found.bits, found.block) == (role, 4, [1, GROUP])
            assert math.isclose(found.relative_error or 0, error.norm() / weight.norm(), rel_tol=1e-5)
            assert math.isclose(
                found.nearest_relative_error or 0, nearest.norm() / weight.norm(), rel_tol=1e-5
            )
            assert math.isclose(found.error_ratio or 0, error.norm() / nearest.norm(), rel_tol=1e-5)
            assert math.isclose(found.outlier_share or 0, squares[0] / squares.sum(), rel_tol=1e-5)


def test_a_recipe_lists_modules_by_what_they_cost(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = lazarus.weight_diff(folders["base"], folders["w4"])
    weights.save(tmp_path / "recipe.json")
    recipe = json.loads((tmp_path / "recipe.json").read_text(encoding="utf-8"))
    errors = {
        row.name.removesuffix(".weight"): row.quantisation.relative_error
        for row in weights.record.results
        if row.quantisation is not None
    }
    assert recipe["costs"] == sorted((error or 0.0 for error in errors.values()), reverse=True)
    assert [errors[name] for name in recipe["ignore"]] == recipe["costs"]
    states = lazarus.activation_diff(folders["base"], folders["w4"], PROMPTS)
    states.save(tmp_path / "blocks.recipe.json")
    blocks = json.loads((tmp_path / "blocks.recipe.json").read_text(encoding="utf-8"))
    local = [layer.local.relative_l2 or 0.0 for layer in states.layers if layer.local]
    assert blocks["costs"] == sorted(local, reverse=True)
    for pattern, cost in zip(blocks["ignore"], blocks["costs"], strict=True):
        layer = local.index(cost)
        names = [f"model.layers.{n}.mlp.down_proj" for n in range(len(local))]
        assert [n for n, name in enumerate(names) if re.match(pattern.removeprefix("re:"), name)] == [layer]


def test_a_recipe_of_nothing_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no tensor is quantised in one of the two alone"):
        lazarus.weight_diff(folders["base"], folders["plain"]).save(tmp_path / "recipe.json")
    with pytest.raises(OutputError, match="was not measured"):
        lazarus.activation_diff(folders["base"], folders["plain"], PROMPTS).save(tmp_path / "recipe.json")


def test_codes_in_bfloat16_run_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama().to(torch.bfloat16), tiny_tokenizer())
    coded = quantised_copy(base, tmp_path / "w4", dequantised=tmp_path / "plain")
    for dtype in ("float32", "bfloat16"):
        ours, theirs = (
            lazarus.activation_diff(base, folder, PROMPTS, dtype=dtype, localize=True)
            for folder in (coded, tmp_path / "plain")
        )
        assert ours.layers == theirs.layers
        assert ours.record.finetuned.run_dtype == dtype


def test_an_adapter_on_a_quantised_base_is_told_from_one_on_the_plain_base(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """QLoRA: the merge of an adapter into the dequantised weights is another one than into the plain ones."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = save_adapter(tmp_path / "adapter", folders["plain"], config)
    merged = save_model(tmp_path / "merged", model.merge_and_unload(), tiny_tokenizer())
    on_coded, on_plain = (f"{folders[name]}+{tmp_path / 'adapter'}" for name in ("w4", "base"))
    right = lazarus.weight_diff(on_coded, merged)
    assert right.summary.verdict == "rounding"
    assert "with the adapter" in right.summary.causes[0]
    assert lazarus.weight_diff(on_plain, merged).summary.verdict == "changed"
    assert lazarus.activation_diff(on_coded, merged, PROMPTS).summary.verdict != "changed"
    quantisation = lazarus.activation_diff(on_plain, on_coded, PROMPTS)
    assert quantisation.summary.verdict == "changed"
    assert "quantised-pair" in quantisation.record.note_codes
