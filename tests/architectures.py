"""Tiny, random, real transformers models: one of every causal architecture, and a few others.

Every model is made from the architecture's own default configuration: its sizes are shrunk by
the names of their attributes, its layers are thinned to one of each kind, and its weights are drawn
large enough for tokens to mix, so that a mistake in what reads the hidden states is visible.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

_HEADS: dict[str, Mapping[str, Any]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}

CAUSAL: tuple[str, ...] = tuple(sorted(_HEADS["causal"]))
ENCODERS: tuple[str, ...] = (
    "albert:masked",
    "bert:masked",
    "deberta:masked",
    "deberta-v2:masked",
    "distilbert:masked",
    "electra:masked",
    "modernbert:masked",
    "mpnet:masked",
    "roberta:masked",
    "xlm-roberta:masked",
)
ENCODER_DECODERS: tuple[str, ...] = (
    "bart:seq2seq",
    "mbart:seq2seq",
    "mt5:seq2seq",
    "pegasus:seq2seq",
    "t5:seq2seq",
)
MULTIMODAL: tuple[str, ...] = ("gemma3",)

UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs the packages timm and pillow (gemma3n_text is its text)",
    "gemma4_assistant": "no forward of its own: it reads the keys and values of a target model",
    "gemma4_unified_assistant": "no forward of its own: it reads the keys and values of a target",
}

REFUSED: dict[str, str] = {
    "blt": "no single stack of blocks over tokens",
    "cpmant": "no place for each token",
    "prophetnet": "no place for each token",
    "reformer": "no common residual stream",
    "xlm": "its blocks cannot be found",
}
"""Architectures that are refused, and a part of the reason that the user reads."""

WITHOUT_HEAD: dict[str, str] = {
    "xlnet": "every token sees every other, so there is no next token",
}
"""Causal language models by name whose effect on the output is not measured, and why."""

WITHOUT_READOUT: dict[str, str] = {
    **WITHOUT_HEAD,
    "deepseek_v4": "its residual stream has several parallel streams, which are joined before the norm",
    "gemma3n_text": "its residual stream has several parallel streams, which are joined before the norm",
    "hy_v4": "its residual stream has several parallel streams, which are joined before the norm",
    "inkling2_loop_text": "what leaves its last block is mixed with the states of earlier blocks",
    "inkling2_text": "what leaves its last block is mixed with the states of earlier blocks",
}
"""Causal language models whose blocks cannot be read through their heads (`--readout`), and why."""

WITHOUT_COMPONENTS = frozenset({
    "bart", "beam", "bert", "bert-generation", "big_bird", "blenderbot-small", "camembert", "data2vec-text",
    "deepseek_v4", "dory", "electra", "ernie", "gemma3n_text", "git", "gpt_neox_japanese", "hy_v4",
    "inkling2_loop_text", "inkling2_text", "longcat_flash", "marian", "minimax", "mvp", "openai-gpt",
    "plbart", "qwen4_exp", "qwen4_exp_text", "rembert", "roberta", "roc_bert", "roformer", "rwkv", "trocr",
    "xlm-roberta", "xlnet", "xmod", "zaya",
})  # fmt: skip
"""Causal language models whose blocks are not their input plus what sublayers give (`--sites all`)."""

# The value of every attribute of these names, wherever a default configuration gives it a number.
_SIZES: dict[int, str] = {
    128: "vocab_size max_position_embeddings n_positions max_seq_len n_ctx unpadded_vocab_size "
    "context_length decoder_vocab_size vocab_size_per_layer_input max_target_positions",
    32: "hidden_size d_model n_embd emb_dim embedding_size dim hidden_dim input_embedding_size "
    "output_embedding_size word_embed_proj_dim embedding_dim lru_width output_channels "
    "ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels",
    48: "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_ff d_inner "
    "ffn_hidden_size intermediate_size_mlp dense_intermediate_size feed_forward_size",
    24: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    16: "head_dim swa_head_dim index_head_dim q_lora_rank kv_lora_rank o_lora_rank hc_lowrank "
    "router_hidden_size laurel_rank loop_gate_rank hidden_size_per_layer_input lora_rank",
    8: "d_head d_kv dim_head qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_d_state "
    "mamba_d_head mamba_n_heads mamba_chunk_size mamba_num_heads mamba_head_dim ssm_state_size "
    "state_size chunk_size mamba_headdim linear_key_head_dim linear_value_head_dim rel_extent "
    "linear_head_dim d_rel rotary_dim attention_head_size",
    6: "sliding_window sliding_window_size attention_window_size window_size local_attention "
    "attention_chunk_size index_topk",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads num_experts "
    "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
    "attention_heads swa_num_attention_heads linear_num_heads linear_num_value_heads "
    "n_routed_experts num_local_experts moe_num_experts time_step_rank mamba_dt_rank",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks "
    "num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads hc_mult "
    "swa_num_key_value_heads linear_num_key_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_k index_n_heads o_groups hc_count zero_expert_num",
    1: "topk_group n_group num_expert_group first_k_dense_replace mamba_n_groups n_groups num_dense_layers",
}
_TINY = {name: size for size, names in _SIZES.items() for name in names.split()}
_SPECIAL = {"pad": 100, "bos": 101, "eos": 102}  # and the others above these: 0 to 99 are ordinary
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_NGRAMS = {"ple_layer_ids": [1], "heads_per_ngram": 2, "ngram_vocab_size_base": 50}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}

# What the rules above get wrong or leave out, by the model type of the (sub-)configuration.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64, "local_attention_window_len": 6},
    "blt_global_transformer": {"hidden_size": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "cohere_compass_text": {
        "layer_types": _LOCAL_GLOBAL,
        "rope_parameters": {kind: {**_ROPE, "mrope_section": [4, 2, 2]} for kind in _LOCAL_GLOBAL},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dory": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "dots1": {
        "layer_types": ["full_attention", "sliding_attention"],
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "dots3_note_text": {
        "head_dim": 16,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"layer_types": _LOCAL_GLOBAL, "mlp_only_layers": [0]},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": _LOCAL_GLOBAL * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.95, 0.0] * 2,
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": {
        "global_head_dim": 32,
        "num_hidden_layers": 4,
        "layer_types": _LOCAL_GLOBAL * 2,
        "num_kv_shared_layers": 2,
    },
    "gemma4_unified_text": {"global_head_dim": 32},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling2_loop_text": {
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
    },
    "inkling2_text": {"n_layers_per_attn_res_block": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 2},
    "laguna": {"layer_types": _LOCAL_GLOBAL, "num_attention_heads_per_layer": [4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"moe_layers": [1]},
    "mellum": {"layer_types": _LOCAL_GLOBAL},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"head_dim": 16},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen4_exp_text": {
        "eos_token_id": 102,
        **_NGRAMS,
        **_INDEXER,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "roc_bert": {
        "shape_vocab_size": 128,
        "shape_embed_dim": 16,
        "pronunciation_vocab_size": 128,
        "pronunciation_embed_dim": 16,
    },
    "siglip_vision_model": {"image_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}

# Parameters that keep their own initialisation: random ones would be unstable or out of range.
_DELICATE = re.compile(r"(A_log|dt_bias|scale|time_mix_\w+|recurrent_param)$")


OF_EACH_KIND = {
    "bert:masked", "deepseek_v3", "deepseek_v4", "falcon", "gemma3", "gemma3n_text", "gpt2", "gpt_oss",
    "hrm_text", "inkling2_text", "jamba", "llama", "mamba2", "mixtral", "moshi", "opt", "phi3", "t5:seq2seq",
    "xlnet", "zamba",
}  # fmt: skip
"""One architecture of each kind: dense, mixture of experts, recurrent, hybrid, looped, with parallel streams,
with fused projections, with an encoder, and what is refused."""


def swept(names: Iterable[str]) -> list[Any]:
    """Parameters of a test that runs on every architecture: `make test` runs it on one of each kind alone.

    `make test-all` runs them all, and so does CI.
    """
    return [name if name in OF_EACH_KIND else pytest.param(name, marks=pytest.mark.sweep) for name in names]


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """Return the tiny model of a name of `CAUSAL`, `ENCODERS`, `ENCODER_DECODERS`, `MULTIMODAL`.

    A name is a model type, with ":masked" or ":seq2seq" for a head other than the causal one.
    It is in float32 and in eval mode, on the CPU, and its weights depend on `seed` alone.
    """
    model_type, _, head = name.partition(":")
    model_class = getattr(transformers, _HEADS[head or "causal"][model_type])
    default = _part(CONFIG_MAPPING[model_type](), model_class.config_class)
    if not head and not default.is_encoder_decoder and hasattr(default, "is_decoder"):
        default.is_decoder = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(_shrunk(default)).float().eval()
        _randomize(model)
    return model


def _part(config: PreTrainedConfig, wanted: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return the sub-configuration that the class of model takes, or else the whole."""
    parts = (part for part in vars(config).values() if type(part) is wanted)
    return config if isinstance(config, wanted) else next(parts, config)


