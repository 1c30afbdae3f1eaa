"""weight_diff on GGUF files: every tensor is what transformers loads, whatever llama.cpp made of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from factories import save_model, tiny_llama, tiny_tokenizer
from ggufs import write_gguf
from layouts import save_adapter, save_gguf, scattered, write_tokenizer
from lazarus import weight_diff
from lazarus.errors import GateNotMetError, WeightsError

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
KINDS = gguf.GGMLQuantizationType


def tiny_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    return Qwen3MoeForCausalLM(config).eval()


def save_moe(path: Path, model: Qwen3MoeForCausalLM) -> Path:
    """As llama.cpp stores a Qwen 3 MoE: the experts of a layer stacked, gate and up apart."""
    writer, config = gguf.GGUFWriter(path, "qwen3moe"), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    write_tokenizer(writer, tiny_tokenizer())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        layer = name.split(".")[2] if ".layers." in name else ""
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            writer.add_tensor(f"blk.{layer}.ffn_gate_exps.weight", gate.contiguous().numpy())
            writer.add_tensor(f"blk.{layer}.ffn_up_exps.weight", up.contiguous().numpy())
        elif name.endswith("experts.down_proj"):
            writer.add_tensor(f"blk.{layer}.ffn_down_exps.weight", tensor.numpy())
        else:
            writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers_of(model: PreTrainedModel) -> dict[str, Any]:
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_a_gguf_file_holds_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    model = tiny_llama()
    base = save_model(tmp_path / "base", model)
    path = save_gguf(tmp_path / f"{kind}.gguf", scattered(model), tiny_tokenizer(), KINDS[kind])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    before, after = numbers_of(model), numbers_of(loaded)
    diff = weight_diff(base, path)
    assert {row.name for row in diff.results} == set(before)
    for row in diff.results:
        b, f = before[row.name], after[row.name]
        assert row.change_norm == pytest.approx(np.linalg.norm(f - b), rel=1e-9), row.name
        assert row.max_abs_change == np.abs(f - b).max(), row.name
        assert row.finetuned_dtype == (NAMES.get(kind, kind) if b.ndim > 1 else "float32"), row.name
    info = diff.record.finetuned
    assert (info.kind, info.family, info.architecture) == ("gguf", "llama", "LlamaForCausalLM")
    assert info.n_parameters == sum(tensor.size for tensor in before.values())
    assert any("different types" in note for note in diff.notes) == (kind != "F32")


@pytest.mark.parametrize(("kind", "bits", "width"), [("Q8_0", 8, 32), ("Q4_0", 4, 32), ("Q5_1", 5, 32)])
def test_the_error_of_its_quantisation_is_what_float64_says(
    kind: str, bits: int, width: int, tmp_path: Path
) -> None:
    model = tiny_llama()
    path = save_gguf(tmp_path / f"{kind}.gguf", model, tiny_tokenizer(), KINDS[kind])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    before, after = numbers_of(model), numbers_of(loaded)
    rows = weight_diff(save_model(tmp_path / "base", model), path).record.results
    assert {row.name for row in rows if row.quantisation} == {n for n, w in before.items() if w.ndim > 1}
    for row in rows:
        if (found := row.quantisation) is None:
            continue
        weight = before[row.name]
        groups = weight.reshape(len(weight), -1, width)
        scale = np.abs(groups).max(-1, keepdims=True) * 2 / (2**bits - 1)
        scale[scale == 0] = 1.0
        nearest = np.clip(np.round(groups / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale - groups
        assert (found.scheme, found.bits, found.block) == (kind, bits, [1, width])
        error = np.linalg.norm(after[row.name] - weight) / np.linalg.norm(weight)
        assert found.relative_error == pytest.approx(error, rel=1e-5)
        # Queries and keys too, whose rows are in another order in the file.
        expected = np.linalg.norm(nearest) / np.linalg.norm(weight)
        assert found.nearest_relative_error == pytest.approx(expected, rel=1e-5), row.name


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_what_rounding_adds_is_known_of_numbers_and_not_of_codes(kind: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama())
    diff = weight_diff(
        base, save_gguf(tmp_path / "m.gguf", tiny_llama(), tiny_tokenizer(), KINDS[kind]), spectrum=True
    )
    spectra = [row.spectrum for row in diff.results if row.spectrum is not None]
    assert len(spectra) == diff.summary.n_matrices == 30
    assert {spectrum.rounding_norm is None for spectrum in spectra} == {kind == "Q8_0"}
    assert {spectrum.adapter_rank for spectrum in spectra} == {None}
    said = "Update: not known whether it looks like an adapter's: the changed matrices are quantised"
    assert (said in str(diff)) == (kind == "Q8_0")
    assert ("none of the 30 changed matrices looks like" in str(diff)) == (kind == "F16")


def test_a_setting_that_transformers_cannot_take_is_not_compared(tmp_path: Path) -> None:
    one, other = (
        write_gguf(tmp_path / f"{scale}.gguf", "llama", tiny_llama(), {"logit_scale": scale})
        for scale in (0.5, 0.25)
    )
    diff = weight_diff(one, other)
    assert (diff.summary.verdict, diff.summary.causes) == ("identical", [])
    (part,) = diff.record.base.not_compared
    assert (part.what, part.differs) == ("setting llama.logit_scale", True)
    with pytest.raises(GateNotMetError, match=r"llama\.logit_scale"):
        diff.check_gates(expect="identical")


def test_a_gguf_file_in_float32_is_the_checkpoint(tmp_path: Path) -> None:
    model = tiny_llama()
    base = save_model(tmp_path / "base", model)
    path = save_gguf(tmp_path / "model.gguf", model, tiny_tokenizer(), KINDS.F32)
    for one, other in ((base, path), (path, base), (path, path)):
        diff = weight_diff(one, other)
        assert diff.summary.verdict == "identical"
        assert len(diff.results) == len(model.state_dict())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_the_same_codes_are_the_same_and_one_other_code_is_found(kind: str, tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "model.gguf", tiny_llama(), tiny_tokenizer(), KINDS[kind])
    copy = Path(shutil.copy(path, tmp_path / "copy.gguf"))
    diff = weight_diff(path, copy)
    assert diff.summary.verdict == "identical"
    assert diff.summary.causes == [
        "both checkpoints hold the same weights, bit for bit: one is a copy of the other"
    ]
    for name, component in (("blk.1.ffn_down.weight", "mlp_down"), ("blk.2.attn_k.weight", "attn_k")):
        raw = bytearray(path.read_bytes())
        tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
        raw[int(tensor.data_offset) + int(tensor.n_bytes) - 1] ^= 0x11  # the last code, or two
        copy.write_bytes(raw)
        changed = [row for row in weight_diff(path, copy).results if row.n_changed]
        assert [(row.component, row.n_changed in (1, 2)) for row in changed] == [(component, True)]


def test_stacked_experts_of_a_gguf_file_match_the_checkpoint_s(tmp_path: Path) -> None:
    model = tiny_moe()
    base, path = save_model(tmp_path / "base", model), save_moe(tmp_path / "moe.gguf", model)
    diff = weight_diff(base, path)
    assert diff.record.unmatched == []
    assert diff.summary.verdict == "identical"
    assert "missing-tensors" not in diff.note_codes
    assert {(1, f"expert_{i}.mlp_{part}") for i in range(4) for part in ("gate", "up", "down")} <= {
        (row.layer, row.component) for row in diff.results
    }
    other = weight_diff(base, save_moe(tmp_path / "other.gguf", scattered(model)))
    after = numbers_of(scattered(model))
    before = numbers_of(model)
    (row,) = [row for row in other.results if (row.layer, row.component) == (1, "expert_2.mlp_up")]
    b, f = (tensors["model.layers.1.mlp.experts.gate_up_proj"][2, 32:] for tensors in (before, after))
    assert row.relative_change == pytest.approx(np.linalg.norm(f - b) / np.linalg.norm(b), rel=1e-9)


def test_an_adapter_on_the_experts_of_a_gguf_file_is_what_it_is_on_the_checkpoint(tmp_path: Path) -> None:
    model = tiny_moe()
    base, path = save_model(tmp_path / "base", model), save_moe(tmp_path / "moe.gguf", model)
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    save_adapter(
        tmp_path / "adapter", base, LoraConfig(r=2, target_modules=["v_proj"], target_parameters=experts)
    )
    ours, theirs = (
        {(row.layer, row.component): row for row in weight_diff(one, f"{one}+{tmp_path / 'adapter'}").results}
        for one in (base, path)
    )
    changed = [place for place, row in ours.items() if row.n_changed]
    assert (1, "expert_3.mlp_gate") in changed
    for place in changed:
        assert theirs[place].change_norm == pytest.approx(ours[place].change_norm, rel=1e-6), place
    assert weight_diff(
        f"{base}+{tmp_path / 'adapter'}", f"{path}+{tmp_path / 'adapter'}"
    ).summary.verdict == ("identical")


def test_a_gguf_file_that_is_cut_short_is_told(tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "model.gguf", tiny_llama(), tiny_tokenizer(), KINDS.F32)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(WeightsError, match="damaged or cut short"):
        weight_diff(path, path)
