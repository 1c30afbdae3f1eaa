"""The NumPy runtime against transformers, and its faults: each is where it was planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from factories import save_model, tiny_llama
from numpy_llama import SIZES, Array, Defect, Fault, forward, read_model, to_bfloat16
from reference import block_outputs, run_whole

IDS = [5, 17, 255, 3, 99, 42, 17, 5, 120, 7]
LAYER = 2


def tiny_mistral(window: int = 4) -> MistralForCausalLM:
    config = tiny_llama().config.to_dict()
    torch.manual_seed(3)
    kept = {
        k: v for k, v in config.items() if k not in ("model_type", "architectures", "transformers_version")
    }
    return MistralForCausalLM(MistralConfig(**kept | {"sliding_window": window})).eval()


def with_biases() -> LlamaForCausalLM:
    model = tiny_llama(seed=4, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


MODELS = {
    "plain": tiny_llama,
    "untied head, wide heads": lambda: tiny_llama(seed=1, head_dim=16, tie_word_embeddings=False),
    "biases": with_biases,
    "sliding window": tiny_mistral,
}


@pytest.mark.parametrize("kind", MODELS)
def test_float32_gives_the_states_of_transformers(kind: str, tmp_path: Path) -> None:
    model: PreTrainedModel = MODELS[kind]()
    config, weights = read_model(save_model(tmp_path, model))
    found = forward(weights, config, IDS, logits=True)
    for layer, states in enumerate(block_outputs(model, model.model.layers, IDS)):
        assert relative(found[f"resid_post.{layer}"], states) < 1e-5
    output: Any = run_whole(model, IDS, output_hidden_states=True)
    assert relative(found["embedding"], output.hidden_states[0][0].numpy()) == 0
    assert relative(found["final_norm"], output.hidden_states[-1][0].numpy()) < 1e-5
    assert relative(found["logits"], output.logits[0].numpy()) < 1e-5


def test_bfloat16_is_as_close_to_transformers_as_bfloat16_can_be(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    config, weights = read_model(save_model(tmp_path, model))
    found = forward(weights, config, IDS, dtype="bfloat16")
    exact = forward(weights, config, IDS)
    for layer, states in enumerate(block_outputs(model, model.model.layers, IDS)):
        site = f"resid_post.{layer}"
        np.testing.assert_array_equal(found[site], to_bfloat16(found[site]))
        # Both are roundings of one exact value: neither is further from the other than from that, by much.
        assert relative(found[site], states) < 1.5 * relative(exact[site], states) < 0.02


@pytest.mark.parametrize("value", [1.0, -1.00390625, 1.01171875, 3.3895314e38, 1e-40, 0.1])
def test_bfloat16_is_rounded_as_torch_does(value: float) -> None:
    ours = to_bfloat16(np.array([value, -value, np.inf, np.nan], dtype=np.float32))
    theirs = torch.tensor([value, -value, torch.inf, torch.nan]).bfloat16().float().numpy()
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("fault", SIZES)
def test_a_fault_changes_the_states_from_its_block_on(fault: Fault, tmp_path: Path) -> None:
    model: PreTrainedModel = {"missing_bias": with_biases, "sliding_window": tiny_mistral}.get(
        fault, tiny_llama
    )()
    config, weights = read_model(save_model(tmp_path, model))
    sound = forward(weights, config, IDS)
    faulty = forward(weights, config, IDS, defect=Defect(fault, LAYER))
    for layer in range(LAYER):
        np.testing.assert_array_equal(faulty[f"resid_post.{layer}"], sound[f"resid_post.{layer}"])
    for layer in range(LAYER, config["num_hidden_layers"]):
        assert not np.array_equal(faulty[f"resid_post.{layer}"], sound[f"resid_post.{layer}"])


def relative(ours: Array, theirs: Array) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
