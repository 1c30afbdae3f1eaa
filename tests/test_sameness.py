"""Whether two models run on the same weights, and why a fine-tune may have changed nothing."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, LlamaForCausalLM

from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from flattened import Scaled, Sealed, quantised
from layouts import compare, edit_json, edit_weights, most, pair_of, save_adapter
from lazarus import ActivationDiff
from lazarus.models import (
    LoadedModel,
    LoadOptions,
    load_paged,
    parse_model,
    shared_blocks,
    weights_identical,
    why_the_same,
    wrap_model,
)
from lazarus.models.reference import Source

TARGETS = ["q_proj", "down_proj"]
SAME_FILES = "both names are the same files"
COPY = "both checkpoints hold the same weights, bit for bit: one is a copy of the other"
IN_MEMORY = "both are one model in memory"


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, **settings})


def save_untrained(folder: Path, base: Path, config: PeftConfig) -> Path:
    """An adapter as it is before the first step of training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def in_memory(base: nn.Module, finetuned: nn.Module) -> ActivationDiff:
    return compare(base, finetuned, tokenizer=tiny_tokenizer())


def facts(diff: ActivationDiff) -> tuple[str | None, bool | None, list[str]]:
    return diff.summary.verdict, diff.summary.weights_identical, diff.summary.causes


# --- Files


def test_one_folder_twice_is_the_same_files(base_folder: Path) -> None:
    assert facts(compare(base_folder, base_folder)) == ("identical", True, [SAME_FILES])
    detour = f"{base_folder}/../{base_folder.name}/"
    assert facts(compare(base_folder, detour)) == ("identical", True, [SAME_FILES])


def test_a_copied_folder_is_a_copy(base_folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(base_folder, tmp_path / "copied")
    diff = compare(base_folder, copied)
    assert facts(diff) == ("identical", True, [COPY])
    assert COPY in str(diff)


def test_a_finetune_is_not_the_same(base_folder: Path, finetuned_folder: Path) -> None:
    assert facts(compare(base_folder, finetuned_folder)) == ("changed", False, [])


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("place", [0, -1])
def test_one_changed_bit_is_not_the_same_weights(
    name: str, place: int, base_folder: Path, tmp_path: Path
) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.int32).flatten()[place] ^= 1

    base, finetuned = pair_of(str(base_folder), str(edit_weights(base_folder, tmp_path / "flipped", flip)))
    assert not weights_identical(base, finetuned)
    assert why_the_same(base, finetuned, identical=False) == []


def test_weights_that_no_prompt_reads_are_weights(base_folder: Path, tmp_path: Path) -> None:
    """The states are identical, bit for bit, and the weights are not: no cause is made up."""
    unread = tiny_tokenizer().convert_tokens_to_ids("~")
    assert unread not in tiny_tokenizer()(["Hello, how are you?", "What is AI?"])["input_ids"]

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][unread] += 1

    diff = compare(base_folder, edit_weights(base_folder, tmp_path / "changed", change))
    assert facts(diff) == ("identical", False, [])


def test_a_changed_head_is_not_the_same(base_folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] *= 1.5

    diff = compare(base_folder, edit_weights(base_folder, tmp_path / "head", change))
    assert most(diff) == 0
    assert facts(diff) == ("changed", False, [])


def test_tied_heads(tmp_path: Path) -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    folders = [save_model(tmp_path / name, tied, tiny_tokenizer()) for name in ("one", "other")]
    assert facts(compare(*folders)) == ("identical", True, [COPY])
    assert facts(compare(folders[0], folders[0])) == ("identical", True, [SAME_FILES])
    with torch.no_grad():
        tied.lm_head.weight[5, 5] += 0.5
    assert not weights_identical(
        *pair_of(str(folders[0]), str(save_model(tmp_path / "changed", tied, tiny_tokenizer())))
    )


def test_a_head_of_its_own_with_the_tied_weights_is_the_same() -> None:
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama()
    untied.load_state_dict(tied.state_dict())
    assert weights_identical(wrap_model(tied, "tied"), wrap_model(untied, "untied"))


def test_another_type_is_not_the_same_weights() -> None:
    base = tiny_llama()
    wide, narrow = (wrap_model(copy.deepcopy(base).to(t), str(t)) for t in (torch.float32, torch.bfloat16))
    assert not weights_identical(wide, narrow)


def test_models_of_other_depth_are_not_the_same() -> None:
    shallow = tiny_llama(num_hidden_layers=3)
    assert not weights_identical(wrap_model(tiny_llama(), "deep"), wrap_model(shallow, "shallow"))


