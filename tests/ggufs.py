"""GGUF files of tiny models of many architectures, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from factories import tiny_tokenizer
from layouts import write_tokenizer

Array = NDArray[Any]
Keys = Mapping[str, Any]
EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
LAYER_NORM = {"starcoder2", "stablelm", "gpt2", "bloom", "falcon"}


def write_gguf(
    path: Path,
    architecture: str,
    model: PreTrainedModel,
    keys: Keys | None = None,
    tensors: Mapping[str, Array] | None = None,
    *,
    without: Iterable[str] = (),
    split: int = 0,
) -> Path:
    """A lossless file in float32, with `keys` of the architecture and `tensors` beside the model's own."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    for key, value in {**sizes(architecture, model.config), **(keys or {})}.items():
        if key not in without:
            add(writer, f"{architecture}.{key}", value)
    write_tokenizer(writer, tiny_tokenizer(model.config.vocab_size))
    for name, array in {**arrays(architecture, model), **(tensors or {})}.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A key of metadata, in the type that llama.cpp reads it as."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def sizes(architecture: str, config: Any) -> dict[str, Any]:
    """The keys that every file has."""
    heads = config.num_attention_heads
    epsilon = next(getattr(config, name) for name in EPSILONS if hasattr(config, name))
    norm = "layer_norm_epsilon" if architecture in LAYER_NORM else "layer_norm_rms_epsilon"
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        f"attention.{norm}": epsilon,
        "vocab_size": config.vocab_size,
    }
    rope = getattr(config, "rope_parameters", None)
    if rope:
        found["rope.freq_base"] = float(rope.get("full_attention", rope)["rope_theta"])
    if getattr(config, "head_dim", None):
        found |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    return found


def arrays(architecture: str, model: PreTrainedModel) -> dict[str, Array]:
    """The model's tensors by llama.cpp's names, in its layout."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings
    found: dict[str, Array] = {}
    for name, tensor in model.state_dict().items():
        layer = name.split(".")[2] if ".layers." in name or ".h." in name else ""
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                found[f"blk.{layer}.ffn_{part}_exps.weight"] = half.contiguous().numpy()
        elif name.endswith("experts.down_proj"):
            found[f"blk.{layer}.ffn_down_exps.weight"] = tensor.numpy()
        elif not (tied and name == "lm_head.weight"):
            key = key_of(names, name)
            found[key] = laid_out(architecture, key, tensor, model.config).numpy()
    return found


def key_of(names: Any, name: str) -> str:
    """llama.cpp's name of a tensor; some of its names begin below the model's own prefix."""
    name = name.replace(".dt_bias", ".dt_proj.bias")
    stem, _, suffix = name.rpartition(".")
    if (whole := names.get_name(name)) is not None:
        return str(whole)
    known = names.get_name(stem) or names.get_name(stem.partition(".")[2]) or {"lm_head": "output"}[stem]
    return f"{known}.{suffix}"


def laid_out(architecture: str, name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """What llama.cpp's converter makes of a tensor."""
    if architecture == "llama" and (".attn_q" in name or ".attn_k" in name):
        heads = config.num_attention_heads if ".attn_q" in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape).contiguous()
    if architecture in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return tensor + 1
    if name.endswith("shortconv.conv.weight"):
        return tensor.squeeze(1)
    if name.endswith("ssm_a"):
        return -tensor.exp()
    if name.endswith("ssm_conv1d.weight"):
        return tensor.squeeze(1)
    transposed = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    if architecture == "gpt2" and name.endswith(transposed) and tensor.dim() == 2:
        return tensor.T.contiguous()
    return tensor
