"""A merge in 16 bits is told from a wrong one by its weights: `within rounding of the stored weights`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear

from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from layouts import compare
from lazarus.activation.rounding import PART, find_rounding
from lazarus.errors import GateNotMetError
from lazarus.models import wrap_model

TARGETS = ["q_proj", "down_proj"]
SIXTEEN = [torch.bfloat16, torch.float16]


def adapted(model: Any, size: float = 0.02, **settings: Any) -> Any:
    """The model with an adapter whose weights stay in float32."""
    torch.manual_seed(0)
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, **{"target_modules": TARGETS, **settings}))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.data.normal_(std=size)
    return tuned.eval()


def merged(tuned: Any, factor: float = 1.0) -> Any:
    other = copy.deepcopy(tuned)
    for layer in other.modules():
        if hasattr(layer, "lora_B"):
            layer.scaling["default"] *= factor
    return other.merge_and_unload()


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_gate_is_met_by_the_right_merge_alone(dtype: torch.dtype, swapped: bool, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama().to(dtype), tiny_tokenizer())
    tuned = adapted(tiny_llama().to(dtype))
    tuned.save_pretrained(tmp_path / "adapter")
    for factor, verdict in ((1.0, "within_rounding"), (0.95, "changed"), (0.0, "changed"), (2.0, "changed")):
        folder = save_model(tmp_path / f"merged-{factor}", merged(tuned, factor), tiny_tokenizer())
        pair = [f"{base}+{tmp_path / 'adapter'}", folder]
        diff = compare(*(reversed(pair) if swapped else pair))
        assert diff.summary.verdict == verdict, factor
        if verdict == "changed":
            with pytest.raises(GateNotMetError):
                diff.check_gates(expect="identical")
            continue
        assert "within rounding of the stored weights" in str(diff)
        assert f"rounded to {str(dtype).removeprefix('torch.')}" in str(diff)
        assert diff.summary.weights_identical is False
        diff.check_gates(expect="identical")
        with pytest.raises(GateNotMetError):
            diff.check_gates(expect="changed")


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_copy_in_16_bits_is_the_rounding_of_its_original(dtype: torch.dtype) -> None:
    model = tiny_llama()
    found = find_rounding(wrap_model(model, "original"), wrap_model(copy.deepcopy(model).to(dtype), "copy"))
    assert found is not None
    assert (found.stored, found.exact, found.kept) == ("copy", "original", None)
    found = find_rounding(
        wrap_model(copy.deepcopy(model).to(dtype).float(), "copy"), wrap_model(model, "original")
    )
    assert found is not None
    assert found.stored == "copy"


def test_a_change_of_one_unit_in_a_few_elements_is_no_rounding() -> None:
    """As training in bfloat16 makes it: the base is on the grid, and so is the fine-tune."""
    model = tiny_llama().to(torch.bfloat16)
    other = copy.deepcopy(model)
    weight = other.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[0] = torch.nextafter(weight[0], torch.full_like(weight[0], 9.0))
    assert find_rounding(wrap_model(model, "base"), wrap_model(other, "other")) is None
    assert find_rounding(wrap_model(model, "base"), wrap_model(perturbed(model), "other")) is None


@pytest.mark.parametrize("row", [0, -1])
def test_one_element_beyond_rounding_is_found_wherever_it_is(row: int) -> None:
    original = tiny_llama(vocab_size=4096)
    stored = copy.deepcopy(original).to(torch.bfloat16)
    table = stored.model.embed_tokens.weight
    assert table.numel() > PART  # more than is looked at together
    pair = wrap_model(original, "original"), wrap_model(stored, "stored")
    assert find_rounding(*pair) is not None
    with torch.no_grad():
        table[row, -1] *= 2
    assert find_rounding(*pair) is None


def test_what_an_adapter_brings_whole_is_compared_as_it_is() -> None:
    model = tiny_llama().to(torch.bfloat16)
    tuned = adapted(model, modules_to_save=["lm_head"])
    right = merged(tuned)
    assert find_rounding(wrap_model(tuned, "tuned"), wrap_model(right, "merged")) is not None
    with torch.no_grad():
        right.lm_head.weight[5] += 0.5
    assert find_rounding(wrap_model(tuned, "tuned"), wrap_model(right, "merged")) is None


def test_an_update_that_rounding_loses_is_told(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama().to(torch.bfloat16), tiny_tokenizer())
    tuned = adapted(tiny_llama().to(torch.bfloat16), size=2e-4)
    tuned.save_pretrained(tmp_path / "adapter")
    folder = save_model(tmp_path / "merged", merged(tuned), tiny_tokenizer())
    diff = compare(f"{base}+{tmp_path / 'adapter'}", folder)
    assert diff.summary.verdict == "within_rounding"
    assert any("has kept" in note and "of the adapter's update" in note for note in diff.notes)


def test_models_of_two_designs_are_no_rounding_of_each_other() -> None:
    model, other = tiny_llama(), tiny_llama(rms_norm_eps=1e-3).to(torch.bfloat16)
    assert find_rounding(wrap_model(model, "one"), wrap_model(other, "other")) is None


@pytest.mark.parametrize("error", [ValueError("PEFT cannot"), MemoryError()])
def test_a_merge_that_peft_refuses_is_not_known_and_a_lack_of_memory_passes(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().to(torch.bfloat16)
    tuned = adapted(model)
    pair = wrap_model(tuned, "tuned"), wrap_model(merged(tuned), "merged")
    names: dict[str, Any] = {"__name__": "peft.made_up", "error": error}
    exec("def merge(self, *args, **kwargs):\n    raise error\n", names)
    monkeypatch.setattr(Linear, "merge", names["merge"])
    if isinstance(error, MemoryError):
        with pytest.raises(MemoryError):
            find_rounding(*pair)
    else:
        assert find_rounding(*pair) is None
