"""weight_diff with adapters: what is added to each tensor, against PEFT's own merge in float64."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from architectures import build
from factories import save_model, tiny_llama
from layouts import edit_json, save_adapter, scattered
from lazarus import WeightDiff, weight_diff
from lazarus.errors import AdapterError, UnsupportedModelError
from lazarus.models import Source
from lazarus.notes import Notes
from lazarus.options import WeightOptions
from lazarus.weights.adapters import put_adapter
from lazarus.weights.checkpoints import read_checkpoint

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "rank-stabilised": lambda: LoraConfig(r=4, lora_alpha=32, target_modules=TARGETS, use_rslora=True),
    "patterns": lambda: LoraConfig(
        r=4, target_modules=TARGETS, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}
    ),
    "dora": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "embeddings": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "upper half": lambda: LoraConfig(r=4, target_modules=TARGETS, layers_to_transform=[2, 3]),
    "modules to save": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "input_layernorm"]
    ),
    "biases": lambda: LoraConfig(r=4, target_modules=TARGETS, bias="all"),
    "new tokens": lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[45, 70]),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": lambda: LoHaConfig(r=4, target_modules=TARGETS),
    "lokr": lambda: LoKrConfig(r=4, target_modules=TARGETS),
    "norms": lambda: LNTuningConfig(target_modules=["input_layernorm"]),
    "lora with a bias": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_bias=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "base", scattered(tiny_llama(attention_bias=True)))


def merged(base: Path, adapter: Path) -> dict[str, Any]:
    """Every tensor of the model that PEFT merges in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole: Any = PeftModel.from_pretrained(model, adapter).double().merge_and_unload()
    return {name: tensor.detach().numpy() for name, tensor in whole.state_dict().items()}


def check(diff: WeightDiff, base: Path, expected: dict[str, Any]) -> int:
    """Every row against the merged model; how many have changed."""
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).state_dict()
    assert {row.name for row in diff.results} == set(before)
    for row in diff.results:
        b = before[row.name].numpy()
        change, norm = float(np.linalg.norm(expected[row.name] - b)), float(np.linalg.norm(b))
        assert row.change_norm == pytest.approx(change, rel=1e-9, abs=1e-14 * norm), row.name
        assert row.relative_change == pytest.approx(change / norm, rel=1e-9, abs=1e-14), row.name
        largest = np.abs(expected[row.name] - b).max()
        assert row.max_abs_change == pytest.approx(largest, rel=1e-9, abs=1e-14), row.name
        assert (row.n_changed == 0) == (change == 0), row.name
    return sum(row.n_changed > 0 for row in diff.results)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_an_adapter_adds_is_what_peft_merges(kind: str, base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", base, CONFIGS[kind]())
    diff = weight_diff(base, tmp_path / "adapter")
    n_changed = check(diff, base, merged(base, tmp_path / "adapter"))
    assert n_changed > 0
    info = diff.record.finetuned
    assert (info.kind, info.id) == ("adapter", str(tmp_path / "adapter"))
    assert info.adapter is not None
    assert weight_diff(base, f"{base}+{tmp_path / 'adapter'}").results == diff.results


def test_an_adapter_s_rank_is_seen(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=TARGETS))
    diff = weight_diff(base, tmp_path / "adapter", spectrum=True)
    ranks = {row.spectrum.adapter_rank for row in diff.results if row.spectrum is not None}
    assert ranks == {4}
    assert diff.summary.adapter_rank == 4
    assert diff.summary.n_matrices == 12


def cut_phi3(weight: Any, config: Any) -> list[Any]:
    n_rows = config.hidden_size // config.num_attention_heads
    ends = np.cumsum([config.num_attention_heads, config.num_key_value_heads]) * n_rows
    return np.split(weight, ends)


