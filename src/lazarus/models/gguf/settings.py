"""The metadata of a GGUF file as a transformers configuration.

transformers takes the sizes from a file, and leaves most other settings at the defaults of its class, without
a word. Here every key of the architecture is taken, is known to change nothing, or is named in a note.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import AutoConfig, PretrainedConfig

from lazarus.errors import WeightsError
from lazarus.models.gguf.header import Array
from lazarus.models.gguf.parts import Gguf, some
from lazarus.models.gguf.rope import FACTORS, LONG, SHORT, rope_of
from lazarus.notes import Notes

_EPSILON = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_EPSILON_KEYS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_SIZES = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "d_ff", "n_inner", "ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads",),
}
"""Keys that every file of a model has, and the entries of a configuration that they are, by whichever it has.

Without one of them transformers builds a model of its class's default size.
"""
_SETTINGS = {
    **_SIZES,
    "vocab_size": ("vocab_size",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("global_head_dim", "head_dim", "d_kv"),
    **dict.fromkeys(_EPSILON_KEYS, _EPSILON),
    "attention.sliding_window": ("sliding_window",),
    "attention.relative_buckets_count": ("relative_attention_num_buckets",),
    "attention.temperature_scale": ("attn_temperature_scale",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "router_logit_softcapping": ("router_logit_softcapping",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "leading_dense_block_count": ("first_k_dense_replace",),
    "decoder_start_token_id": ("decoder_start_token_id",),
    "decoder_block_count": ("num_decoder_layers",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("conv_kernel", "linear_conv_kernel_dim"),
    "ssm.state_size": ("state_size", "linear_key_head_dim"),
    "ssm.time_step_rank": ("time_step_rank", "linear_num_value_heads"),
    "ssm.group_count": ("linear_num_key_heads",),
    "ssm.inner_size": ("intermediate_size",),
}
"""Keys of an architecture, and the entries of a configuration that they are, by whichever it has."""
_INERT = {
    "context_length",  # where a configuration has no place for it, there is no limit
    "rope.scaling.finetuned",  # how the model was trained
    "tensor_data_layout",  # of the first Llama files; the architecture tells it
    "pooling_type",  # after the last block
    "attention.value_length",  # the shape of a tensor, as the next one
    "attention.value_length_swa",
    "nextn_predict_layers",  # its layers are tensors without a place, which are reported by themselves
}
_NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "expert_gating_func": 1,  # a softmax
    "expert_weights_scale": 1.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "rope.scaling.factor": 1.0,
    "rope.scaling.type": "none",
    "rope.scaling.attn_factor": 1.0,
}
"""Values at which a key changes nothing. At 0, or an empty list, no key does."""
_DERIVED = {
    "qwen35": {"ssm.inner_size", "rope.dimension_sections", "full_attention_interval"},
    "qwen35moe": {"ssm.inner_size", "rope.dimension_sections", "full_attention_interval"},
    "minimax-m2": {"expert_gating_func", "expert_feed_forward_length", "rope.dimension_count"},
    "stablelm": {"use_parallel_residual"},
}
"""Keys from which transformers derives what is no entry of its own."""
_BY_CLASS = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
"""Keys that a file may lack though its model has the entry: then it is the class's."""
_WIDE_HEADS = {("gemma2", 46), ("gemma3", 62)}
"""The two Gemmas of 27B, which llama.cpp knows by their blocks: attention is scaled by another width."""
_BIASES = {"blk.0.attn_q.bias": ("attention_bias", "use_qkv_bias"), "blk.0.ffn_up.bias": ("mlp_bias",)}
"""Tensors, and the entries without which a model has no place for them."""


@dataclass(frozen=True)
class _Plain:
    """The configuration that transformers makes of a file by itself."""

    entries: Mapping[str, Any]
    aliases: Mapping[str, str]

    def find(self, names: Iterable[str]) -> str | None:
        """Return the first of these names that is an entry, or stands for one."""
        known = (self.aliases.get(name, name) for name in names)
        return next((name for name in known if name in self.entries), None)


