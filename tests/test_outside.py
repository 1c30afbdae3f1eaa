"""What lies outside a comparison: found in the files, listed, told, and no part of a claim of sameness."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from layouts import compare, edit_json, edit_weights, save_sentence_transformer
from lazarus import ActivationDiff, WeightDiff, activation_diff, weight_diff
from lazarus.errors import GateNotMetError
from lazarus.models.settings import settings_that_differ
from lazarus.results import NotCompared

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
VISION = {**SIZES, "hidden_size": 16, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def multimodal() -> Gemma3ForConditionalGeneration:
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
    config = Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=299
    )
    return Gemma3ForConditionalGeneration(config)


def encoder_decoder() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=300, num_layers=2, pad_token_id=2, **sizes))


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str, str]] = {
    "vision tower": (multimodal, "vision", "vision tower (model.vision_tower)"),
    "projector": (multimodal, "projector", "projector (model.multi_modal_projector)"),
    "answers in a text": (
        lambda: BertForQuestionAnswering(BertConfig(**SIZES)),
        "qa_outputs",
        "classification head (qa_outputs)",
    ),
    "pooler": (lambda: BertModel(BertConfig(**SIZES)), "pooler", "pooler (pooler)"),
    "masked LM head": (lambda: BertForMaskedLM(BertConfig(**SIZES)), "transform", "LM head (cls)"),
    "decoder": (encoder_decoder, "decoder.block", "decoder (decoder)"),
}


def differing(parts: list[NotCompared]) -> list[str]:
    return [part.what for part in parts if part.differs]


def refused(diff: ActivationDiff | WeightDiff, words: str) -> None:
    """`identical` is not claimed, and the gate is met only by who asks for what was compared alone."""
    assert diff.summary.verdict == "identical"
    assert diff.summary.causes == []
    assert "identical in what was compared" in str(diff)
    assert "IDENTICAL" not in str(diff)
    with pytest.raises(GateNotMetError) as refusal:
        diff.check_gates(expect="identical")
    assert words in str(refusal.value)
    assert "`only_compared=True`" in str(refusal.value)
    diff.check_gates(expect="identical", only_compared=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("memory", ["resident", "stream", "in memory"])
def test_a_change_outside_what_is_compared_is_found(name: str, memory: str, tmp_path: Path) -> None:
    make, part, what = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter_name, parameter in other.named_parameters():
            if part in parameter_name:
                parameter.add_(0.1)
    if memory == "in memory":
        diff = compare(model, other, tokenizer=tiny_tokenizer())
        same = compare(model, copy.deepcopy(model), tokenizer=tiny_tokenizer())
    else:
        base, finetuned, twin = (
            save_model(tmp_path / folder, each, tiny_tokenizer())
            for folder, each in (("base", model), ("finetuned", other), ("twin", model))
        )
        diff, same = (compare(base, each, memory=memory) for each in (finetuned, twin))
    assert differing(diff.record.base.not_compared) == [what]
    assert differing(diff.record.finetuned.not_compared) == [what]
    assert diff.summary.weights_identical is False
    assert any(note.startswith("not compared: ") and f"{what}: differs" in note for note in diff.notes)
    refused(diff, what)

    assert what in [found.what for found in same.record.base.not_compared]
    assert differing(same.record.base.not_compared) == []
    assert (same.summary.verdict, same.summary.weights_identical) == ("identical", True)
    same.check_gates(expect="identical")


def test_tensors_that_transformers_drops_without_a_word_are_found(tmp_path: Path) -> None:
    """Draft layers beyond the configured ones, as DeepSeek's checkpoints have them."""
    model = tiny_llama()
    plain = save_model(tmp_path / "plain", model, tiny_tokenizer())

    def drafted(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
        return lambda tensors: tensors.update({"model.layers.9.eh_proj.weight": torch.full((4, 4), value)})

    one = edit_weights(plain, tmp_path / "one", drafted(0.0))
    other = edit_weights(plain, tmp_path / "other", drafted(1.0))
    assert [(p.what, p.n_tensors, p.differs) for p in compare(one, other).record.base.not_compared] == [
        ("model.layers.9", 1, True)
    ]
    refused(compare(one, other), "model.layers.9 differs")
    refused(compare(plain, one), "model.layers.9 differs")
    compare(one, edit_weights(one, tmp_path / "copy", lambda tensors: None)).check_gates(expect="identical")


def test_a_buffer_that_an_older_version_stored_is_no_difference(tmp_path: Path) -> None:
    plain = save_model(tmp_path / "plain", tiny_llama(), tiny_tokenizer())
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    older = edit_weights(plain, tmp_path / "older", lambda tensors: tensors.update({name: torch.ones(4)}))
    compare(plain, older).check_gates(expect="identical")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16], ids=str)