FUSED: dict[str, tuple[str, Callable[[Any, Any], list[Any]]]] = {
    "bloom": ("query_key_value", lambda w, c: list(w.reshape(c.n_head, 3, -1, w.shape[1]).swapaxes(0, 1))),
    "gpt2": ("c_attn", lambda w, _: np.split(w, 3, axis=1)),
    "phi3": ("qkv_proj", cut_phi3),
}
"""Where an architecture fuses queries, keys and values, and how they lie in it."""


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bloom", "lora"), ("bloom", "loha"), ("gpt2", "lora"), ("phi3", "lora"), ("phi3", "loha")],
)
def test_an_adapter_on_fused_tensors_is_cut_as_they_are(name: str, kind: str, tmp_path: Path) -> None:
    target, cut = FUSED[name]
    model = build(name)
    base = save_model(tmp_path / "base", model)
    options = {"fan_in_fan_out": True} if name == "gpt2" else {}
    make: Any = LoraConfig if kind == "lora" else LoHaConfig
    save_adapter(tmp_path / "adapter", base, make(r=2, target_modules=[target], **options))
    diff = weight_diff(base, tmp_path / "adapter")
    expected, before = merged(base, tmp_path / "adapter"), model.state_dict()
    changed = {(row.name, row.component): row for row in diff.results if row.n_changed}
    paths = [path for path in before if path.endswith(f"{target}.weight")]
    assert changed.keys() == {(path, f"attn_{part}") for path in paths for part in "qkv"}
    for path in paths:
        update = cut(expected[path] - before[path].double().numpy(), model.config)
        for part, change in zip("qkv", update, strict=True):
            row = changed[path, f"attn_{part}"]
            assert row.change_norm == pytest.approx(float(np.linalg.norm(change)), rel=1e-9)
            assert row.max_abs_change == pytest.approx(np.abs(change).max(), rel=1e-9)


MIXTURES = {
    "qwen3_moe": [
        "experts.gate_up_proj",
        "experts.down_proj",
    ],  # stored in pieces
    "mixtral": ["experts.gate_up_proj"],  # the same, under other names
    "gpt_oss": ["experts.gate_up_proj", "experts.down_proj"],  # stacked, by inputs, gate and up in turns
    "jetmoe": ["input_linear.weight", "output_linear.weight"],  # stacked, the weights of a module
    "dbrx": ["mlp.w1", "mlp.w2"],  # all experts' rows in one matrix
    "llama4_text": ["experts.gate_up_proj"],
}


@pytest.mark.parametrize("name", MIXTURES)
def test_an_adapter_on_experts_is_what_peft_merges_into_the_files(name: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", build(name))
    config = LoraConfig(r=2, target_modules=[], target_parameters=MIXTURES[name])
    save_adapter(tmp_path / "adapter", base, config)
    diff = weight_diff(base, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    whole: Any = PeftModel.from_pretrained(model, tmp_path / "adapter").double().merge_and_unload()
    whole.save_pretrained(tmp_path / "merged")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    squares = dict.fromkeys(before, 0.0)
    for row in diff.results:
        squares[row.name] += (row.change_norm or 0.0) ** 2
    changed = 0
    for key, tensor in before.items():
        expected = float((after[key].double() - tensor.double()).norm())
        assert squares[key] ** 0.5 == pytest.approx(expected, rel=1e-9, abs=1e-12), key
        changed += (expected > 0 and "expert" in key) or "mlp" in key
    assert changed


def test_a_merge_is_the_model_with_its_adapter(base: Path, tmp_path: Path) -> None:
    wrapped = save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=TARGETS))
    whole = save_model(tmp_path / "merged", wrapped.merge_and_unload())
    diff = weight_diff(whole, f"{base}+{tmp_path / 'adapter'}")
    assert 0 < (diff.summary.relative_change or 0) < 1e-7  # what rounding to float32 left
    diff.check_gates(fail_above=1e-6)


def test_two_adapters_of_one_model_can_be_compared(base: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        save_adapter(tmp_path / f"{seed}", base, LoraConfig(r=4, target_modules=["q_proj"]), seed=seed)
    diff = weight_diff(f"{base}+{tmp_path / '1'}", f"{base}+{tmp_path / '2'}")
    ours, theirs = (merged(base, tmp_path / str(seed)) for seed in (1, 2))
    for row in diff.results:
        expected = np.linalg.norm(theirs[row.name] - ours[row.name])
        assert row.change_norm == pytest.approx(expected, rel=1e-9, abs=1e-13), row.name
    alone = weight_diff(tmp_path / "1", base)
    assert alone.record.base.kind == "adapter"
    assert sum(row.n_changed > 0 for row in alone.results) == 4


def test_an_adapter_that_adds_nothing_is_told(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=TARGETS))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v * ("lora_B" not in k) for k, v in tensors.items()}, path)
    diff = weight_diff(base, tmp_path / "adapter")
    assert diff.summary.verdict == "identical"
    (cause,) = diff.summary.causes
    assert cause == f"the adapter {tmp_path / 'adapter'} (LORA) adds nothing: its products are exactly 0"
    same = weight_diff(tmp_path / "adapter", f"{base}+{tmp_path / 'adapter'}")
    assert same.summary.verdict == "identical"


def test_one_adapter_under_two_names_is_not_said_to_add_nothing(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=TARGETS))
    copy = shutil.copytree(tmp_path / "adapter", tmp_path / "copy")
    for named in (tmp_path / "adapter", f"{base}+{tmp_path / 'adapter'}"):
        summary = weight_diff(named, f"{base}+{copy}").summary
        assert (summary.verdict, summary.n_changed_tensors) == ("identical", 0)
        assert summary.causes == ["both adapters make the same of the same model"]


