"""Models whose blocks are read when they are needed: the same bits as ever, one block in memory at a time."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from architectures import CAUSAL, ENCODER_DECODERS, ENCODERS, MULTIMODAL, REFUSED, UNBUILDABLE, build, swept
from factories import notes_of, perturbed, save_model, tiny_llama, tiny_tokenizer
from layouts import compare, edit_json, edit_weights, pair_of, save_adapter, save_gguf, store_codes
from lazarus.errors import ModelError, UnsupportedModelError, WeightsError
from lazarus.models import (
    LoadedModel,
    LoadOptions,
    Pager,
    estimate,
    layout,
    load_paged,
    parse_model,
    shared_blocks,
    weights_identical,
    wrap_model,
)

RESCALES_ITSELF = "rwkv"
ALL = (*CAUSAL, *ENCODERS, *ENCODER_DECODERS, *MULTIMODAL)
NAMES = [n for n in ALL if n not in UNBUILDABLE and n not in REFUSED and n != RESCALES_ITSELF]
IDS = torch.tensor([[11, 45, 7, 93, 30, 62, 18, 77, 24, 50, 36, 81]])
CPU = torch.device("cpu")
UP = "model.layers.2.mlp.up_proj.weight"


def paged(base: Path | str, finetuned: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    options = LoadOptions(dtype, CPU)
    return load_paged(parse_model(str(base)), parse_model(str(finetuned)), options, lambda role, name: None)


def pager_of(model: LoadedModel) -> Pager:
    assert model.pager is not None
    return model.pager


def logits(model: PreTrainedModel) -> Tensor:
    more: dict[str, Any] = {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        more["use_cache"] = False
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = IDS
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, **more).logits
    return found


def assert_as_loaded_whole(
    base: Path | str, finetuned: Path | str, dtype: torch.dtype = torch.float32
) -> None:
    for model, whole in zip(
        paged(base, finetuned, dtype), pair_of(str(base), str(finetuned), dtype), strict=True
    ):
        assert torch.equal(logits(model.model), logits(whole.model))
        for index in range(pager_of(model).n_blocks):
            pager_of(model).load(index)
        pager_of(model).load_head()
        pager_of(model).keep_embeddings()
        found, expected = (m.model.state_dict(keep_vars=True) for m in (model, whole))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
        assert not any(p.requires_grad for p in model.model.parameters())


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings and heads are read on demand however small they are."""
    monkeypatch.setattr(layout, "SMALL_BYTES", 0)


# --- The same bits