def read_config(file: Gguf, notes: Notes) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Return the configuration that a file describes, and the settings that went into no entry of it.

    These may change a hidden state, and are noted; the value of a table of rotations is None.

    Raises:
        WeightsError: a size that is needed is not in the file, or is not that of its tensors.
        ValueError: transformers does not know the architecture.
    """
    try:
        settings, _ = PretrainedConfig.get_config_dict(file.paths[0], gguf_file=file.paths[0])
    except KeyError as error:
        # transformers takes some keys for granted; the error of a dict then names the key alone.
        if str(error.args[0]).startswith((f"{file.architecture}.", "tokenizer.")):
            raise _lacks(file, [str(error.args[0])]) from error
        raise
    settings.pop("rope_scaling", None)  # transformers takes the wrong bytes of gpt-oss's
    kind = settings.pop("model_type")
    settings.pop("feed_forward_length", None)  # GPT-2's, under a name that nothing reads
    default = AutoConfig.for_model(kind, **settings)
    plain = _Plain(default.to_dict(), type(default).attribute_map)
    _refuse_missing(file, plain)
    taken, neutral = _INERT | _DERIVED.get(file.architecture, set()), _neutral(file)
    found: dict[str, Any] = {}
    tables = [name for name in (FACTORS, LONG, SHORT) if name in file.tensors]
    for key, entry, value in (*_stated(file, plain), *_implied(file, plain)):
        taken.add(key)
        # An entry of None that follows from others, and the value that follows, are the same setting.
        if plain.entries[entry] != value and (plain.entries[entry], value) != (None, neutral.get(key)):
            found.setdefault(entry, value)
    if plain.entries.get("rope_parameters"):
        rope = rope_of(file, plain.entries["rope_parameters"], _head_dim(file))
        found["rope_parameters"] = rope.parameters
        if rope.rotated_share is not None:
            found["partial_rotary_factor"] = rope.rotated_share
        taken |= rope.taken
        tables = list(rope.untaken)
    kept = {key: value for key, value in settings.items() if key not in found}
    config = AutoConfig.for_model(kind, **kept, **found)
    _check_vocabulary(file, config)
    left = _untaken(file, taken)
    for name in tables:
        _note_rope(file, name, notes)
    _note_untaken(file, left, notes)
    _note_by_class(file, plain, notes)
    return config, {**left, **dict.fromkeys(tables)}


def _lacks(file: Gguf, keys: list[str]) -> WeightsError:
    return WeightsError(
        f"{file.name}: its metadata has no {' and no '.join(keys)}, and transformers would build a model of "
        "its default size instead. The file is damaged, or not written by llama.cpp: convert the model again."
    )


def _refuse_missing(file: Gguf, plain: _Plain) -> None:
    """Refuse a file without a size that its model has: transformers' class would supply its own."""
    wanted = [
        key
        for key, names in _SIZES.items()
        if file.get(key) is None and (entry := plain.find(names)) and plain.entries[entry] is not None
    ]
    if (
        "feed_forward_length" in wanted
        and "blk.0.ffn_down.weight" not in file.tensors
        and file.get("expert_count")
    ):
        wanted.remove("feed_forward_length")  # all its layers are of experts
    missing = [file.key(key) for key in wanted]
    if plain.find(_EPSILON) and all(file.get(key) is None for key in _EPSILON_KEYS):
        missing.append(" or ".join(map(file.key, _EPSILON_KEYS)))
    if file.get("vocab_size") is None and file.metadata.get("tokenizer.ggml.tokens") is None:
        missing.append(f"{file.key('vocab_size')} or tokenizer.ggml.tokens")
    if missing:
        raise _lacks(file, missing)


def _value(file: Gguf, key: str) -> Any:
    """Return the value of a key; of a list over the layers their common one. None where it says nothing."""
    value = file.get(key)
    if isinstance(value, list) and value and all(each == value[0] for each in value):
        value = value[0]
    return value if value or isinstance(value, bool) else None


def _shared_head_dim(file: Gguf) -> int:
    """Return the width of an attention head where the heads share the hidden size."""
    heads = _value(file, "attention.head_count")
    return int(file.get("embedding_length")) // heads if isinstance(heads, int) else 0


def _head_dim(file: Gguf) -> int:
    return int(_value(file, "attention.key_length") or _shared_head_dim(file))


def _neutral(file: Gguf) -> dict[str, Any]:
    """Return the values at which keys change nothing, or say what follows without them."""
    return {
        **_NEUTRAL,
        "attention.head_count_kv": file.get("attention.head_count"),
        "attention.key_length": _shared_head_dim(file),
        # As it was stored, in float32, and read: by its shortest decimal form.
        "attention.scale": float(str(np.float32(max(_head_dim(file), 1) ** -0.5))),
        "feed_forward_length": 4 * file.get("embedding_length"),
    }


