"""GGUF files as models: a lossless file is the checkpoint that it was written from, settings and all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from factories import notes_of, save_model, tiny_tokenizer
from ggufs import write_gguf
from lazarus import activation_diff, weight_diff
from lazarus.models import LoadedModel, LoadOptions, load_one, parse_model

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
TEXTS = [" ".join(["The capital of France is Paris."] * n) for n in (1, 2, 4)]
"""up to some eighty tokens: longer than the windows and original lengths below"""
IDS = torch.arange(3, 123).reshape(2, 60)


def tiny(model_class: Any, config_class: Any, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = SIZES if model_class is hf.GPT2LMHeadModel else {**SIZES, "intermediate_size": 96}
    model: PreTrainedModel = model_class(config_class(**{**sizes, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.1)
    return model


def llama(**settings: Any) -> PreTrainedModel:
    return tiny(hf.LlamaForCausalLM, hf.LlamaConfig, **{"num_key_value_heads": 2, **settings})


def load(path: Path) -> LoadedModel:
    return load_one(parse_model(str(path)), LoadOptions(torch.float32, torch.device("cpu")))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def llama3(
    width: int = 16, *, factor: float, low: float, high: float, original: int, base: float = 1e4
) -> NDArray[np.float32]:
    """The factors that llama.cpp's converter stores for Llama 3's rule."""
    lengths = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
    smooth = (original / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = np.where(lengths < original / high, 1.0, np.where(lengths > original / low, factor, between))
    return found.astype(np.float32)


ROPE = {"rope_theta": 1e4}
THREE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALING = "rope.scaling."
LLAMAS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, NDArray[Any]]]] = {
    "default": ({"rope_type": "default"}, {}, {}),
    "another base": ({"rope_type": "default", "rope_theta": 5e5}, {}, {}),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, **THREE},
        {},
        {"rope_freqs.weight": llama3(factor=8, low=1, high=4, original=64)},
    ),
    "llama3, of Llama 3.2": (
        {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 100, **THREE},
        {},
        {"rope_freqs.weight": llama3(factor=32, low=1, high=4, original=100)},
    ),
    "linear": (
        {"rope_type": "linear", "factor": 4.0},
        {f"{SCALING}type": "linear", f"{SCALING}factor": 4.0},
        {},
    ),
    "linear, as older files say it": ({"rope_type": "linear", "factor": 2.5}, {"rope.scale_linear": 2.5}, {}),
    "linear, by llama.cpp's default": (
        {"rope_type": "linear", "factor": 4.0},
        {f"{SCALING}factor": 4.0},
        {},
    ),
    "none, whatever its factor": (
        {"rope_type": "default"},
        {f"{SCALING}type": "none", f"{SCALING}factor": 4.0},
        {},
    ),
    "yarn": (
        YARN,
        {f"{SCALING}type": "yarn", f"{SCALING}factor": 4.0, f"{SCALING}original_context_length": 64},
        {},
    ),
    "yarn with all its parameters": (
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.7},
        {
            f"{SCALING}type": "yarn",
            f"{SCALING}factor": 4.0,
            f"{SCALING}original_context_length": 64,
            f"{SCALING}yarn_beta_fast": 16.0,
            f"{SCALING}yarn_beta_slow": 2.0,
            f"{SCALING}yarn_attn_factor": 0.7,
            f"{SCALING}yarn_ext_factor": 1.0,
        },
        {},
    ),
    "longrope": (
        {
            "rope_type": "longrope",
            "short_factor": [1.0 + i / 4 for i in range(8)],
            "long_factor": [1.0 + i for i in range(8)],
            "original_max_position_embeddings": 32,
            "attention_factor": 1.5,
        },
        {
            f"{SCALING}type": "longrope",
            f"{SCALING}original_context_length": 32,
            f"{SCALING}attn_factor": 1.5,
        },
        {
            "rope_factors_short.weight": 1 + np.arange(8, dtype=np.float32) / 4,
            "rope_factors_long.weight": 1 + np.arange(8, dtype=np.float32),
        },
    ),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_the_positions_of_a_gguf_file_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    rope, keys, tensors = LLAMAS[name]
    model = llama(rope_parameters={**ROPE, **rope})
    base = save_model(tmp_path / "base", model, tiny_tokenizer())
    path = write_gguf(tmp_path / "model.gguf", "llama", model, keys, tensors)
    loaded = load(path)
    assert loaded.notes == ()
    assert loaded.model.config.rope_parameters == model.config.rope_parameters
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=0, atol=1e-5)
    diff = activation_diff(base, path, TEXTS)
    assert diff.summary.weights_identical, diff.notes
    assert max(row.divergence for row in diff.layers if row.divergence is not None) < 1e-9
    weights = weight_diff(base, path)
    assert weights.summary.verdict == "identical", weights.notes
    assert weights.record.unmatched == []


@pytest.mark.parametrize("few", [True, False])
def test_factors_that_no_rule_gives_are_applied_one_by_one(few: bool, tmp_path: Path) -> None:
    factors = np.array([1, 1, 1, 1, 1, 3, 8, 8] if few else [1, 1, 2, 1, 5, 3, 8, 8], dtype=np.float32)
    model = llama()
    path = write_gguf(tmp_path / "model.gguf", "llama", model, tensors={"rope_freqs.weight": factors})
    stack = load(path).model.model
    plain = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(
        stack.rotary_emb.inv_freq, plain / torch.from_numpy(factors), rtol=1e-6, atol=0
    )
    assert stack.rotary_emb.attention_scaling == 1
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.copy_(plain / torch.from_numpy(factors))
    torch.testing.assert_close(logits(load(path).model), logits(model), rtol=0, atol=1e-5)


def test_llama_s_own_factors_are_recognised(tmp_path: Path) -> None:
    factors = llama3(128, factor=8, low=1, high=4, original=8192, base=5e5)
    model = llama(head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    path = write_gguf(tmp_path / "model.gguf", "llama", model, tensors={"rope_freqs.weight": factors})
    assert load(path).model.config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        **THREE,
    }


@pytest.mark.parametrize(
    ("keys", "tensors"),
    [
        ({f"{SCALING}type": "dynamic", f"{SCALING}factor": 2.0}, {}),
        ({f"{SCALING}type": "longrope"}, {"rope_factors_long.weight": np.ones(8, dtype=np.float32)}),
        ({f"{SCALING}type": "yarn", f"{SCALING}factor": 2.0, f"{SCALING}yarn_ext_factor": 0.5}, {}),
        ({"rope.dimension_count": 8}, {}),
        ({"rope.freq_base_swa": 5e5}, {}),
        ({}, {"rope_freqs.weight": np.ones(3, dtype=np.float32)}),
    ],
)
def test_positions_that_transformers_cannot_have_are_told(
    keys: dict[str, Any], tensors: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    model = llama()
    base = save_model(tmp_path / "base", model, tiny_tokenizer())
    path = write_gguf(tmp_path / "model.gguf", "llama", model, keys, tensors)
    for diff in (activation_diff(base, path, TEXTS), weight_diff(base, path)):
        told = notes_of(diff, "gguf-settings")
        assert told
        assert all("rope" in note and str(path) in note for note in told)


Family = tuple[str, Callable[[], PreTrainedModel], Mapping[str, Any], Mapping[str, NDArray[Any]]]
QUARTERS = 1 + np.arange(4, dtype=np.float32) / 4
FAMILIES: dict[str, Family] = {
    "biases": ("llama", lambda: llama(attention_bias=True, mlp_bias=True), {}, {}),
    "a head of its own width": (
        "qwen3",
        lambda: tiny(hf.Qwen3ForCausalLM, hf.Qwen3Config, num_key_value_heads=2, head_dim=24),
        {},
        {},
    ),
    "yarn in another family": (
        "qwen2",
        lambda: tiny(
            hf.Qwen2ForCausalLM, hf.Qwen2Config, num_key_value_heads=2, rope_parameters={**ROPE, **YARN}
        ),
        {f"{SCALING}type": "yarn", f"{SCALING}factor": 4.0, f"{SCALING}original_context_length": 64},
        {},
    ),
    "a partial rotation, LongRoPE and a window": (
        "phi3",
        lambda: tiny(
            hf.Phi3ForCausalLM,
            hf.Phi3Config,
            num_key_value_heads=2,
            original_max_position_embeddings=32,
            sliding_window=6,
            partial_rotary_factor=0.5,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": QUARTERS.tolist(),
                "long_factor": (2 * QUARTERS).tolist(),
            },
        ),
        {
            "rope.dimension_count": 8,
            f"{SCALING}original_context_length": 32,
            f"{SCALING}attn_factor": math.sqrt(1 + math.log(8) / math.log(32)),
            "attention.sliding_window": 6,
        },
        {"rope_factors_short.weight": QUARTERS, "rope_factors_long.weight": 2 * QUARTERS},
    ),
    "soft-caps, a window and the width of a head": (
        "gemma2",
        lambda: tiny(
            hf.Gemma2ForCausalLM,
            hf.Gemma2Config,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=4,
            attn_logit_softcapping=10.0,
            final_logit_softcapping=5.0,
        ),
        {"attention.sliding_window": 4, "attn_logit_softcapping": 10.0, "final_logit_softcapping": 5.0},
        {},
    ),
    "another rope in every sixth layer": (
        "gemma3",
        lambda: tiny(
            hf.Gemma3ForCausalLM,
            hf.Gemma3TextConfig,
            num_hidden_layers=6,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=4,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
        ),
        {
            "attention.sliding_window": 4,
            "rope.freq_base_swa": 2e4,
            f"{SCALING}type": "linear",
            f"{SCALING}factor": 8.0,
        },
        {},
    ),
    "the base of the frequencies": (
        "starcoder2",
        lambda: tiny(
            hf.Starcoder2ForCausalLM,
            hf.Starcoder2Config,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        ),
        {},
        {},
    ),
    "a partial rotation": (
        "stablelm",
        lambda: tiny(
            hf.StableLmForCausalLM, hf.StableLmConfig, num_key_value_heads=2, partial_rotary_factor=0.5
        ),
        {"rope.dimension_count": 8, "use_parallel_residual": False},
        {},
    ),
    "norms stored as 1 + weight": (
        "nemotron",
        lambda: tiny(
            hf.NemotronForCausalLM,
            hf.NemotronConfig,
            num_key_value_heads=2,
            head_dim=16,
            partial_rotary_factor=0.25,
        ),
        {"rope.dimension_count": 4},
        {},
    ),
    "no rope at all": ("gpt2", lambda: tiny(hf.GPT2LMHeadModel, hf.GPT2Config, n_ctx=256), {}, {}),
    "experts of their own width": (
        "qwen3moe",
        lambda: tiny(
            hf.Qwen3MoeForCausalLM,
            hf.Qwen3MoeConfig,
            num_key_value_heads=2,
            head_dim=16,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
        {},
    ),
    "what transformers reads by its newer tables": (
        "lfm2",
        lambda: tiny(
            hf.Lfm2ForCausalLM,
            hf.Lfm2Config,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
            tie_word_embeddings=True,
        ),
        {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3},
        {},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_settings_of_a_gguf_file_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    architecture, build, keys, tensors = FAMILIES[name]
    model = build()
    base = save_model(tmp_path / "base", model, tiny_tokenizer())
    path = write_gguf(tmp_path / "model.gguf", architecture, model, keys, tensors)
    loaded = load(path)
    assert loaded.notes == ()
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=0, atol=1e-4)
    diff = activation_diff(base, path, TEXTS)
    assert diff.record.finetuned.not_compared == []
    assert max(row.divergence for row in diff.layers if row.divergence is not None) < 1e-9
    weights = weight_diff(base, path)
    assert weights.record.unmatched == []
    stored_plus_one = architecture in ("gemma2", "gemma3", "nemotron")  # w + 1 - 1 is not always w
    changes = [row.max_abs_change for row in weights.results if row.max_abs_change is not None]
    assert len(changes) == len(weights.results)
    assert max(changes) <= (1e-7 if stored_plus_one else 0)


def test_another_setting_is_told_by_both_commands(tmp_path: Path) -> None:
    architecture, build, keys, tensors = FAMILIES["soft-caps, a window and the width of a head"]
    base = save_model(tmp_path / "base", build(), tiny_tokenizer())
    other = {**keys, "attn_logit_softcapping": 20.0}
    path = write_gguf(tmp_path / "model.gguf", architecture, build(), other, tensors)
    for diff in (activation_diff(base, path, TEXTS), weight_diff(base, path)):
        assert any("attn_logit_softcapping (10.0 in base, 20.0 in fine-tuned)" in note for note in diff.notes)


@pytest.mark.parametrize(("n_blocks", "scalar"), [(46, 16), (45, 24)])
def test_the_attention_of_the_largest_gemma_is_scaled_by_the_hidden_size(
    n_blocks: int, scalar: int, tmp_path: Path
) -> None:
    model = tiny(
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config,
        num_hidden_layers=n_blocks,
        intermediate_size=8,
        num_key_value_heads=1,
        head_dim=24,
    )
    path = write_gguf(tmp_path / "model.gguf", "gemma2", model, {"attention.sliding_window": 4096})
    assert load(path).model.config.query_pre_attn_scalar == scalar


def test_what_the_file_does_not_say_of_a_setting_is_told(tmp_path: Path) -> None:
    architecture, build, keys, _ = FAMILIES["soft-caps, a window and the width of a head"]
    left = {key: value for key, value in keys.items() if key != "final_logit_softcapping"}
    path = write_gguf(tmp_path / "model.gguf", architecture, build(), left)
    (told,) = load(path).notes
    assert (
        told.text
        == f"{path}: not in the file, and taken from the model's class: final_logit_softcapping = 30.0"
    )


def test_a_key_that_goes_nowhere_is_named_unless_it_changes_nothing(tmp_path: Path) -> None:
    inert = {
        "rope.scaling.finetuned": True,
        "tensor_data_layout": "Meta AI original pth",
        "pooling_type": 3,
        "attention.causal": True,
        "attention.scale": 0.25,
        "attention.value_length": 16,
        "logit_scale": 1.0,
        "embedding_scale": 0.0,
        "expert_count": 0,
        "rope.dimension_count": 16,
    }
    assert load(write_gguf(tmp_path / "inert.gguf", "llama", llama(), inert)).notes == ()
    telling = {"logit_scale": 0.0625, "attention.causal": False, "attention.scale": 0.5, "expert_count": 8}
    path = write_gguf(tmp_path / "model.gguf", "llama", llama(), telling)
    (told,) = load(path).notes
    for key, value in telling.items():
        assert f"llama.{key} = {value}" in told.text


def test_tensors_without_a_place_are_told_and_are_not_called_compared(tmp_path: Path) -> None:
    model = llama()
    base = save_model(tmp_path / "base", model, tiny_tokenizer())
    more = {"blk.1.attn_q_norm.weight": np.ones(16, dtype=np.float32)}
    path = write_gguf(tmp_path / "model.gguf", "llama", model, tensors=more)
    diff = activation_diff(base, path, TEXTS)
    assert any("first blk.1.attn_q_norm.weight; they were left out" in note for note in diff.notes)
    (part,) = diff.record.finetuned.not_compared
    assert (part.n_tensors, part.differs) == (1, True)
    assert "layers.1.attn_q_norm" in part.what
    twice = activation_diff(path, path, TEXTS)
    assert [part.differs for part in twice.record.finetuned.not_compared] == [False]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_a_number_that_was_stored_in_float32_is_the_one_it_was(kind: str, tmp_path: Path) -> None:
    model = llama(rms_norm_eps=1e-5, tie_word_embeddings=True)
    path = write_gguf(tmp_path / "model.gguf", "llama", model, {f"{SCALING}factor": 1.1})
    options = LoadOptions(getattr(torch, kind), torch.device("cpu"))
    loaded = load_one(parse_model(str(path)), options)
    assert (loaded.model.config.rms_norm_eps, loaded.run_dtype) == (1e-5, kind)
    assert loaded.model.config.rope_parameters["factor"] == 1.1
    expected = {name: tensor.to(options.dtype) for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())


def test_qwen_3_5_is_what_transformers_loads(tmp_path: Path) -> None:
    model = tiny(
        hf.Qwen3_5ForCausalLM,
        hf.Qwen3_5TextConfig,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    keys = {
        "ssm.conv_kernel": 4,
        "ssm.state_size": 8,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 32,
        "full_attention_interval": 4,
        "rope.dimension_sections": [1, 1, 0, 0],
        "rope.dimension_count": 4,
    }
    path = write_gguf(tmp_path / "model.gguf", "qwen35", model, keys)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=str(path), dtype=torch.float32)
    ours = load(path)
    assert ours.notes == ()
    assert all(torch.equal(t, ours.model.state_dict()[name]) for name, t in theirs.state_dict().items())
    folder = save_model(tmp_path / "theirs", theirs, tiny_tokenizer())
    diff = weight_diff(folder, path)
    assert (diff.summary.verdict, diff.record.unmatched) == ("identical", [])