@pytest.mark.usefixtures("nothing_is_small")
@pytest.mark.parametrize("name", swept(NAMES))
def test_every_architecture_is_what_it_is_when_loaded_whole(name: str, tmp_path: Path) -> None:
    model = build(name)
    base = save_model(tmp_path / "base", model)
    assert_as_loaded_whole(base, save_model(tmp_path / "tuned", perturbed(model)))


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mixtral", "gemma2", "mamba", "albert:masked", "t5:seq2seq"]
)
def test_half_precision_is_converted_alike(name: str, tmp_path: Path) -> None:
    model = build(name)
    base = save_model(tmp_path / "base", model)
    tuned = save_model(tmp_path / "tuned", perturbed(model).bfloat16())
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_loaded_whole(base, tuned, dtype)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_shards_are_read_where_they_are(name: str, tmp_path: Path) -> None:
    model = build(name)
    base = save_model(tmp_path / "base", model, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    assert_as_loaded_whole(base, save_model(tmp_path / "tuned", perturbed(model)))


def test_the_stored_type_is_the_runs_where_none_is_asked_for(tmp_path: Path, finetuned_folder: Path) -> None:
    folder = save_model(tmp_path / "half", tiny_llama().bfloat16())
    options = LoadOptions(None, CPU)
    pair = load_paged(
        parse_model(str(folder)), parse_model(str(finetuned_folder)), options, lambda role, name: None
    )
    assert [model.run_dtype for model in pair] == ["bfloat16", "float32"]


# --- On demand


def test_a_pass_holds_one_block_at_a_time(base_folder: Path, finetuned_folder: Path) -> None:
    model, _ = paged(base_folder, finetuned_folder)
    held: list[list[int]] = []
    for block in model.anatomy.blocks:
        block.register_forward_pre_hook(lambda *_: held.append(_loaded(model)))
    logits(model.model)
    assert held == [[0], [1], [2], [3]]
    assert _loaded(model) == []


def _loaded(model: LoadedModel) -> list[int]:
    """The blocks whose parameters are there."""
    return [
        index
        for index, block in enumerate(model.anatomy.blocks)
        if not any(parameter.is_meta for parameter in block.parameters())
    ]


def test_what_was_loaded_stays_until_it_is_freed(base_folder: Path, finetuned_folder: Path) -> None:
    model, _ = paged(base_folder, finetuned_folder)
    pager = pager_of(model)
    pager.load(2)
    logits(model.model)
    assert _loaded(model) == [2]
    before = pager.bytes_read
    assert before > 0
    pager.free(2)
    assert _loaded(model) == []
    logits(model.model)
    blocks = sum(pager.block_bytes(index) for index in range(4))
    assert pager.bytes_read - before == blocks, "each once, in float32 as they are stored"


def test_a_block_whose_pass_fails_is_freed(base_folder: Path) -> None:
    model, _ = paged(base_folder, base_folder)

    def fail(*_: object) -> None:
        raise RuntimeError("enough")

    handle = model.anatomy.blocks[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="enough"):
        logits(model.model)
    handle.remove()
    assert _loaded(model) == []


def test_a_block_that_something_stands_in_for_is_not_read(base_folder: Path) -> None:
    model, _ = paged(base_folder, base_folder)
    before = pager_of(model).bytes_read
    for block in model.anatomy.blocks:
        block.forward = lambda states, *args, **kwargs: states
    logits(model.model)
    assert pager_of(model).bytes_read == before
    for block in model.anatomy.blocks:
        del block.forward
    logits(model.model)
    assert pager_of(model).bytes_read > before


def test_reading_touches_no_module_and_may_go_on_beside_a_pass(
    base_folder: Path, finetuned_folder: Path
) -> None:
    expected = logits(pair_of(str(base_folder), str(finetuned_folder))[0].model)
    model, _ = paged(base_folder, finetuned_folder)
    pager = pager_of(model)
    with ThreadPoolExecutor(2) as pool:
        reads = [pool.submit(pager.read, index % 4) for index in range(40)]
        found = [logits(model.model) for _ in range(5)]
    assert all(torch.equal(each, expected) for each in found)
    assert _loaded(model) == []
    for index, read in enumerate(reads):
        pager.put(index % 4, read.result())
    assert _loaded(model) == [0, 1, 2, 3]
    assert torch.equal(logits(model.model), expected)


def test_memory_does_not_grow_with_what_has_been_read(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    folder = save_model(tmp_path / "model", model)
    del model
    loaded, _ = paged(folder, folder)
    pager = pager_of(loaded)
    for index in range(20):  # until the allocator has settled
        pager.load(index % 4)
        pager.free(index % 4)
    before = psutil.Process().memory_info().rss
    for index in range(100):
        pager.load(index % 4)
        pager.free(index % 4)
    grown = psutil.Process().memory_info().rss - before
    assert grown < 4 * pager.block_bytes(0), "of the 100 that were read"


# --- Embeddings and heads

VOCABULARY = 280_000


@pytest.mark.parametrize("tied", [False, True])
def test_large_embeddings_are_read_by_rows_and_a_large_head_at_the_end(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, tie_word_embeddings=tied)
    table_bytes = model.model.embed_tokens.weight.nbytes
    assert table_bytes > layout.SMALL_BYTES
    folder = save_model(tmp_path / "model", model)
    expected, states = logits(model), _last_states(model)
    del model
    loaded, twin = paged(folder, folder)
    pager = pager_of(loaded)
    for each in (loaded, twin):
        assert torch.equal(_last_states(each.model), states)
    assert pager.bytes_read < table_bytes / 10
    pager.load_head()
    assert pager.bytes_read > table_bytes * 0.9
    assert torch.equal(loaded.model.lm_head(states), expected)
    pager_of(twin).load_head()
    pager.free_head()
    assert torch.equal(twin.model.lm_head(states), expected), "the other one's head is still there"
    pager_of(twin).free_head()
    for each in (loaded, twin):
        assert torch.equal(logits(each.model), expected), "it is loaded for a pass"
        assert torch.equal(_last_states(each.model), states)


def _last_states(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        states: Tensor = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    return states


@pytest.mark.usefixtures("nothing_is_small")
def test_rows_are_added_as_they_are_asked_for(base_folder: Path, finetuned_folder: Path) -> None:
    model, _ = paged(base_folder, finetuned_folder)
    table = tiny_llama().model.embed_tokens.weight
    pager = pager_of(model)
    before = pager.bytes_read
    for ids in ([5, 7, 8], [7, 2, 299]):
        model.model.get_input_embeddings()(torch.tensor([ids]))
    with pytest.raises(IndexError, match="out of range"):
        model.model.get_input_embeddings()(torch.tensor([[5, 10**6, -1]]))
    weight = model.model.model.embed_tokens.weight
    asked = [2, 5, 7, 8, 299]
    assert torch.equal(weight[asked], table[asked])
    assert pager.bytes_read - before == len(asked) * table[0].nbytes


# --- Adapters

TARGETS = ["q_proj", "down_proj"]
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "dora": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "gaussian": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="gaussian"),
    "upper half": lambda: LoraConfig(r=4, target_modules=TARGETS, layers_to_transform=[2, 3]),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "embeddings": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "q_proj", "lm_head"]),
    "embeddings saved": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "new tokens": lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[45, 70]),
}