def test_parameters_of_one_number_are_the_models_own(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", build("apertus"))
    save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=["q_proj"]))
    diff = weight_diff(base, tmp_path / "adapter")
    assert min(row.shape for row in diff.results if "alpha" in row.name) == [1]
    assert check(diff, base, merged(base, tmp_path / "adapter")) == 2


def test_an_update_far_below_the_weights_is_what_is_added_and_not_what_is_left_of_it(
    base: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {key: t.double() * (1e-14 if "lora_B" in key else 1) for key, t in load_file(path).items()}
    save_file({key: tensor.float() for key, tensor in tensors.items()}, path)
    stored = load_file(path)
    for row in weight_diff(base, tmp_path / "adapter").results:
        if row.component == "attn_q":
            name = f"base_model.model.model.layers.{row.layer}.self_attn.q_proj"
            a, b = (stored[f"{name}.lora_{part}.weight"].double().numpy() for part in "AB")
            assert row.change_norm == pytest.approx(float(np.linalg.norm(b @ a)), rel=1e-9)
            assert row.n_changed == b.shape[0] * a.shape[1]


def test_an_embedding_that_comes_with_the_adapter_is_what_it_is_on(base: Path, tmp_path: Path) -> None:
    """PEFT saves an embedding whole when an adapter is on it; on another base, that one counts."""
    config = LoraConfig(r=4, target_modules=["embed_tokens"], use_dora=True)
    save_adapter(tmp_path / "adapter", base, config)
    other = save_model(tmp_path / "other", scattered(tiny_llama(attention_bias=True), seed=9))
    assert check(weight_diff(other, tmp_path / "adapter"), other, merged(other, tmp_path / "adapter")) == 1


def test_an_adapter_that_names_another_base_is_noted(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=TARGETS))
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="org/other")
    assert any(
        "names org/other as its base" in note for note in weight_diff(base, tmp_path / "adapter").notes
    )


# --- What is refused


@pytest.mark.parametrize("start", ["olora", "pissa"])
def test_a_start_that_rewrites_the_base_is_refused(start: str, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=start)
    save_adapter(tmp_path / "adapter", base, config)
    with pytest.raises(UnsupportedModelError, match=f"its start \\({start}\\)"):
        weight_diff(base, tmp_path / "adapter")


def test_an_adapter_on_experts_that_loading_puts_in_another_order_is_refused(tmp_path: Path) -> None:
    """The files have gate and up in turns, the model one after the other."""
    base = save_model(tmp_path / "base", build("inkling2_text"))
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    save_adapter(tmp_path / "adapter", base, config)
    with pytest.raises(UnsupportedModelError, match=r"experts\.gate_up_proj cannot .* in another layout"):
        weight_diff(base, tmp_path / "adapter")


def test_virtual_tokens_are_refused(base: Path, tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    save_adapter(tmp_path / "adapter", base, config)
    with pytest.raises(AdapterError, match="virtual tokens"):
        weight_diff(base, tmp_path / "adapter")


def test_one_that_does_not_fit_is_an_error(base: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", tiny_llama(hidden_size=64))
    save_adapter(tmp_path / "adapter", other, LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(AdapterError, match="does not fit"):
        weight_diff(base, tmp_path / "adapter")


def test_two_adapters_alone_name_no_model(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(AdapterError, match="Say which model"):
        weight_diff(tmp_path / "adapter", tmp_path / "adapter")


def test_an_adapter_on_a_model_with_an_adapter_is_what_both_merge_one_after_the_other(
    base: Path, tmp_path: Path
) -> None:
    """The second one's rule may read what the first has made: DoRA's norms."""
    configs = [
        LoraConfig(r=4, target_modules=TARGETS),
        LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
        LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[45, 70]),
    ]
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    checkpoint = read_checkpoint(Source(str(base), "folder", str(base)), WeightOptions(), Notes())
    for i, config in enumerate(configs):
        folder = tmp_path / str(i)
        save_adapter(folder, base, config, seed=i)
        model = PeftModel.from_pretrained(model, folder).double().merge_and_unload()
        checkpoint, _ = put_adapter(checkpoint, Source(str(folder), "folder", str(folder)), Notes())
    after = model.state_dict()
    for entry in checkpoint.entries.values():
        found = entry.view.read(0, entry.view.matrix[0]).double().reshape(entry.view.shape)
        torch.testing.assert_close(found, after[entry.path], rtol=1e-9, atol=1e-12)