def test_what_is_stored_beside_the_parameters_counts() -> None:
    """DeepSeek's experts are chosen by a bias that is a buffer, not a parameter, and is trained."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "vocab_size": 300}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    depth = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    base = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **experts, **depth)).eval()
    other = copy.deepcopy(base)
    assert weights_identical(wrap_model(base, "base"), wrap_model(other, "other"))
    other.model.layers[1].mlp.gate.e_score_correction_bias[0] += 10
    assert not weights_identical(wrap_model(base, "base"), wrap_model(other, "other"))


# --- Models in memory


@pytest.mark.parametrize("training", [False, True])
def test_one_model_in_memory(training: bool) -> None:
    model = tiny_llama().train(training)
    assert facts(in_memory(model, model)) == ("identical", True, [IN_MEMORY])


def test_a_copy_in_memory() -> None:
    model = tiny_llama()
    assert facts(in_memory(model, copy.deepcopy(model))) == ("identical", True, [COPY])
    assert facts(in_memory(model, perturbed(model))) == ("changed", False, [])


def test_a_base_that_peft_has_changed_is_the_same_model_and_the_same_weights(base_folder: Path) -> None:
    model = tiny_llama()
    wrapped = trained(model, lora())
    assert facts(in_memory(model, wrapped)) == ("identical", True, [IN_MEMORY])


def trained(model: nn.Module, config: PeftConfig) -> PeftModel:
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    return wrapped


def test_an_adapter_that_is_switched_off() -> None:
    wrapped = trained(tiny_llama(), lora())
    assert facts(in_memory(tiny_llama(), wrapped)) == ("changed", False, [])
    wrapped.base_model.disable_adapter_layers()
    verdict, same, causes = facts(in_memory(tiny_llama(), wrapped))
    assert (verdict, same) == ("identical", True)
    assert causes == ["the adapter default (LORA) is not applied: it is switched off"]
    wrapped.base_model.enable_adapter_layers()
    assert facts(in_memory(tiny_llama(), wrapped)) == ("changed", False, [])


def test_an_adapter_that_is_switched_off_on_other_weights_is_a_change() -> None:
    wrapped = trained(perturbed(tiny_llama()), lora())
    wrapped.base_model.disable_adapter_layers()
    assert facts(in_memory(tiny_llama(), wrapped)) == ("changed", False, [])


# --- Adapters in files

UNTRAINED: dict[str, tuple[Callable[[], PeftConfig], int]] = {
    "lora": (lora, 8),
    "rank-stabilised": (lambda: lora(use_rslora=True), 8),
    "two layers": (lambda: lora(layers_to_transform=[2, 3]), 4),
    "embedding too": (lambda: lora(target_modules=["q_proj", "embed_tokens"]), 5),
    "head too": (lambda: lora(target_modules=["q_proj", "lm_head"]), 4),
}


@pytest.mark.parametrize("kind", UNTRAINED)
def test_an_untrained_adapter_still_has_a_b_of_zero(kind: str, base_folder: Path, tmp_path: Path) -> None:
    config, n_layers = UNTRAINED[kind]
    adapter = save_untrained(tmp_path / "adapter", base_folder, config())
    for models in ((base_folder, adapter), (adapter, base_folder)):
        verdict, same, causes = facts(compare(*models))
        assert (verdict, same) == ("identical", True)
        [cause] = causes
        assert f"B is still zero in all of its {n_layers} layers" in cause
        assert str(adapter) in cause


def test_an_untrained_adapter_on_a_finetune_is_a_change(
    base_folder: Path, finetuned_folder: Path, tmp_path: Path
) -> None:
    adapter = save_untrained(tmp_path / "adapter", base_folder, lora())
    assert facts(compare(base_folder, f"{finetuned_folder}+{adapter}")) == ("changed", False, [])
    assert facts(compare(finetuned_folder, f"{finetuned_folder}+{adapter}"))[:2] == ("identical", True)


@pytest.mark.parametrize("config", [lora(), lora(use_dora=True), IA3Config(target_modules=TARGETS)])
def test_a_trained_adapter_is_a_change(config: PeftConfig, base_folder: Path, tmp_path: Path) -> None:
    config = copy.deepcopy(config)
    if isinstance(config, IA3Config):
        config.feedforward_modules = ["down_proj"]
    save_adapter(tmp_path / "adapter", base_folder, config)
    assert facts(compare(base_folder, tmp_path / "adapter")) == ("changed", False, [])


def test_a_trained_adapter_against_itself_is_the_same(base_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("other", 2)):
        save_adapter(tmp_path / name, base_folder, lora(), seed)
    one, other = (f"{base_folder}+{tmp_path / name}" for name in ("one", "other"))
    assert facts(compare(one, one)) == ("identical", True, [SAME_FILES])
    assert facts(compare(one, other)) == ("changed", False, [])


def test_one_layer_with_a_b_is_enough(base_folder: Path, tmp_path: Path) -> None:
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), lora())
    with torch.no_grad():
        wrapped.base_model.model.model.layers[3].mlp.down_proj.lora_B["default"].weight[0, 0] = 1e-30
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path / "adapter")
    diff = compare(base_folder, tmp_path / "adapter")
    assert facts(diff) == ("identical", False, [])


def test_a_dora_of_which_only_the_magnitude_was_trained_is_not_the_same() -> None:
    wrapped = get_peft_model(tiny_llama(), lora(use_dora=True)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    assert facts(in_memory(tiny_llama(), wrapped)) == ("changed", False, [])


def test_a_lora_of_which_only_the_bias_was_trained_is_not_the_same() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be merged
        wrapped = get_peft_model(tiny_llama(), lora(lora_bias=True)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.add_(0.5)
    assert facts(in_memory(tiny_llama(), wrapped)) == ("changed", False, [])


def test_an_untrained_dora_says_so(base_folder: Path, tmp_path: Path) -> None:
    adapter = save_untrained(tmp_path / "adapter", base_folder, lora(use_dora=True))
    verdict, same, causes = facts(compare(base_folder, adapter))
    assert verdict != "changed"
    assert same is False  # its magnitudes are weights, and are not looked into
    assert ["B is still zero in all of its 8 layers" in cause for cause in causes] == [True]


@pytest.mark.parametrize("kind", ["lora", "saved"])
def test_an_adapter_on_the_head_alone_is_elsewhere_and_a_change(
    kind: str, base_folder: Path, tmp_path: Path
) -> None:
    config = lora(target_modules=["lm_head"])
    if kind == "saved":
        config = lora(target_modules="dummy-target-modules", modules_to_save=["lm_head"])
    save_adapter(tmp_path / "adapter", base_folder, config)
    diff = compare(base_folder, tmp_path / "adapter")
    assert most(diff) == 0
    assert facts(diff) == ("changed", False, [])
    models = pair_of(str(base_folder), str(tmp_path / "adapter"))
    [cause] = why_the_same(*models, identical=False)
    assert cause.startswith("no layer that is compared carries the adapter")
    assert cause.endswith("its targets are elsewhere")


# --- What an adapter brings besides a product


def with_adapter(base: nn.Module, config: PeftConfig, change: str = "") -> nn.Module:
    """A copy of a model with an adapter as it is before training, but for the tensors of this name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be merged, or that a layer is tied
        wrapped: nn.Module = get_peft_model(copy.deepcopy(base), config).eval()
    if change:
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if change in name:
                    parameter.add_(0.5)
    return wrapped