def test_of_two_dtypes_that_torch_cannot_promote_nothing_is_known(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = save_model(tmp_path / "plain", tiny_llama(), tiny_tokenizer())
    table = torch.zeros(4, dtype=torch.int32 if dtype is torch.uint16 else torch.float32)
    stored = edit_weights(plain, tmp_path / "stored", lambda tensors: tensors.update(table=table))
    model = tiny_llama()
    model.register_buffer("table", torch.zeros(4).to(dtype))
    diff = activation_diff(stored, model, ["a b c"], tokenizer=AutoTokenizer.from_pretrained(plain))
    (found,) = diff.record.base.not_compared
    assert found.differs is None


def test_an_adapter_on_what_is_not_compared_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = save_model(tmp_path / "base", multimodal().eval(), tiny_tokenizer())
    model = Gemma3ForConditionalGeneration.from_pretrained(base)
    settings = LoraConfig(target_modules=r".*vision.*\.q_proj", init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    diff = compare(base, tmp_path / "adapter")
    assert differing(diff.record.finetuned.not_compared) == ["vision tower (model.vision_tower)"]
    with pytest.raises(GateNotMetError, match="vision tower"):
        diff.check_gates(expect="identical")


@pytest.mark.parametrize("change", ["dense", "pooling", "gone"])
def test_the_modules_of_a_sentence_encoder_are_found(change: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).eval()
    folders = []
    for name in ("base", "other"):
        folder = save_sentence_transformer(tmp_path / name, "", model, tiny_tokenizer())
        dense = folder / "2_Dense"
        dense.mkdir()
        modules = json.loads((folder / "modules.json").read_text())
        modules.append(
            {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
        )
        (folder / "modules.json").write_text(json.dumps(modules))
        (dense / "config.json").write_text(json.dumps({"in_features": 32}))
        torch.save({"linear.weight": torch.eye(4)}, dense / "pytorch_model.bin")
        folders.append(folder)
    base, other = folders
    compare(base, other).check_gates(expect="identical")
    if change == "dense":  # pickled, and so not opened: other bytes are not known to be other weights
        torch.save({"linear.weight": torch.zeros(4, 4)}, other / "2_Dense" / "pytorch_model.bin")
    elif change == "pooling":
        (other / "1_Pooling").mkdir(exist_ok=True)
        (other / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    else:
        (other / "modules.json").unlink()
    for diff in (compare(base, other), weight_diff(base, other)):
        refused(diff, "Pooling module (1_Pooling)" if change == "pooling" else "Dense module (2_Dense)")
    expected = None if change == "dense" else False
    assert compare(base, other).summary.weights_identical is expected


# Settings.


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 20000.0}),
        ("rms_norm_eps", 1e-2),
        ("hidden_act", "gelu"),
        ("a_setting_of_tomorrow", 3),
    ],
)
def test_a_setting_that_enters_the_computation_is_told(setting: str, value: Any, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama(), tiny_tokenizer())
    other = save_model(tmp_path / "other", tiny_llama(), tiny_tokenizer())
    edit_json(other / "config.json", **{setting: value})
    weights, diff = weight_diff(base, other), compare(base, other)
    refused(weights, f"setting {setting}")
    for found in (weights, diff):
        assert any(note.startswith(f"settings that differ: {setting}") for note in found.notes)
        with pytest.raises(GateNotMetError):
            found.check_gates(expect="identical")


def test_settings_that_change_no_hidden_state_are_left_out() -> None:
    base = LlamaConfig(**SIZES, rms_norm_eps=1e-5)
    other = LlamaConfig(
        **{**SIZES, "vocab_size": 400},
        rms_norm_eps=float(torch.tensor(1e-5)),  # as a GGUF file stores it
        eos_token_id=7,
        attention_dropout=0.1,
        initializer_range=0.5,
        dtype="bfloat16",
        architectures=["AnotherName"],
    )
    assert settings_that_differ(base, other) == []
    assert settings_that_differ(base, perturbed(tiny_llama()).config) != []
