"""Adapters on a model of another class than the one that they were trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
)

import lazarus
from factories import save_model, tiny_llama, tiny_tokenizer
from layouts import compare
from lazarus.errors import AdapterError, GateNotMetError

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def gemma_config(n_vision_layers: int = 3) -> Gemma3Config:
    """A multimodal model whose tower has modules of the same names and sizes as its text stack."""
    return Gemma3Config(
        text_config={**SIZES, "num_key_value_heads": 4, "head_dim": 8},
        vision_config={**SIZES, "num_hidden_layers": n_vision_layers, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=299,
    )


def tuned(model: Any, folder: Path, **settings: Any) -> PeftModel:
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **settings))
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped.eval()


def relative_changes(base: nn.Module, finetuned: nn.Module, text: str) -> list[float]:
    """The relative L2 of each hidden state but the first and the last, by the two models' own forward."""
    ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        ours, theirs = (m(ids, output_hidden_states=True).hidden_states[1:-1] for m in (base, finetuned))
    pairs = [(b[0, 1:].double(), f[0, 1:].double()) for b, f in zip(ours, theirs, strict=True)]
    return [float(((f - b).norm(dim=-1) / b.norm(dim=-1)).mean()) for b, f in pairs]


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], "all-linear"])
def test_a_text_adapter_goes_onto_the_text_stack_of_a_multimodal_model(targets: Any, tmp_path: Path) -> None:
    """The tower has a q_proj of that shape too, and stays as it is."""
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(gemma_config()).eval()
    base = save_model(tmp_path / "base", whole, tiny_tokenizer())
    texts = [Gemma3ForCausalLM(gemma_config().text_config).eval() for _ in range(2)]
    for text in texts:
        text.model.load_state_dict(whole.model.language_model.state_dict())
    wrapped = tuned(texts[1], tmp_path / "adapter", target_modules=targets, task_type="CAUSAL_LM")
    diff = lazarus.activation_diff(base, tmp_path / "adapter", ["Hello"], position="all")
    for layer, expected in zip(diff.layers, relative_changes(texts[0], wrapped, "Hello"), strict=False):
        assert layer.relative_l2 == pytest.approx(expected, rel=1e-4)
    assert [part.differs for part in diff.record.finetuned.not_compared] == [False, False]
    merged = wrapped.merge_and_unload()
    whole.model.language_model.load_state_dict(merged.model.state_dict())
    found = lazarus.weight_diff(base, tmp_path / "adapter")
    expected_diff = lazarus.weight_diff(base, save_model(tmp_path / "merged", whole, tiny_tokenizer()))
    for ours, theirs in zip(found.record.results, expected_diff.record.results, strict=True):
        assert (ours.layer, ours.component) == (theirs.layer, theirs.component)
        assert ours.relative_change == pytest.approx(theirs.relative_change, rel=1e-4)


def test_an_adapter_of_a_tower_does_not_fit_a_model_without_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = save_model(tmp_path / "text", Gemma3ForCausalLM(gemma_config().text_config), tiny_tokenizer())
    tower = r".*vision_tower.*\.mlp\.fc1"
    tuned(Gemma3ForConditionalGeneration(gemma_config()), tmp_path / "adapter", target_modules=tower)
    with pytest.raises(AdapterError, match=r"does not fit Gemma3ForCausalLM: 8 of its tensors.*vision_tower"):
        compare(text, f"{text}+{tmp_path / 'adapter'}")


def test_what_an_adapter_brings_besides_is_no_part_of_a_claim(tmp_path: Path) -> None:
    """An untrained LoRA changes nothing, and the score head beside it is none of the base's."""
    base = save_model(tmp_path / "base", tiny_llama(), tiny_tokenizer())
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        wrapped.get_base_model().score.modules_to_save["default"].weight.add_(1)
    wrapped.save_pretrained(tmp_path / "other")
    diff = compare(base, tmp_path / "one")
    assert [(p.what, p.differs) for p in diff.record.finetuned.not_compared] == [("score head (score)", True)]
    with pytest.raises(GateNotMetError, match="score head"):
        diff.check_gates(expect="identical")
    one, other = (f"{base}+{tmp_path / name}" for name in ("one", "other"))
    assert [p.differs for p in compare(one, other).record.base.not_compared] == [True]
    compare(one, one).check_gates(expect="identical")
    weights = lazarus.weight_diff(base, tmp_path / "one")
    assert [(each.component, each.base_shape) for each in weights.record.unmatched] == [("score", None)]


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_rows_that_an_adapter_does_not_bring_are_not_made_up(memory: Any, tmp_path: Path) -> None:
    """Trained on a model with more rows, of which the adapter holds those of the embedding alone."""
    base = save_model(tmp_path / "base", tiny_llama(), tiny_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(308, mean_resizing=False)
    tuned(model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(AdapterError, match=r"a vocabulary of 308 rows, the model has \d+, and what lm_head"):
        lazarus.activation_diff(base, tmp_path / "adapter", ["Hello"], memory=memory)