@pytest.mark.usefixtures("nothing_is_small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_runs_on_blocks_that_are_read(
    kind: str, dtype: torch.dtype, tmp_path: Path, base_folder: Path
) -> None:
    adapter = tmp_path / "adapter"
    save_adapter(adapter, base_folder, ADAPTERS[kind]())
    for base, finetuned in ((base_folder, adapter), (f"{base_folder}+{adapter}", base_folder)):
        whole = [logits(m.model) for m in pair_of(str(base), str(finetuned), dtype)]
        assert not torch.equal(*whole)
        for model, expected in zip(paged(base, finetuned, dtype), whole, strict=True):
            assert torch.equal(logits(model.model), expected)
            assert {p.dtype for p in model.model.parameters()} == {dtype}


def test_an_adapter_and_its_model_are_read_once(tmp_path: Path, base_folder: Path) -> None:
    save_adapter(tmp_path / "adapter", base_folder, ADAPTERS["upper half"]())
    base, finetuned = paged(base_folder, tmp_path / "adapter")
    assert shared_blocks(base, finetuned) == [True, True, False, False]
    before = pager_of(finetuned).bytes_read
    for index in range(4):
        pager_of(base).load(index)
        pager_of(finetuned).load(index)
    assert pager_of(finetuned).bytes_read == before
    ours = base.anatomy.blocks[3].self_attn.q_proj.weight
    theirs = finetuned.anatomy.blocks[3].self_attn.q_proj.base_layer.weight
    assert ours.data_ptr() == theirs.data_ptr()
    for index in range(4):
        pager_of(base).free(index)
    pager_of(finetuned).free(0)
    assert _loaded(finetuned) == [1, 2, 3], "its own hold on what base has forgotten"
    pager_of(finetuned).load(0)
    assert pager_of(finetuned).bytes_read == before + pager_of(finetuned).block_bytes(0)


# --- What both files hold alike


def test_what_is_alike_is_taken_from_base(tmp_path: Path, base_folder: Path) -> None:
    tuned = edit_weights(base_folder, tmp_path / "tuned", lambda tensors: tensors[UP].mul_(2))
    base, finetuned = paged(base_folder, tuned)
    ours, theirs = pager_of(base), pager_of(finetuned)
    assert theirs.bytes_read == 0, "embeddings, norm and head are base's"
    ours.put(2, ours.read(2))
    theirs.put(2, theirs.read(2))
    assert theirs.bytes_read == finetuned.model.get_parameter(UP).nbytes
    assert not torch.equal(base.model.get_parameter(UP), finetuned.model.get_parameter(UP))
    down = UP.replace("up", "down")
    assert base.model.get_parameter(down).data_ptr() == finetuned.model.get_parameter(down).data_ptr()
    assert [theirs.same_as_base(index) for index in range(4)] == [True, True, False, True]
    assert shared_blocks(base, finetuned) == [True, True, False, True]
    assert not weights_identical(base, finetuned)
    assert not any(ours.same_as_base(index) for index in range(4)), "it is nobody's fine-tune"