ZERO = "B is still zero in all of its"
AS_BEFORE = "what it brings is what its model has without it"
BESIDE: dict[str, tuple[Callable[[], PeftConfig], str, str]] = {
    "a module whole": (lambda: lora(modules_to_save=["lm_head"]), "modules_to_save", ZERO),
    "an embedding whole": (lambda: lora(modules_to_save=["embed_tokens"]), "modules_to_save", ZERO),
    "a norm of a block whole": (lambda: lora(modules_to_save=["input_layernorm"]), "modules_to_save", ZERO),
    "single tokens": (lambda: lora(trainable_token_indices=[0, 78]), "trainable_tokens_delta", ZERO),
    "a bias of B": (lambda: lora(lora_bias=True), "lora_B.default.bias", ZERO),
    "norms": (lambda: LNTuningConfig(target_modules=["norm"]), "ln_tuning_layers", AS_BEFORE),
    "factors": (
        lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        "ia3_l",
        AS_BEFORE,
    ),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_an_adapter_brings_beside_its_product_counts(kind: str) -> None:
    config, change, cause = BESIDE[kind]
    base = tiny_llama()
    untrained = wrap_model(with_adapter(base, config()), "untrained")
    trained = wrap_model(with_adapter(base, config(), change), "trained")
    plain = wrap_model(base, "plain")
    for models in ((plain, untrained), (untrained, plain)):
        assert weights_identical(*models) is True
        [found] = why_the_same(*models, identical=True)
        assert cause in found
    for models in ((plain, trained), (trained, plain)):
        assert weights_identical(*models) is False
        assert why_the_same(*models, identical=False) == []
    states = in_memory(base, trained.model)
    assert states.summary.verdict == "changed"


def test_a_zero_a_with_a_trained_bias_adds_something() -> None:
    finetuned: Any = with_adapter(tiny_llama(), lora(lora_bias=True), "lora_B.default.bias")
    with torch.no_grad():
        for name, parameter in finetuned.named_parameters():
            if "lora_A" in name:
                parameter.zero_()
    assert facts(in_memory(tiny_llama(), finetuned)) == ("changed", False, [])


def test_a_product_of_zero_and_infinity_is_not_nothing() -> None:
    finetuned: Any = with_adapter(tiny_llama(), lora())
    with torch.no_grad():
        finetuned.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight[0, 0] = torch.inf
    assert weights_identical(wrap_model(tiny_llama(), "base"), wrap_model(finetuned, "broken")) is not True


@pytest.mark.parametrize("config", [OFTConfig(oft_block_size=8, target_modules=["q_proj"]), None])
def test_of_an_adapter_that_is_not_known_nothing_is_claimed(config: PeftConfig | None) -> None:
    """OFT turns by nothing before training; a layer of another kind may do anything."""
    base = tiny_llama()
    finetuned = with_adapter(base, config or lora())
    if config is None:
        layers: list[Any] = [module for module in finetuned.modules() if hasattr(module, "lora_A")]
        for layer in layers:
            layer.lora_variant["default"] = object()
    models = wrap_model(base, "base"), wrap_model(finetuned, "finetuned")
    assert weights_identical(*models) is None
    assert weights_identical(wrap_model(perturbed(base), "other"), models[1]) is False


def test_an_adapter_that_is_on_the_layer_and_not_active_changes_nothing() -> None:
    wrapped: Any = with_adapter(tiny_llama(), lora())
    wrapped.add_adapter("other", lora())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B.other" in name:
                parameter.add_(0.5)
    base = wrap_model(tiny_llama(), "base")
    assert weights_identical(base, wrap_model(wrapped, "untrained")) is True
    wrapped.set_adapter("other")
    assert weights_identical(base, wrap_model(wrapped, "trained")) is False


@pytest.mark.parametrize("config", [lora(), lora(modules_to_save=["lm_head"])])
def test_two_copies_of_one_adapter_are_the_same_weights(
    config: LoraConfig, base_folder: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "one", base_folder, config)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    one, other = (f"{base_folder}+{tmp_path / name}" for name in ("one", "other"))
    for memory in ("resident", "stream"):
        assert facts(compare(one, other, memory=memory)) == ("identical", True, [COPY])
    edit_json(tmp_path / "other" / "adapter_config.json", lora_alpha=64)
    assert facts(compare(one, other)) == ("changed", False, [])


# --- What cannot be looked into


def quantised_pair(kind: type[Sealed], change: float = 0.0) -> tuple[nn.Module, nn.Module]:
    one, other = (quantised(tiny_llama(), kind) for _ in range(2))
    if change:
        weight: Any = other.get_parameter("model.layers.2.mlp.up_proj.weight")
        weight.scale = weight.scale * (1 + change)
    return one, other


def test_weights_in_a_tensor_subclass_are_compared_by_what_they_are_made_of() -> None:
    """Quantisation libraries' own tensors: torch.equal is not defined on them."""
    assert facts(in_memory(*quantised_pair(Scaled))) == ("identical", True, [COPY])
    assert facts(in_memory(*quantised_pair(Scaled, change=0.01))) == ("changed", False, [])
    assert facts(in_memory(tiny_llama(), quantised(tiny_llama()))) == ("changed", False, [])


def test_weights_that_cannot_be_looked_into_are_not_known() -> None:
    diff = in_memory(*quantised_pair(Sealed))
    assert facts(diff) == ("identical", None, [])
    assert "the weights are the same" not in str(diff)
    assert "the weights differ" not in str(diff)


class Keeper(nn.Linear):
    """A layer that keeps something beside its weights."""

    kept: object = None

    def get_extra_state(self) -> object:
        return self.kept

    def set_extra_state(self, state: object) -> None:
        self.kept = state


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [({"step": 1}, {"step": 1}, True), ({"step": 1}, {"step": 2}, False), (iter([1]), iter([1]), None)],
)
def test_what_a_module_keeps_beside_its_weights_counts(
    ours: object, theirs: object, expected: bool | None
) -> None:
    models = []
    for kept in (ours, theirs):
        model: Any = tiny_llama()
        model.model.layers[0].mlp.up_proj.__class__ = Keeper
        model.model.layers[0].mlp.up_proj.kept = kept
        models.append(wrap_model(model, "model"))
    assert weights_identical(*models) is expected