def _shrunk(default: PreTrainedConfig) -> PreTrainedConfig:
    """Return a tiny configuration of the class of `default`.

    Everything goes through the constructor, which checks it and derives the rest from it.
    """
    kwargs: dict[str, Any] = {}
    for position, field in enumerate(dataclasses.fields(default)):
        name = default.attribute_map.get(field.name, field.name)
        value = vars(default).get(name)
        if isinstance(value, PreTrainedConfig):
            kwargs[field.name] = _shrunk(value)
        elif field.name == "is_decoder":
            kwargs[field.name] = value
        elif value is not None and field.name in _TINY and not isinstance(value, bool | list):
            kwargs[field.name] = _TINY[field.name]
        elif value is not None and (token := re.fullmatch(r"(\w+)_token_(id|index)", field.name)):
            kwargs[field.name] = _SPECIAL.get(token[1], 103 + position % 24)
    if "kv_lora_rank" in kwargs:  # multi-head latent attention has as many keys as queries
        kwargs |= {"num_key_value_heads": 4, "head_dim": 8}
    return type(default)(**kwargs | _thinned(default) | _OVERRIDES.get(default.model_type, {}))


def _thinned(default: PreTrainedConfig) -> dict[str, Any]:
    """Return the number of layers and the lists with an entry a layer, for one layer of each kind.

    A list of distinct entries is not such a list: it names layers by their positions.
    """
    values = vars(default)
    count = next((name for name in _COUNTS if isinstance(values.get(name), int)), "")
    per_layer = {
        name: value
        for name, value in values.items()
        if isinstance(value, list)
        and len(value) == values.get(count)
        and len(set(map(repr, value))) < len(value)
    }
    first: dict[str, int] = {}
    for layer, kind in enumerate(zip(*per_layer.values(), strict=True)):
        first.setdefault(repr(kind), layer)
    if not first:
        return {}
    keep = (list(first.values()) * 2)[: max(2, min(4, len(first)))]
    entries = {name: [value[i] for i in keep] for name, value in per_layer.items()}
    return {count: len(keep), **entries}


def _randomize(model: PreTrainedModel) -> None:
    """Redraw the weights at the scale that keeps the size of what goes through them.

    Biases and the weights of norms only move a little from where they are.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            path, _, leaf = name.rpartition(".")
            noise = torch.randn_like(parameter)
            if _DELICATE.search(leaf):
                continue
            if "bias" in leaf:
                parameter.add_(noise, alpha=0.02)
            elif parameter.ndim > 1:
                conv = isinstance(model.get_submodule(path), nn.Conv1d | nn.Conv2d | nn.Conv3d)
                fan_in = parameter[0].numel() if conv else parameter.shape[-1]
                parameter.copy_(noise / fan_in**0.5)
            elif leaf == "weight":
                parameter.add_(noise, alpha=0.1)