def test_a_note_tells_which_blocks_ran_once(tmp_path: Path, base_folder: Path) -> None:
    tuned = edit_weights(base_folder, tmp_path / "tuned", lambda tensors: tensors[UP].mul_(2))
    diff = compare(base_folder, tuned, memory="stream")
    [note] = notes_of(diff, "common-blocks")
    assert note.startswith("blocks 0 to 1 are the same in both models")
    assert [layer.relative_l2 == 0 for layer in diff.layers] == [True, True, False, False]


def test_a_block_of_other_layers_over_the_same_weights_is_another(tmp_path: Path, base_folder: Path) -> None:
    base, finetuned = paged(base_folder, shutil.copytree(base_folder, tmp_path / "copy"))
    finetuned.model.model.layers[1].mlp.act_fn = nn.GELU()
    assert shared_blocks(base, finetuned) == [True, False, True, True]


def test_a_weight_that_several_blocks_hold_is_part_of_each(tmp_path: Path) -> None:
    """It is read once and stays in memory: it is in no block's own part of the files."""
    model = build("zamba")
    base = save_model(tmp_path / "base", model)
    blocks = wrap_model(model, "zamba").anatomy.blocks
    holders: dict[int, list[int]] = {}
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            holders.setdefault(id(parameter), []).append(index)
    shared = next(p for p in model.parameters() if p.dim() > 1 and len(holders.get(id(p), ())) > 1)
    with torch.no_grad():
        shared.mul_(1.5)
    pair = paged(base, save_model(tmp_path / "tuned", model))
    assert shared_blocks(*pair) == [index not in holders[id(shared)] for index in range(len(blocks))]
    assert weights_identical(*pair) is False


def test_blocks_with_the_same_numbers_in_another_type_are_the_same(tmp_path: Path) -> None:
    model = tiny_llama().bfloat16()
    base = save_model(tmp_path / "base", model)
    with torch.no_grad():
        model.get_parameter(UP).mul_(2)
    pair = paged(base, save_model(tmp_path / "tuned", model.float()), dtype=torch.float32)
    assert shared_blocks(*pair) == [True, True, False, True]
    assert not weights_identical(*pair)


def test_what_base_reads_ahead_is_not_read_twice(tmp_path: Path, base_folder: Path) -> None:
    base, finetuned = paged(base_folder, shutil.copytree(base_folder, tmp_path / "copy"))
    ahead = pager_of(base).read(1)
    pager_of(finetuned).put(1, pager_of(finetuned).read(1))
    assert pager_of(finetuned).bytes_read == 0
    del ahead
    pager_of(finetuned).load(2)
    assert pager_of(finetuned).bytes_read == pager_of(finetuned).block_bytes(2)


def test_weights_are_identical_whatever_their_layout(tmp_path: Path, base_folder: Path) -> None:
    copy = shutil.copytree(base_folder, tmp_path / "copy")
    wider = save_model(tmp_path / "wider", tiny_llama().double())
    backbone = save_model(tmp_path / "tuned", perturbed(tiny_llama()))
    for other, expected in ((copy, True), (wider, True), (backbone, False)):
        assert weights_identical(*paged(base_folder, other)) is expected
        assert weights_identical(*pair_of(str(base_folder), str(other))) is expected


def test_blocks_of_another_design_are_not_the_same(tmp_path: Path, base_folder: Path) -> None:
    copy = shutil.copytree(base_folder, tmp_path / "copy")
    edit_json(copy / "config.json", rms_norm_eps=0.1)
    base, finetuned = paged(base_folder, copy)
    assert shared_blocks(base, finetuned) == [False] * 4
    assert weights_identical(base, finetuned)