def test_buffers_that_are_not_stored_may_have_been_changed_in_memory() -> None:
    """On single tokens at position 0, a rotation by other frequencies turns nothing."""
    base, other = tiny_llama(), tiny_llama()
    other.model.rotary_emb.inv_freq.mul_(0.5)
    prompts = ["a", "b"]
    assert [len(tiny_tokenizer()(p, add_special_tokens=False)["input_ids"]) for p in prompts] == [1, 1]
    plain = tiny_tokenizer()
    plain.add_bos_token = False
    models = wrap_model(base, "base"), wrap_model(other, "other")
    assert weights_identical(*models) is None
    assert why_the_same(*models, identical=None) == []


def test_one_memory_is_one_model_only_with_the_same_layers() -> None:
    """Two trees over the same parameters, one of which computes otherwise."""
    base = tiny_llama()
    other: Any = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    one = wrap_model(base, "base")
    assert why_the_same(one, wrap_model(other, "other"), identical=True) == [IN_MEMORY]
    other.model.layers[0].mlp.act_fn = nn.GELU()
    assert IN_MEMORY not in why_the_same(one, wrap_model(other, "other"), identical=True)


def test_views_of_one_memory_are_not_one_model() -> None:
    base, other = tiny_llama(), tiny_llama()
    for name, parameter in other.named_parameters():
        parameter.data = base.get_parameter(name).data
    square = "model.layers.1.self_attn.q_proj.weight"
    other.get_parameter(square).data = base.get_parameter(square).data.T
    assert facts(in_memory(base, other)) == ("changed", False, [])