def _stated(file: Gguf, plain: _Plain) -> Iterator[tuple[str, str, Any]]:
    """Yield the keys that are entries of the configuration, with their values; of two for one, the first."""
    stated: dict[str, Any] = {}
    for key, names in _SETTINGS.items():
        value, entry = _value(file, key), plain.find(names)
        if entry is None or (value is None and not (key in _BY_CLASS and file.get(key) == 0)):
            continue
        if isinstance(value, list) and plain.entries[entry] not in (value, max(value)):
            continue  # one value a layer, which transformers did not take either
        if key == "block_count":
            # llama.cpp counts layers that predict further tokens as blocks; transformers lacks these layers.
            value -= file.get("nextn_predict_layers") or 0
        if stated.setdefault(entry, value) != value:
            continue
        yield key, entry, plain.entries[entry] if isinstance(value, list) else value
        if entry == "sliding_window" and "use_sliding_window" in plain.entries:
            yield key, "use_sliding_window", True


def _implied(file: Gguf, plain: _Plain) -> Iterator[tuple[str, str, Any]]:
    """Yield entries that follow from other keys and from tensors, by the rules of GGUF and llama.cpp."""
    heads, width = _value(file, "attention.head_count"), _head_dim(file)
    if (
        heads
        and file.get("attention.head_count_kv") is None
        and (entry := plain.find(("num_key_value_heads",)))
    ):
        yield "attention.head_count_kv", entry, heads
    if heads and file.get("attention.key_length") is None and plain.entries.get("head_dim"):
        yield "attention.key_length", "head_dim", width
    scale, shared = file.get("attention.scale"), _shared_head_dim(file)
    if "query_pre_attn_scalar" in plain.entries:
        is_wide = (file.architecture, file.get("block_count")) in _WIDE_HEADS
        yield "attention.scale", "query_pre_attn_scalar", scale**-2 if scale else shared if is_wide else width
    elif "attention_multiplier" in plain.entries and scale:
        yield "attention.scale", "attention_multiplier", scale
    for tensor, names in _BIASES.items():
        if tensor in file.tensors and (entry := plain.find(names)):
            yield tensor, entry, True
    pattern, depth = file.get("attention.sliding_window_pattern"), file.get("block_count")
    if pattern and set(plain.entries.get("layer_types") or ()) & {"sliding_attention"}:
        slides = pattern if isinstance(pattern, list) else [i % pattern < pattern - 1 for i in range(depth)]
        kinds = ["sliding_attention" if each else "full_attention" for each in slides]
        yield "attention.sliding_window_pattern", "layer_types", kinds
    original = file.get("rope.scaling.original_context_length")
    if original and "original_max_position_embeddings" in plain.entries:
        yield "rope.scaling.original_context_length", "original_max_position_embeddings", original


def _note_rope(file: Gguf, tensor: str, notes: Notes) -> None:
    notes.add(
        "gguf-settings",
        f"{file.name}: its rotary positions (rope) are not those of the file: transformers has no scaling "
        f"like its {tensor}. Differences from the model that it was converted from may come of that alone",
        model=file.name,
    )


def _untaken(file: Gguf, taken: AbstractSet[str]) -> dict[str, Any]:
    """The keys of the architecture that went into no entry, and may change a hidden state."""
    prefix = file.key("")
    neutral = _neutral(file)
    return {
        full: value
        for full, value in file.metadata.items()
        if full.startswith(prefix)
        and (key := full.removeprefix(prefix)) not in taken
        and (value or isinstance(value, bool))
        and value != neutral.get(key)
    }


def _note_untaken(file: Gguf, left: Mapping[str, Any], notes: Notes) -> None:
    if not left:
        return
    told = [f"{key} = {_short(value)}" for key, value in left.items()]
    notes.add(
        "gguf-settings",
        f"{file.name}: not taken from the file, because transformers has no setting for it: {some(told, 8)}. "
        "Differences from the model that it was converted from may come of that alone",
        model=file.name,
    )


def _short(value: Any) -> str:
    text = f"{value.length} elements" if isinstance(value, Array) else str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _note_by_class(file: Gguf, plain: _Plain, notes: Notes) -> None:
    """Note entries that a file may lack, and that its model has by its class."""
    held = [(key, plain.find(_SETTINGS[key])) for key in _BY_CLASS if file.get(key) is None]
    told = [f"{entry} = {plain.entries[entry]}" for _, entry in held if entry and plain.entries[entry]]
    if told:
        text = f"{file.name}: not in the file, and taken from the model's class: {some(told, 8)}"
        notes.add("gguf-settings", text, model=file.name)


def _check_vocabulary(file: Gguf, config: PretrainedConfig) -> None:
    """Refuse a vocabulary of another size than the embedding: one of them is another model's."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[0] != config.vocab_size:
        stated = file.get("vocab_size")
        where = "tokenizer.ggml.tokens" if stated is None else file.key("vocab_size")
        raise WeightsError(
            f"{file.name}: {where} has {config.vocab_size} tokens, and token_embd.weight is of "
            f"{list(embedding.shape)}. Metadata and tensors are not of one model: fetch or convert it again."
        )