# --- What is refused


def _gguf(folder: Path) -> Path:
    folder.mkdir()
    kind = gguf.GGMLQuantizationType.F32
    return save_gguf(folder / "model.gguf", tiny_llama(), tiny_tokenizer(), kind)


def _quantised(folder: Path) -> Path:
    save_model(folder, tiny_llama(), tiny_tokenizer())
    store_codes(folder, quant_method="eetq")  # which transformers reads, and no one decodes
    return folder


def _rescaling(folder: Path) -> Path:
    return save_model(folder, build(RESCALES_ITSELF))


@pytest.mark.parametrize(
    ("save", "why"),
    [(_gguf, "a GGUF file"), (_quantised, "quantised"), (_rescaling, "rescales all its weights")],
)
def test_what_cannot_be_read_by_blocks_says_why(
    save: Callable[[Path], Path], why: str, tmp_path: Path, base_folder: Path
) -> None:
    model = save(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=why) as refusal:
        paged(base_folder, model)
    assert str(refusal.value).startswith(f"{model}: cannot be read block by block")
    assert str(refusal.value).endswith('Use `memory="resident"`.')
    options = LoadOptions(torch.float32, CPU)
    assert estimate(parse_model(str(base_folder)), parse_model(str(model)), options) is None


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"), "its start, pissa,"),
        (LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"), "its start, olora,"),
        (LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["input_layernorm"]), "brings input_layer"),
        (LoraConfig(r=4, target_modules=TARGETS, bias="all"), "biases"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[], modules_to_save=["mlp"]), "brings mlp"),
    ],
)
def test_an_adapter_that_changes_blocks_is_refused(
    config: PeftConfig, why: str, tmp_path: Path, base_folder: Path
) -> None:
    save_adapter(tmp_path / "adapter", base_folder, config)
    with pytest.raises(UnsupportedModelError, match=why) as refusal:
        paged(base_folder, tmp_path / "adapter")
    assert str(refusal.value).endswith('Use `memory="resident"`.')


@pytest.mark.parametrize("name", ["lm_head.weight", UP, "model.norm.weight"])
def test_a_missing_tensor_is_an_error_before_anything_runs(
    name: str, tmp_path: Path, base_folder: Path
) -> None:
    folder = edit_weights(base_folder, tmp_path / "less", lambda tensors: tensors.pop(name))
    with pytest.raises(WeightsError, match=name):
        paged(base_folder, folder)


def test_weights_of_another_shape_are_an_error_before_anything_runs(
    tmp_path: Path, base_folder: Path
) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "other")
    edit_json(folder / "config.json", intermediate_size=32)
    with pytest.raises(WeightsError, match="has the shape"):
        paged(base_folder, folder)


def test_a_file_that_is_cut_short_is_an_error(tmp_path: Path, base_folder: Path) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=str(folder)):
        paged(base_folder, folder)


def test_a_file_that_is_gone_when_a_block_is_read_is_an_error(tmp_path: Path, base_folder: Path) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "gone")
    model, _ = paged(folder, base_folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="a file is missing"):
        pager_of(model).load(1)


# --- Sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_is_what_it_takes(dtype: torch.dtype, base_folder: Path, finetuned_folder: Path) -> None:
    options = LoadOptions(dtype, CPU)
    first, second = parse_model(str(base_folder)), parse_model(str(finetuned_folder))
    base, _ = pair_of(str(base_folder), str(finetuned_folder), dtype)
    whole, blocks = _n_bytes(base.model), [_n_bytes(block) for block in base.anatomy.blocks]
    once, twice = estimate(first, first, options), estimate(first, second, options)
    assert once is not None
    assert twice is not None
    assert (once.resident, once.block, once.rest) == (whole, max(blocks), whole - sum(blocks))
    assert (twice.resident, twice.block, twice.rest) == (
        2 * whole,
        2 * max(blocks),
        2 * (whole - sum(blocks)),
    )
    model, _ = paged(base_folder, finetuned_folder, dtype)
    assert [pager_of(model).block_bytes(index) for index in range(4)] == blocks


def _n_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