# --- Pairs whose answer hangs on one of several conditions

CPU_OPTIONS = LoadOptions(torch.float32, torch.device("cpu"))


def from_files(model: nn.Module, name: str) -> LoadedModel:
    """A model as if it had been loaded from the files of this name."""
    return replace(wrap_model(model, name), kind="folder", source=Source(name, "folder", f"/{name}"))


def test_what_was_loaded_from_files_is_not_one_model_of_the_callers() -> None:
    model = tiny_llama(num_hidden_layers=1)
    given = wrap_model(model, "given")
    for pair in ((given, from_files(model, "b")), (from_files(model, "a"), given)):
        assert weights_identical(*pair) is True
        assert why_the_same(*pair, identical=True) == [COPY]
    assert why_the_same(from_files(model, "a"), from_files(model, "b"), identical=True) == [COPY]


def test_one_model_or_the_same_files_are_known_though_no_weight_can_be_looked_into() -> None:
    model, other = (quantised(tiny_llama(num_hidden_layers=1), Sealed) for _ in range(2))
    assert weights_identical(wrap_model(model, "one"), wrap_model(model, "one")) is True
    assert weights_identical(from_files(model, "a"), from_files(other, "a")) is True
    assert weights_identical(from_files(model, "a"), from_files(other, "b")) is None


def test_one_set_of_parameters_with_other_buffers_is_not_one_model() -> None:
    base = tiny_llama(num_hidden_layers=1)
    other: Any = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    models = wrap_model(base, "base"), wrap_model(other, "other")
    assert weights_identical(*models) is True
    other.model.rotary_emb.inv_freq.mul_(0.5)
    assert weights_identical(*models) is None
    assert why_the_same(*models, identical=None) == []


class WithScale(nn.Parameter):
    """Elements, and a scale beside them in an attribute."""

    scale: float


def scaled(parameter: nn.Parameter, scale: float) -> nn.Parameter:
    made = WithScale(parameter.data, requires_grad=False)
    made.scale = scale
    return made


@pytest.mark.parametrize("scales", [(1.0, 2.0), (None, 2.0), (2.0, None), (None, None)])
def test_one_memory_under_other_scales_is_not_one_weight(scales: tuple[float | None, float | None]) -> None:
    base: Any = tiny_llama(num_hidden_layers=2)
    other: Any = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    weight = base.model.layers[1].mlp.up_proj.weight
    for model, scale in zip((base, other), scales, strict=True):
        if scale is not None:
            model.model.layers[1].mlp.up_proj.weight = scaled(weight, scale)
    expected = [True, scales == (None, None)]
    assert shared_blocks(wrap_model(base, "base"), wrap_model(other, "other")) == expected


