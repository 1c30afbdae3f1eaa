"""Tied embeddings of which one side alone is changed: every number is what PEFT's own forward pass gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lazarus
from factories import save_model, tiny_llama, tiny_tokenizer
from layouts import PROMPTS, edit_json, edit_weights, save_adapter
from lazarus.models import layout

MEMORY = ("resident", "stream")
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "LoRA on the head": {"target_modules": ["lm_head"]},
    "LoRA on both": {"target_modules": ["embed_tokens", "lm_head"]},
    "LoRA on the tie": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 41, 78]},
    "a new embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "a new head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both anew": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "both anew and tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}


@dataclass(frozen=True)
class Seen:
    """What a model's own forward pass gives at the last token of each prompt."""

    layers: Tensor
    logits: Tensor


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def seen(model: Any) -> Seen:
    layers, logits = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
        # The first is the embedding, and the last is what leaves the final norm.
        layers.append(torch.stack([states[0, -1].double() for states in output.hidden_states[1:-1]]))
        logits.append(output.logits[0, -1].double())
    return Seen(torch.stack(layers), torch.stack(logits))


def assert_is(diff: lazarus.ActivationDiff, base: Seen, finetuned: Seen) -> None:
    one, other = (s.layers / s.layers.norm(dim=-1, keepdim=True) for s in (base, finetuned))
    expected = ((one - other).square().sum(-1) / 2).mean(0)
    found = torch.tensor([layer.divergence for layer in diff.layers[:-1]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-10)
    log_p, log_q = (s.logits.log_softmax(-1) for s in (base, finetuned))
    assert diff.record.output is not None
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert diff.record.output.kl_base_finetuned == pytest.approx(kl, rel=1e-4, abs=1e-9)


def compare(base: object, finetuned: object, memory: str) -> lazarus.ActivationDiff:
    options: dict[str, Any] = {"memory": memory, "no_noise_floor": True}
    return lazarus.activation_diff(str(base), str(finetuned), PROMPTS, **options)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied") / "base"
    return save_model(folder, tiny_llama(tie_word_embeddings=True), tiny_tokenizer())


@pytest.mark.filterwarnings("ignore:.*tie[d_]")  # PEFT, that a layer is tied, or no longer is
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_on_one_side_of_a_tie(kind: str, memory: str, tied: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **ADAPTERS[kind])
    save_adapter(adapter, tied, config)
    live = PeftModel.from_pretrained(load(tied), adapter).eval()
    before, after = seen(load(tied)), seen(live)
    merged = save_model(tmp_path / "merged", live.merge_and_unload(), tiny_tokenizer())
    with_adapter = f"{tied}+{adapter}"
    assert_is(compare(tied, with_adapter, memory), before, after)
    # PEFT merges a LoRA on the embedding into the head as well, which its forward pass does not do.
    assert_is(compare(with_adapter, merged, memory), after, seen(load(merged)))


# --- One configuration ties, and the other does not


def variants(tied: Path, folder: Path) -> dict[str, Path]:
    """The same embedding and head in every way to store them, and two other heads."""

    def with_head(tensors: dict[str, Tensor], plus: float = 0.0) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + plus

    made = {"tied": tied}
    for name, plus, ties in (
        ("stored twice", 0.0, True),
        ("untied", 0.0, False),
        ("another head", 0.1, True),
        ("another head, untied", 0.1, False),
    ):
        made[name] = edit_weights(tied, folder / name, partial(with_head, plus=plus))
        edit_json(made[name] / "config.json", tie_word_embeddings=ties)

    def under_the_heads_name(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    made["stored as the head"] = edit_weights(tied, folder / "stored as the head", under_the_heads_name)
    return made


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(one, other) for one in names for other in names if one != other]


@pytest.mark.parametrize(("memory", "is_large"), [("resident", False), ("stream", False), ("stream", True)])
def test_ties_that_one_checkpoint_alone_has(
    memory: str, is_large: bool, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large embedding is read by rows, and a large head of its own when it is needed."""
    if is_large:
        monkeypatch.setattr(layout, "SMALL_BYTES", 0)
    folders = variants(tied, tmp_path)
    models = {name: load(folder) for name, folder in folders.items()}
    expected = {name: seen(model) for name, model in models.items()}
    for one, other in pairs(list(folders)):
        diff = compare(folders[one], folders[other], memory)
        assert_is(diff, expected[one], expected[other])
        same = torch.equal(models[one].lm_head.weight, models[other].lm_head.weight)
        assert diff.summary.weights_identical is same, (one, other)
        assert (diff.summary.verdict == "identical") is same, (one, other)
