"""Every kind of checkpoint: architectures, quantised ones, and what a checkpoint lacks or adds."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from factories import notes_of, notes_on_models, perturbed, save_model, tiny_llama, tiny_tokenizer
from layouts import compare, edit_json, edit_weights, most, save_fp8, save_sentence_transformer, store_codes
from lazarus import ActivationDiff
from lazarus.errors import UnsupportedModelError, WeightsError

BERT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def expected(base_folder: Path, finetuned_folder: Path) -> ActivationDiff:
    return compare(base_folder, finetuned_folder)


# --- Architectures


@pytest.fixture(scope="module")
def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**BERT)).eval()


@pytest.mark.parametrize("subfolder", ["", "0_Transformer"])
def test_a_sentence_transformer_is_its_transformer(subfolder: str, tmp_path: Path, bert: BertModel) -> None:
    base = save_model(tmp_path / "base", bert, tiny_tokenizer())
    plain = save_model(tmp_path / "plain", perturbed(bert), tiny_tokenizer())
    folder = save_sentence_transformer(tmp_path / "st", subfolder, perturbed(bert), tiny_tokenizer())
    diff = compare(base, folder)
    assert diff.results == compare(base, plain).results
    assert diff.record.finetuned.stored_dtype == "float32"
    assert notes_on_models(diff) == [
        "not compared: pooler (pooler): differs; Pooling module (1_Pooling): only fine-tuned has it",
        f"only {folder} gives scores or embeddings: the effect on the output was not measured",
    ]


def test_an_encoder_is_compared_over_the_mean_and_needs_no_pooler(tmp_path: Path, bert: BertModel) -> None:
    base = save_model(tmp_path / "base", bert, tiny_tokenizer())
    masked = BertForMaskedLM(bert.config).eval()
    masked.bert.load_state_dict(bert.state_dict(), strict=False)
    without = save_model(
        tmp_path / "without", BertModel(bert.config, add_pooling_layer=False), tiny_tokenizer()
    )
    other = compare(base, save_model(tmp_path / "masked", masked, tiny_tokenizer()))
    assert (most(other), other.record.settings.position) == (0, "mean")
    assert notes_on_models(other) == [
        "not compared: pooler (pooler): only base has it; LM head (cls): only fine-tuned has it"
    ]
    diff = compare(base, without)
    assert diff.record.settings.position == "mean"
    missing, outside = notes_on_models(diff)
    assert "2 tensors that play no part in the comparison are missing" in missing
    assert "pooler.dense" in missing
    assert outside == "not compared: pooler (pooler): only base has it"


def test_an_encoder_decoder_is_its_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    settings = T5Config(vocab_size=300, num_layers=3, num_decoder_layers=2, pad_token_id=2, **sizes)
    model = T5ForConditionalGeneration(settings).eval()
    base = save_model(tmp_path / "base", model, tiny_tokenizer())
    named = compare(base, save_model(tmp_path / "tuned", perturbed(model), tiny_tokenizer()))
    in_memory = compare(model, perturbed(model), tokenizer=tiny_tokenizer())
    assert named.results == in_memory.results
    assert (named.record.base.n_layers, named.record.settings.position) == (3, "mean")
    for diff in (named, in_memory):
        *notes, outside = notes_on_models(diff)
        assert all("an encoder-decoder: its encoder is compared" in note for note in notes)
        assert len(notes) in (1, 2)
        assert outside == "not compared: decoder (decoder): differs"


def test_a_multimodal_model_is_its_text_stack(tmp_path: Path) -> None:
    torch.manual_seed(0)
    both = {"num_hidden_layers": 3, "intermediate_size": 64}
    settings = Gemma3Config(
        text_config={**BERT, **both, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
        vision_config={
            **both,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=299,
    )
    whole = Gemma3ForConditionalGeneration(settings).eval()
    text = Gemma3ForCausalLM(settings.text_config).eval()
    text.model.load_state_dict(whole.model.language_model.state_dict())
    multimodal = save_model(tmp_path / "multimodal", whole, tiny_tokenizer())
    diff = compare(multimodal, save_model(tmp_path / "text", text, tiny_tokenizer()))
    assert (most(diff), diff.record.base.n_layers) == (0, 3)
    parts, settings = notes_on_models(diff)
    assert parts == (
        "not compared: projector (model.multi_modal_projector): only base has it; "
        "vision tower (model.vision_tower): only base has it"
    )
    assert settings.startswith(
        "settings that differ: vision_config (only base has it); mm_tokens_per_image (4 "
    )

    blind = edit_weights(multimodal, tmp_path / "blind", _without("vision"))
    diff = compare(multimodal, blind)
    assert most(diff) == 0
    missing, outside = notes_on_models(diff)
    assert "play no part in the comparison are missing, first model.vision_tower" in missing
    assert "vision tower (model.vision_tower): only base has it" in outside


def _without(part: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


# --- Quantised checkpoints


def test_a_quantised_checkpoint_runs_in_its_own_type(tmp_path: Path, finetuned_folder: Path) -> None:
    folder = save_fp8(tmp_path / "fp8", perturbed(tiny_llama()), tiny_tokenizer())
    diff = compare(finetuned_folder, folder, dtype="float32", dequantize="never")
    info = diff.record.finetuned
    assert (info.stored_dtype, info.run_dtype) == ("F8_E4M3", "bfloat16")
    assert 1e-3 < most(diff) < 0.2
    assert f"{folder} is quantised and runs in its own type: --dtype did not apply to it" in diff.notes


@pytest.mark.parametrize(
    ("settings", "module", "package"),
    [
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao", "torchao"),
        ({"quant_method": "quanto", "weights": "int8"}, "optimum", "optimum-quanto"),
        ({"quant_method": "compressed-tensors"}, "compressed_tensors", "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "optimum", "optimum"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel", "gptqmodel"),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, Mapping) else "",
)
def test_a_quantisation_without_its_package_is_refused_by_name(
    settings: dict[str, Any], module: str, package: str, tmp_path: Path, base_folder: Path
) -> None:
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed here")
    folder = tmp_path / "quantised"
    shutil.copytree(base_folder, folder)
    store_codes(folder, **settings)
    with pytest.raises(UnsupportedModelError, match=package) as refusal:
        compare(base_folder, folder, dequantize="never")
    assert str(folder) in str(refusal.value)


# --- What the checkpoint says of itself


def test_the_stored_type_is_the_files_and_not_the_runs(tmp_path: Path, base_folder: Path) -> None:
    model = perturbed(tiny_llama()).to(torch.bfloat16)
    folder = save_model(tmp_path / "half", model, tiny_tokenizer())
    for dtype in ("float32", "bfloat16"):
        info = compare(base_folder, folder, dtype=dtype).record.finetuned
        assert (info.stored_dtype, info.run_dtype) == ("bfloat16", dtype)
        assert (info.kind, info.revision, info.adapter) == ("folder", None, None)
        assert (info.id, info.architecture) == (str(folder), "LlamaForCausalLM")


def _headless(folder: Path) -> Path:
    return save_model(folder, perturbed(tiny_llama()).model, tiny_tokenizer())


def _classifier(folder: Path) -> Path:
    model = LlamaForSequenceClassification(tiny_llama().config)
    model.model.load_state_dict(perturbed(tiny_llama()).model.state_dict())
    return save_model(folder, model, tiny_tokenizer())


def _nameless(folder: Path) -> Path:
    save_model(folder, perturbed(tiny_llama()), tiny_tokenizer())
    edit_json(folder / "config.json", architectures=None)
    return folder


@pytest.mark.parametrize(
    ("save", "architecture"),
    [
        (_headless, "LlamaModel"),
        (_classifier, "LlamaForSequenceClassification"),
        (_nameless, "LlamaForCausalLM"),
    ],
)
def test_the_head_does_not_matter(
    save: Any, architecture: str, tmp_path: Path, base_folder: Path, expected: ActivationDiff
) -> None:
    diff = compare(base_folder, save(tmp_path / "model"))
    assert diff.results == expected.results
    assert diff.record.finetuned.architecture == architecture
    has_head = architecture == "LlamaForCausalLM"
    assert (diff.record.output is not None) == has_head
    assert any("the effect on the output was not measured" in note for note in diff.notes) != has_head


def test_tensors_without_a_place_are_noted(
    tmp_path: Path, base_folder: Path, finetuned_folder: Path, expected: ActivationDiff
) -> None:
    more = {"model.extra": torch.zeros(2), "value_head.weight": torch.zeros(3)}
    folder = edit_weights(finetuned_folder, tmp_path / "more", lambda tensors: tensors.update(more))
    diff = compare(base_folder, folder)
    assert diff.results == expected.results
    assert notes_on_models(diff) == [
        f"{folder}: 2 tensors of the checkpoint have no place in LlamaForCausalLM, first model.extra; "
        "they were left out",
        "not compared: model.extra: only fine-tuned has it; score head (value_head): only fine-tuned has it",
    ]


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_an_error(name: str, tmp_path: Path, finetuned_folder: Path) -> None:
    folder = edit_weights(finetuned_folder, tmp_path / "less", _without(name))
    with pytest.raises(WeightsError, match=name):
        compare(finetuned_folder, folder)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    model: PreTrainedModel = tiny_llama(tie_word_embeddings=True)
    folder = save_model(tmp_path / "tied", model, tiny_tokenizer())
    diff = compare(folder, model)
    assert most(diff) == 0
    assert len(notes_on_models(diff)) == 1, "only that the model in memory has no tokenizer"


# What a folder holds besides


def test_two_sets_of_weights_are_refused_until_it_is_said_which(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "out", tiny_llama(), tiny_tokenizer())
    save_model(folder, perturbed(tiny_llama()), max_shard_size="60KB")
    other = save_model(tmp_path / "other", perturbed(tiny_llama()), tiny_tokenizer())
    with pytest.raises(WeightsError, match=r"holds two sets of weights, model\.safetensors and model\.safe"):
        compare(other, folder)
    named = folder / "model.safetensors.index.json"
    assert compare(other, named).summary.verdict == "identical"
    assert compare(other, folder / "model.safetensors").summary.verdict == "changed"


def test_files_that_were_not_read_are_told(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "out", tiny_llama(), tiny_tokenizer())
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"0")
    diff = compare(save_model(tmp_path / "base", tiny_llama(), tiny_tokenizer()), folder)
    [note] = notes_of(diff, "other-weights")
    assert "model.fp16.safetensors" in note
    assert "pytorch_model.bin" in note
