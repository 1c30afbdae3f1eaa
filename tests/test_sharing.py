"""A fine-tune over its base's weights: what both files hold alike is in memory once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from architectures import CAUSAL, ENCODER_DECODERS, ENCODERS, REFUSED, UNBUILDABLE, build, swept
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from flattened import Scaled, quantised
from layouts import compare, edit_json, edit_weights, most, pair_of, save_adapter
from lazarus.errors import WeightsError
from lazarus.models import LoadedModel, same_design, shared_blocks, weights_identical, wrap_model
from lazarus.models.adapters import share_storage
from lazarus.models.checkpoint import build_empty
from lazarus.models.design import same_config
from lazarus.models.sharing import load_over
from lazarus.models.stored import read_headers, same_elements

NAMES = [n for n in (*CAUSAL, *ENCODERS, *ENCODER_DECODERS) if n not in UNBUILDABLE and n not in REFUSED]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors(model).items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def shared(base: LoadedModel, finetuned: LoadedModel) -> set[str]:
    """The names of the parameters that are in memory once."""
    ours, theirs = (dict(m.model.named_parameters()) for m in (base, finetuned))
    return {name for name in ours if ours[name].data_ptr() == theirs[name].data_ptr()}


def changed(model: PreTrainedModel, names: Iterable[str]) -> PreTrainedModel:
    """A copy of which only these parameters are others."""
    other, before = perturbed(model, 0.05), dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name not in names:
                parameter.copy_(before[name])
    return other


def in_last_block(model: PreTrainedModel) -> set[str]:
    """The names of the matrices of the last block."""
    last = wrap_model(model, "model").anatomy.blocks[-1]
    own = {id(p) for p in last.parameters() if p.dim() > 1}
    return {name for name, p in model.named_parameters() if id(p) in own}


@pytest.mark.parametrize("name", swept(NAMES))
def test_a_pair_is_each_model_by_itself_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = build(name)
    names = in_last_block(model)
    base = save_model(tmp_path / "base", model)
    tuned = save_model(tmp_path / "tuned", changed(model, names))
    ours, theirs = pair_of(str(base), str(tuned))
    assert_same_bits(tensors(ours.model), tensors(type(model).from_pretrained(base)))
    assert_same_bits(tensors(theirs.model), tensors(type(model).from_pretrained(tuned)))
    if name != "rwkv":  # it rescales its weights when it first runs
        own = dict(ours.model.named_parameters()).keys() - shared(ours, theirs)
        assert own
        assert all(n in names or n.endswith(".bias") for n in own), "tying copies the bias of some heads"
        assert shared_blocks(ours, theirs)[-1] is False


def test_the_blocks_that_did_not_change_are_shared(tmp_path: Path) -> None:
    model = tiny_llama()
    base = save_model(tmp_path / "base", model)
    tuned = save_model(tmp_path / "tuned", changed(model, ["model.layers.2.mlp.up_proj.weight"]))
    ours, theirs = pair_of(str(base), str(tuned))
    assert shared_blocks(ours, theirs) == [True, True, False, True]
    everything = set(dict(model.named_parameters()))
    assert everything - shared(ours, theirs) == {"model.layers.2.mlp.up_proj.weight"}
    assert theirs.model.config is not ours.model.config
    assert theirs.model.config.name_or_path == str(tuned)
    assert not any(p.requires_grad for p in theirs.model.parameters())
    assert not weights_identical(ours, theirs)


def test_base_is_never_changed(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    base = save_model(tmp_path / "base", model)
    tuned = save_model(tmp_path / "tuned", changed(model, ["model.embed_tokens.weight"]))
    adapter = tmp_path / "adapter"
    save_adapter(adapter, base, LoraConfig(r=2, target_modules=["q_proj"]))
    ours, theirs = pair_of(str(base), f"{tuned}+{adapter}")
    assert_same_bits(tensors(ours.model), tensors(model))
    head, table = theirs.model.lm_head.weight, theirs.model.model.embed_tokens.weight
    assert head is table, "a tied head is still tied"
    assert not torch.equal(head, ours.model.lm_head.weight)
    assert shared_blocks(ours, theirs) == [False] * 4, "each has a layer of the adapter"


def test_what_an_adapter_brings_of_its_models_own_weights_stays_on_its_side(
    base_folder: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "adapter", base_folder, LoraConfig(r=2, target_modules=["embed_tokens"]))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    brought = load_file(path)
    [key] = [key for key in brought if "base_layer" in key]
    brought[key] += 1
    save_file(brought, path, metadata={"format": "pt"})
    ours, theirs = pair_of(str(base_folder), str(tmp_path / "adapter"))
    assert torch.equal(theirs.model.get_input_embeddings().base_layer.weight, brought[key])
    assert_same_bits(tensors(ours.model), tensors(tiny_llama()))


@pytest.mark.parametrize("shard", ["1MB", "20KB"])
def test_shards_and_whole_files_share_as_well(shard: str, tmp_path: Path) -> None:
    model = tiny_llama()
    base = save_model(tmp_path / "base", model)
    other = changed(model, ["model.layers.0.mlp.up_proj.weight"])
    ours, theirs = pair_of(str(base), str(save_model(tmp_path / "tuned", other, max_shard_size=shard)))
    assert_same_bits(tensors(theirs.model), tensors(other))
    assert shared_blocks(ours, theirs) == [False, True, True, True]


def test_a_copy_is_in_memory_once(base_folder: Path, tmp_path: Path) -> None:
    ours, theirs = pair_of(str(base_folder), str(shutil.copytree(base_folder, tmp_path / "copy")))
    assert shared(ours, theirs) == set(dict(ours.model.named_parameters()))
    assert shared_blocks(ours, theirs) == [True] * 4
    assert weights_identical(ours, theirs)


def test_experts_that_are_stored_one_by_one_share_where_all_of_them_are_alike(tmp_path: Path) -> None:
    model = build("mixtral")
    name = next(n for n, _ in model.named_parameters() if n.endswith("layers.1.mlp.experts.down_proj"))
    other = perturbed(model, 0)
    with torch.no_grad():
        other.get_parameter(name)[2] += 0.5
    base, tuned = save_model(tmp_path / "base", model), save_model(tmp_path / "tuned", other)
    ours, theirs = pair_of(str(base), str(tuned))
    assert_same_bits(tensors(theirs.model), tensors(other))
    assert set(tensors(model)) - shared(ours, theirs) - set(dict(model.named_buffers())) == {name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_stored_type_is_no_hindrance(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama().bfloat16()
    base = save_model(tmp_path / "base", model)
    name = "model.layers.1.mlp.up_proj.weight"
    tuned = save_model(tmp_path / "tuned", changed(model, [name]))
    ours, theirs = pair_of(str(base), str(tuned), dtype)
    assert shared_blocks(ours, theirs) == [True, False, True, True]
    expected = type(model).from_pretrained(tuned, dtype=dtype)
    assert_same_bits(tensors(theirs.model), tensors(expected))


@pytest.mark.parametrize("types", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers_in_two_stored_types_are_in_memory_once(
    types: tuple[str, str], dtype: torch.dtype, tmp_path: Path
) -> None:
    stored = [getattr(torch, name) for name in types]
    narrow = min(stored, key=lambda each: each.itemsize)
    model = tiny_llama().to(narrow)
    name = "model.layers.1.mlp.up_proj.weight"
    base = save_model(tmp_path / "base", perturbed(model, 0).to(stored[0]))
    tuned = save_model(tmp_path / "tuned", changed(model, [name]).to(stored[1]))
    ours, theirs = pair_of(str(base), str(tuned), dtype)
    assert shared(ours, theirs) == set(dict(model.named_parameters())) - {name}
    assert shared_blocks(ours, theirs) == [True, False, True, True]
    for loaded, folder in ((ours, base), (theirs, tuned)):
        assert_same_bits(tensors(loaded.model), tensors(type(model).from_pretrained(folder, dtype=dtype)))


def test_rounded_numbers_are_others(base_folder: Path, tmp_path: Path) -> None:
    rounded = perturbed(tiny_llama(), 0).bfloat16()
    tuned = save_model(tmp_path / "tuned", rounded)
    ours, theirs = pair_of(str(base_folder), str(tuned))
    before, after = dict(tiny_llama().named_parameters()), dict(rounded.named_parameters())
    unrounded = {name for name in before if torch.equal(before[name], after[name].float())}
    assert unrounded == {name for name in before if "norm" in name}, "ones are ones in any type"
    assert shared(ours, theirs) == unrounded
    assert shared_blocks(ours, theirs) == [False] * 4
    expected = type(rounded).from_pretrained(tuned, dtype=torch.float32)
    assert_same_bits(tensors(theirs.model), tensors(expected))


LONG = torch.arange(2**13, dtype=torch.float32) / 64  # longer than what is compared at first


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (LONG.bfloat16(), LONG.bfloat16().double(), True),
        (LONG.bfloat16(), LONG, False),
        (torch.tensor([1.5, 2.0]).half(), torch.tensor([1.5, 2.0]).bfloat16(), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]).bfloat16(), False),
        (torch.tensor([torch.inf]), torch.tensor([torch.inf]).half(), True),
        (torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32), False),
        (torch.tensor([0, 0]), torch.tensor([0, 0], dtype=torch.int32), False),
        (torch.ones(2, 3), torch.ones(3, 2).half(), False),
        (torch.ones(0), torch.ones(0).half(), True),
    ],
)
def test_numbers_are_the_same_bit_for_bit_in_the_wider_type(
    one: Tensor, other: Tensor, expected: bool, tmp_path: Path
) -> None:
    stored = []
    for name, tensor in (("one", one), ("other", other)):
        path = str(tmp_path / name)
        save_file({"x": tensor}, path)
        stored.append(read_headers([path])["x"])
    assert same_elements(*stored) is expected
    assert same_elements(*reversed(stored)) is expected
    assert same_elements(stored[0], stored[0]) is True


@pytest.mark.parametrize("n_left", [-8, 0])
def test_two_files_that_were_cut_short_are_not_the_same_for_that(n_left: int, tmp_path: Path) -> None:
    stored = []
    for name in ("one", "other"):
        path = tmp_path / name
        save_file({"x": LONG}, path)
        stored.append(read_headers([str(path)])["x"])
        content = path.read_bytes()
        path.write_bytes(content[: (stored[-1].start if n_left == 0 else len(content) + n_left)])
    with pytest.raises(OSError, match="one changed while it was read"):
        same_elements(*stored)


# --- What is loaded by itself


def _full(model: PreTrainedModel) -> PreTrainedModel:
    other = perturbed(model, 0.1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01
    return other


def _resized(model: PreTrainedModel) -> PreTrainedModel:
    other = perturbed(model, 0)
    other.resize_token_embeddings(310)
    return other


def _of_other_eps(model: PreTrainedModel) -> PreTrainedModel:
    other = tiny_llama(rms_norm_eps=0.1)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("change", [_full, _resized, _of_other_eps])
def test_what_has_nothing_in_common_is_loaded_by_itself(
    change: Callable[[PreTrainedModel], PreTrainedModel], base_folder: Path, tmp_path: Path
) -> None:
    tuned = save_model(tmp_path / "tuned", change(tiny_llama()))
    ours, theirs = pair_of(str(base_folder), str(tuned))
    assert shared(ours, theirs) == set()
    assert shared_blocks(ours, theirs) == [False] * 4
    expected = type(theirs.model).from_pretrained(tuned, dtype=torch.float32)
    assert_same_bits(tensors(theirs.model), tensors(expected))
    assert theirs.model.config.rms_norm_eps == expected.config.rms_norm_eps


def test_a_damaged_file_is_refused_as_ever(base_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=str(folder)):
        pair_of(str(base_folder), str(folder))


def test_notes_on_a_file_do_not_depend_on_what_it_shares(base_folder: Path, tmp_path: Path) -> None:
    extra = {"value_head.weight": torch.zeros(3)}
    base = edit_weights(base_folder, tmp_path / "base", lambda tensors: tensors.update(extra))
    tuned = edit_weights(base, tmp_path / "tuned", lambda t: t["model.layers.3.mlp.up_proj.weight"].mul_(2))
    diff = compare(base, tuned)
    assert most(diff) > 0
    for folder in (base, tuned):
        [note] = [note for note in diff.notes if str(folder) in note]
        assert "1 tensors of the checkpoint have no place" in note


def test_building_a_model_empty_leaves_its_configuration_as_it_was(base_folder: Path) -> None:
    """It chooses an attention, and a configuration with a choice is not one without."""
    config = LlamaConfig.from_pretrained(base_folder)
    files = [str(base_folder / "model.safetensors")]
    build_empty(LlamaForCausalLM, config, files, torch.float32)
    assert same_config(config, LlamaConfig.from_pretrained(base_folder))


def test_inert_entries_of_a_configuration_do_not_matter(base_folder: Path, tmp_path: Path) -> None:
    tuned = edit_weights(base_folder, tmp_path / "tuned", lambda t: t["lm_head.weight"].mul_(2))
    edit_json(tuned / "config.json", use_cache=False, transformers_version="4.0.0")
    ours, theirs = pair_of(str(base_folder), str(tuned))
    assert shared_blocks(ours, theirs) == [True] * 4
    assert theirs.model.config is not ours.model.config


# --- Models in memory


def test_models_in_memory_share_what_is_at_one_address(base_folder: Path) -> None:
    model = tiny_llama()
    one, copy = wrap_model(model, "one"), wrap_model(perturbed(model, 0), "copy")
    assert shared_blocks(one, one) == [True] * 4
    assert shared_blocks(one, copy) == [False] * 4
    with torch.no_grad():
        for name, parameter in copy.model.named_parameters():
            if ".layers.1." not in name:
                parameter.data = model.get_parameter(name).data
    assert shared_blocks(one, copy) == [True, False, True, True]


def test_blocks_of_other_layers_are_not_shared(tmp_path: Path, base_folder: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2])
    save_adapter(tmp_path / "adapter", base_folder, config)
    ours, theirs = pair_of(str(base_folder), str(tmp_path / "adapter"))
    assert shared_blocks(ours, theirs) == [True, True, False, True]


# --- What shapes a computation besides the weights


def twin(model: PreTrainedModel) -> Any:
    """A second tree over the same weights."""
    return share_storage(model).eval()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "epsilon": lambda block: setattr(block.input_layernorm, "variance_epsilon", 1e-2),
    "scale of attention": lambda block: setattr(block.self_attn, "scaling", 0.1),
    "window": lambda block: setattr(block.self_attn, "sliding_window", 2),
    "activation": lambda block: setattr(block.mlp, "act_fn", torch.nn.GELU()),
    "forward": lambda block: setattr(block.mlp, "forward", lambda states: states),
    "hook": lambda block: block.register_forward_hook(lambda _m, _a, states: states + 0.1),
    "hook inside": lambda block: block.mlp.register_forward_hook(lambda _m, _a, states: states + 0.1),
    "hook before": lambda block: block.register_forward_pre_hook(lambda _m, a: (a[0] * 2, *a[1:])),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_block_that_computes_otherwise_over_the_same_weights_is_another(kind: str) -> None:
    base = tiny_llama()
    finetuned = twin(base)
    models = wrap_model(base, "base"), wrap_model(finetuned, "finetuned")
    assert shared_blocks(*models) == [True] * 4
    CHANGES[kind](finetuned.model.layers[1])
    assert shared_blocks(*models) == [True, False, True, True]
    assert shared_blocks(*reversed(models)) == [True, False, True, True]


def test_a_model_that_was_asked_for_hidden_states_before_computes_the_same() -> None:
    """transformers leaves a hook on each of its blocks."""
    base = tiny_llama()
    finetuned = twin(base)
    base(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert all(block._forward_hooks for block in base.model.layers)
    assert shared_blocks(wrap_model(base, "base"), wrap_model(finetuned, "finetuned")) == [True] * 4


def test_another_attention_or_quantisation_is_another_design() -> None:
    base = tiny_llama()
    for name, value in (
        ("_attn_implementation", "eager"),
        ("quantization_config", {"quant_method": "int8", "threshold": 6.0}),
        ("rms_norm_eps", 1e-3),
    ):
        finetuned = twin(base)
        assert same_design(base, finetuned)
        setattr(finetuned.config, name, value)
        assert not same_design(base, finetuned)
        assert shared_blocks(wrap_model(base, "b"), wrap_model(finetuned, "f")) == [False] * 4


def test_inert_entries_of_a_configuration_inside_another_do_not_matter() -> None:
    base = build("gemma3")
    finetuned = twin(base)
    text = finetuned.config.get_text_config()
    assert text is not finetuned.config
    text.name_or_path, text.dtype = "elsewhere", "bfloat16"
    assert same_design(base, finetuned)
    text.rms_norm_eps = 0.1
    assert not same_design(base, finetuned)


def test_weights_without_an_address_are_not_one_for_that() -> None:
    """A tensor subclass may have no storage: then every address is 0."""
    base = quantised(tiny_llama())
    finetuned: Any = twin(base)
    models = wrap_model(base, "base"), wrap_model(finetuned, "finetuned")
    assert shared_blocks(*models) == [True] * 4
    weight: Any = finetuned.model.layers[2].mlp.up_proj.weight
    assert weight.data_ptr() == 0
    finetuned.model.layers[2].mlp.up_proj.weight = nn.Parameter(
        Scaled(weight.codes, weight.scale * 2), requires_grad=False
    )
    assert shared_blocks(*models) == [True, True, False, True]
    assert compare(base, finetuned, tokenizer=tiny_tokenizer()).summary.verdict == "changed"


# --- What is stored twice, or under the other name, and what is handed back

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def _both_stored(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[TABLE].clone()


def _both_stored_apart(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[TABLE] * 2


def _head_stored(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors.pop(TABLE)


@pytest.mark.parametrize("stored", [_both_stored, _both_stored_apart, _head_stored])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_tied_weights_are_those_that_transformers_makes_of_what_is_stored(
    stored: Callable[[dict[str, Tensor]], None], name: str, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        if name in tensors:
            tensors[name] += 1

    plain = save_model(tmp_path / "plain", tiny_llama(num_hidden_layers=1, tie_word_embeddings=True))
    base = edit_weights(plain, tmp_path / "base", stored)
    tuned = edit_weights(base, tmp_path / "tuned", change)
    for loaded, folder in zip(pair_of(str(base), str(tuned)), (base, tuned), strict=True):
        expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert_same_bits(tensors(loaded.model), tensors(expected))
        found: Any = loaded.model
        ours, theirs = ((m.lm_head.weight is m.model.embed_tokens.weight) for m in (found, expected))
        assert ours is theirs


def test_two_checkpoints_with_a_wrappers_names_are_each_model_by_itself(tmp_path: Path) -> None:
    def wrap(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"_orig_mod.{name}"] = tensors.pop(name)

    model = tiny_llama(num_hidden_layers=2)
    tuned = changed(model, ["model.layers.1.mlp.up_proj.weight"])
    folders = []
    for name, each in (("base", model), ("tuned", tuned)):
        plain = save_model(tmp_path / f"plain-{name}", each)
        folders.append(str(edit_weights(plain, tmp_path / name, wrap)))
    for loaded, expected in zip(pair_of(folders[0], folders[1]), (model, tuned), strict=True):
        assert_same_bits(tensors(loaded.model), tensors(expected))
        assert [note.code for note in loaded.notes] == ["wrapped-names"]


def test_a_model_over_anothers_weights_is_ready_to_run_and_not_to_train(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    tuned = changed(model, ["model.norm.weight", "lm_head.weight"])
    ours, theirs = (
        read_headers([str(save_model(tmp_path / name, each) / "model.safetensors")])
        for name, each in (("base", model), ("tuned", tuned))
    )
    found = load_over(model.train(), ours, theirs, torch.device("cpu"))
    assert found is not None
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
