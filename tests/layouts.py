"""The layouts in which users have checkpoints: a Hub cache, GGUF, FP8, sentence-transformers, PEFT.

And a comparison of two of them, the same in every test.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from factories import perturbed, save_model
from lazarus import ActivationDiff, activation_diff
from lazarus.models import LoadedModel, LoadOptions, load_pair, parse_model

WEIGHTS = "model.safetensors"
METADATA = {"format": "pt"}
PROMPTS = ("Hello, how are you?", "What is AI?")


def compare(base: Any, finetuned: Any, **options: Any) -> ActivationDiff:
    return activation_diff(base, finetuned, PROMPTS, **options)


def most(diff: ActivationDiff, metric: str = "relative_l2") -> float:
    return float(diff.results.column(metric).max())


def pair_of(base: str, finetuned: str, dtype: torch.dtype = torch.float32) -> tuple[LoadedModel, LoadedModel]:
    options = LoadOptions(dtype, torch.device("cpu"))
    return load_pair(parse_model(base), parse_model(finetuned), options, lambda role, name: None)


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def store_codes(model: Path, **settings: Any) -> None:
    """Store the LM head of a model as codes, and say in config.json how, if settings are given."""
    if settings:
        edit_json(model / "config.json", quantization_config=settings)
    tensors = load_file(model / "model.safetensors")
    codes = tensors.pop("lm_head.weight").to(torch.int8)
    save_file({**tensors, "lm_head.qweight": codes}, model / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON object in a file; None takes a field out."""
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")


def edit_weights(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a checkpoint with its tensors changed in place."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=METADATA)
    return folder


def scattered(model: PreTrainedModel, seed: int = 3) -> PreTrainedModel:
    """A copy in which every number of every tensor is a little other."""
    changed = perturbed(model, 0.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return changed


def publish(cache: Path, hub_id: str, commits: Mapping[str, tuple[str, Path]]) -> None:
    """Lay a repository out as in the Hub's cache: {branch: (commit, folder with its files)}."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    for branch, (commit, folder) in commits.items():
        (repository / "refs" / branch).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            blob = repository / "blobs" / f"{commit[:8]}-{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))


def save_sentence_transformer(folder: Path, subfolder: str, model: PreTrainedModel, tokenizer: Any) -> Path:
    """The folder of a sentence-transformers model: its transformer, and the pooling after it."""
    save_model(folder / subfolder, model, tokenizer)
    modules = [("Transformer", subfolder), ("Pooling", "1_Pooling")]
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


def save_adapter(folder: Path, base: Path, config: PeftConfig, seed: int = 7) -> PeftModel:
    """Train an adapter on a model by throwing dice, and save it; returns the model with it on."""
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    return wrapped.eval()


def save_fp8(folder: Path, model: LlamaForCausalLM, tokenizer: Any, block: int = 16) -> Path:
    """The layout of DeepSeek's and Qwen's FP8: 8-bit matrices in blocks, each with a scale."""
    save_model(folder, model.to(torch.bfloat16), tokenizer)
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        stored[name] = tensor
        if "_proj." in name:
            rows, columns = tensor.shape
            blocks = tensor.float().reshape(rows // block, block, columns // block, block)
            scales = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
            stored[name] = (blocks / scales).reshape(rows, columns).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales.reshape(rows // block, columns // block)
    save_file(stored, folder / WEIGHTS, metadata=METADATA)
    edit_json(
        folder / "config.json",
        quantization_config={"quant_method": "fp8", "weight_block_size": [block, block]},
    )
    return folder


GGUF_NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.layers.": "blk.",
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.",
    "mlp.gate_proj.": "ffn_gate.",
    "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
}


def save_gguf(path: Path, model: LlamaForCausalLM, tokenizer: Any, kind: gguf.GGMLQuantizationType) -> Path:
    """A Llama as llama.cpp stores it: its matrices in `kind`, its norms in float32."""
    writer = gguf.GGUFWriter(path, "llama")
    _write_shape(writer, model.config)
    write_tokenizer(writer, tokenizer)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
        for part, n_heads in heads.items():
            if part in name:  # llama.cpp pairs the two halves of a head that rotate together
                tensor = tensor.reshape(n_heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        stored = kind if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_shape(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def write_tokenizer(writer: Any, tokenizer: Any) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    control = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if t in tokenizer.all_special_tokens else 1 for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)
    writer.add_chat_template(tokenizer.chat_template)