@pytest.mark.parametrize(
    ("n_elements", "change", "expected"), [(2**14, 0, True), (2**14, 1, False), (2**14 + 1, 0, False)]
)
def test_copies_of_small_buffers_are_one(n_elements: int, change: float, expected: bool) -> None:
    base: Any = tiny_llama(num_hidden_layers=1)
    other: Any = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    for model, last in ((base, 1.0), (other, 1.0 + change)):
        buffer = torch.ones(n_elements)
        buffer[-1] = last
        model.model.layers[0].register_buffer("kept", buffer)
    assert shared_blocks(wrap_model(base, "base"), wrap_model(other, "other")) == [expected]


class Renamed(LlamaForCausalLM):  # type: ignore[misc]  # it has no types
    """Another class over the same modules."""


def test_a_block_is_shared_by_models_of_one_class_and_as_many_blocks() -> None:
    base = tiny_llama(num_hidden_layers=2)
    models = []
    for change in ("none", "class", "depth"):
        other: Any = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        if change == "class":
            other.__class__ = Renamed
        models.append(wrap_model(other, change))
        if change == "depth":
            shorter = replace(models[-1].anatomy, blocks=models[-1].anatomy.blocks[:1])
            models[-1] = replace(models[-1], anatomy=shorter)
    same, of_other_class, shallow = (shared_blocks(wrap_model(base, "base"), model) for model in models)
    assert same == [True, True]
    assert of_other_class == shallow == [False, False]


def test_another_class_over_the_same_weights_has_the_same_weights() -> None:
    base: Any = tiny_llama(num_hidden_layers=1)
    renamed: Any = copy.deepcopy(base)
    renamed.__class__ = Renamed
    assert weights_identical(wrap_model(base, "base"), wrap_model(renamed, "renamed")) is True


def test_what_a_model_without_a_head_lacks_is_not_known_and_another_stack_is_other_weights() -> None:
    base: Any = tiny_llama(num_hidden_layers=1)
    whole, headless = wrap_model(base, "whole"), wrap_model(copy.deepcopy(base.model), "headless")
    other = wrap_model(perturbed(base.model), "other")
    assert weights_identical(whole, headless) is weights_identical(headless, whole) is None
    assert weights_identical(whole, other) is weights_identical(other, whole) is False


def test_one_more_layer_outside_of_the_stack_is_other_weights() -> None:
    base: Any = tiny_llama(num_hidden_layers=1)
    more: Any = copy.deepcopy(base)
    more.value_head = nn.Linear(32, 1).eval()
    assert weights_identical(wrap_model(base, "base"), wrap_model(more, "more")) is False


def test_adapters_in_memory_are_the_same_by_what_they_brought() -> None:
    base = tiny_llama(num_hidden_layers=1)
    one, same, other = (with_adapter(base, lora(), "lora_B") for _ in range(3))
    same.load_state_dict(one.state_dict())
    models = [wrap_model(model, name) for name, model in (("one", one), ("same", same), ("other", other))]
    assert weights_identical(models[0], models[1]) is True
    assert weights_identical(models[0], models[2]) is False


def test_an_adapter_that_is_off_in_one_layer_alone_is_not_called_off() -> None:
    finetuned: Any = with_adapter(tiny_llama(num_hidden_layers=1), lora(), "lora_B")
    finetuned.base_model.model.model.layers[0].self_attn.q_proj.enable_adapters(False)
    models = wrap_model(tiny_llama(num_hidden_layers=1), "base"), wrap_model(finetuned, "finetuned")
    assert why_the_same(*models, identical=False) == []


def test_of_models_read_by_different_readers_nothing_is_shared(base_folder: Path) -> None:
    references = parse_model(str(base_folder)), parse_model(str(base_folder))
    one, other = (load_paged(*references, CPU_OPTIONS, lambda role, name: None) for _ in range(2))
    given = wrap_model(tiny_llama(), "given")
    assert shared_blocks(*one) == [True] * 4
    for pair in ((one[0], other[1]), (one[0], given), (given, one[1])):
        assert shared_blocks(*pair) == [False] * 4
    assert weights_identical(one[0], given) is weights_identical(given, one[0]) is None
