"""Situations in which a verdict once claimed more than was compared, or blamed the wrong side."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

import lazarus
from factories import notes_of, save_model, tiny_llama, tiny_tokenizer
from ggufs import write_gguf
from layouts import compare, edit_json, edit_weights
from lazarus.errors import (
    AdapterError,
    GateNotMetError,
    PromptsError,
    UnsupportedModelError,
    WeightsError,
)

NAN = float("nan")
TEXTS = ["Hello", "What is AI?"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("claims") / "base", tiny_llama(), tiny_tokenizer())


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def tuned(model: Any, folder: Path, **settings: Any) -> Any:
    torch.manual_seed(2)
    more = {"target_modules": ["q_proj"], "init_lora_weights": False, **settings}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **more))
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    tuned(load(base), base.parent / "adapter")
    return base.parent / "adapter"


# --- Settings


def test_settings_that_a_gguf_file_has_and_no_model_takes_are_not_known(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = save_model(tmp_path / "base", model, tiny_tokenizer())
    one, two, same = (
        write_gguf(tmp_path / f"{name}.gguf", "llama", model, {"logit_scale": scale})
        for name, scale in (("one", 2.0), ("two", 8.0), ("same", 2.0))
    )
    for run in (compare, lazarus.weight_diff):
        for pair, differs in (((folder, one), None), ((one, two), True)):
            diff = run(*pair)
            parts = {p.what: p.differs for p in diff.record.finetuned.not_compared}
            assert parts["setting llama.logit_scale"] is differs
            with pytest.raises(GateNotMetError, match=r"llama\.logit_scale"):
                diff.check_gates(expect="identical")
        run(one, same).check_gates(expect="identical")


@pytest.mark.parametrize(("setting", "value"), [("pad_token_id", 5), ("is_decoder", True)])
def test_settings_that_move_positions_or_the_mask_count(setting: str, value: Any, tmp_path: Path) -> None:
    """RoBERTa counts positions from behind its padding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = RobertaConfig(vocab_size=300, max_position_embeddings=80, pad_token_id=2, **sizes)
    one = save_model(tmp_path / "one", RobertaForMaskedLM(config).eval(), tiny_tokenizer())
    shutil.copytree(one, tmp_path / "two")
    edit_json(tmp_path / "two" / "config.json", **{setting: value})
    diff = lazarus.weight_diff(one, tmp_path / "two")
    with pytest.raises(GateNotMetError, match=setting):
        diff.check_gates(expect="identical")
    assert any(f"settings that differ: {setting}" in note for note in compare(one, tmp_path / "two").notes)


def test_a_configured_vocabulary_that_is_not_the_tables_is_told(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "cut")
    edit_json(tmp_path / "cut" / "config.json", vocab_size=200)
    with pytest.raises(GateNotMetError, match="vocab_size = 200 beside 300 rows"):
        lazarus.weight_diff(base, tmp_path / "cut").check_gates(expect="identical")


# --- Weights that hold NaN


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("texts", [["Hello"], ["Hello", "What is AI, and what is it for?"]])
def test_weights_that_hold_nan_are_told_though_no_state_shows_it(
    texts: list[str], memory: Any, base: Path, tmp_path: Path
) -> None:
    """Without padding a kernel may leave out what it computes of NaN."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = NAN

    broken = edit_weights(base, tmp_path / "broken", spoil)
    diff = lazarus.activation_diff(base, broken, texts, memory=memory)
    [note] = notes_of(diff, "broken-weights")
    assert note.startswith(f"{broken}: 1 weights hold NaN or infinity, first model.layers.1.self_attn.q_proj")
    assert not any("--batch-tokens" in note for note in diff.notes)
    for gates in ({"fail_above": 2.0}, {"expect": "identical"}):
        with pytest.raises(GateNotMetError):
            diff.check_gates(**gates)
    lens = lazarus.compare(base, broken, "Hello")
    assert any("1 weights hold NaN" in note for note in lens.notes)


def test_an_adapter_that_holds_nan_is_told(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "broken")
    path = tmp_path / "broken" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if "layers.3" in name and "lora_B" in name)[0] = NAN
    save_file(tensors, path, {"format": "pt"})
    for pair in ((base, f"{base}+{path.parent}"), (f"{base}+{path.parent}", base)):
        diff = compare(*pair)
        assert any("1 weights hold NaN or infinity, first" in note for note in diff.notes)
        with pytest.raises(GateNotMetError):
            diff.check_gates(fail_above=2.0)


# --- Right merges


def merge(base: Path, folder: Path, *adapters: Path) -> Path:
    model = load(base, dtype=torch.bfloat16)
    for each in adapters:
        model = PeftModel.from_pretrained(model, each).merge_and_unload()
    return save_model(folder, model, tiny_tokenizer())


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base in bfloat16, and two adapters of it: the second trains tokens as well."""
    root = tmp_path_factory.mktemp("half")
    folder = save_model(root / "base", tiny_llama().to(torch.bfloat16), tiny_tokenizer())
    for name, more in (("one", {}), ("two", {"trainable_token_indices": [5, 7]})):
        tuned(load(folder), root / name, target_modules=["q_proj", "v_proj"], **more)
    return folder, root / "one", root / "two"


@pytest.mark.parametrize("number", [(1,), (2,), (1, 2)], ids=["one", "trained tokens", "one on the other"])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_right_merges_are_within_rounding(
    number: tuple[int, ...], half: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder, adapters = half[0], [half[i] for i in number]
    right = merge(folder, tmp_path / "right", *adapters)
    edit_json(right / "config.json", eos_token_id=9, attention_dropout=0.1, unsloth_version="2025.1")
    stacked = "+".join(map(str, (folder, *adapters)))
    for run, verdict in ((compare, "within_rounding"), (lazarus.weight_diff, "rounding")):
        assert run(stacked, right).summary.verdict == verdict
        run(stacked, right).check_gates(expect="identical")
    twice = merge(folder, tmp_path / "twice", *adapters, adapters[0])
    for run in (compare, lazarus.weight_diff):
        assert run(stacked, twice).summary.verdict == "changed"


def test_that_a_merge_was_not_looked_into_is_told(half: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, one, _ = half
    right = merge(folder, tmp_path / "right", one)
    diff = lazarus.activation_diff(f"{folder}+{one}", right, TEXTS, memory="stream")
    assert any("merged and rounded was not looked into" in note for note in diff.notes)


# --- Adapters


def test_a_head_that_an_adapter_stands_in_for_is_compared(base: Path, tmp_path: Path) -> None:
    wrapped = tuned(load(base), tmp_path / "adapter", modules_to_save=["lm_head"])
    merged = copy.deepcopy(wrapped).merge_and_unload()
    for other in (merged, f"{base}+{tmp_path / 'adapter'}"):
        diff = lazarus.activation_diff(wrapped, other, TEXTS, tokenizer=tiny_tokenizer())
        assert diff.record.base.not_compared == diff.record.finetuned.not_compared == []
        diff.check_gates(expect="identical")


def test_the_same_adapter_on_a_copy_runs_on_the_same_weights(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "copy")
    diff = compare(f"{base}+{adapter}", f"{tmp_path / 'copy'}+{adapter}")
    assert (diff.summary.verdict, diff.summary.weights_identical) == ("identical", True)


def test_an_adapter_with_a_scaling_of_zero_adds_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "zero")
    edit_json(tmp_path / "zero" / "adapter_config.json", lora_alpha=0)
    diff = compare(base, tmp_path / "zero")
    assert (diff.summary.verdict, diff.summary.weights_identical) == ("identical", True)
    assert any("adds nothing" in cause for cause in diff.summary.causes)


def test_one_stack_in_two_classes_is_not_said_to_have_other_weights(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "headless")
    edit_json(tmp_path / "headless" / "config.json", architectures=["LlamaModel"])
    diff = compare(base, tmp_path / "headless")
    assert (diff.summary.verdict, diff.summary.weights_identical) == ("identical", None)


def test_tokens_trained_on_a_resized_tied_model_run(tmp_path: Path) -> None:
    """PEFT saves them under both names of the tie, and the table with them."""
    tied = save_model(tmp_path / "tied", tiny_llama(tie_word_embeddings=True), tiny_tokenizer())
    model = load(tied)
    model.resize_token_embeddings(308, mean_resizing=False)
    large = save_model(tmp_path / "large", copy.deepcopy(model), tiny_tokenizer())
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        wrapped = tuned(model, tmp_path / "adapter", trainable_token_indices=[301, 5])
    expected = lazarus.activation_diff(load(large), wrapped, TEXTS, tokenizer=tiny_tokenizer())
    for folder in (tied, large):
        diff = lazarus.activation_diff(folder, f"{folder}+{tmp_path / 'adapter'}", TEXTS)
        for ours, theirs in zip(diff.layers, expected.layers, strict=True):
            assert ours.relative_l2 == pytest.approx(theirs.relative_l2, rel=1e-4)
        assert lazarus.weight_diff(folder, tmp_path / "adapter").summary.verdict == "changed"


RENAMES: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module.{name}",
    "without PEFT's prefix": lambda name: name.removeprefix("base_model.model."),
}


def variant(adapter: Path, folder: Path, tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    shutil.copytree(adapter, folder)
    edit_json(folder / "adapter_config.json", **settings)
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", RENAMES)
def test_an_adapter_under_other_names_is_read(kind: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    stored = load_file(adapter / "adapter_model.safetensors")
    renamed = variant(adapter, tmp_path / "renamed", {RENAMES[kind](n): t for n, t in stored.items()})
    diff = compare(f"{base}+{adapter}", f"{base}+{renamed}")
    assert diff.summary.verdict == "identical"
    assert any("names are not those that PEFT gives" in note for note in diff.notes)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a number as text": ({"lora_alpha": "16"}, "cannot use its adapter_config.json: unsupported operand"),
    "no rank": ({"r": 0}, "cannot use its adapter_config.json: `r` should be a positive"),
    "modules without tensors": ({"modules_to_save": ["lm_head"]}, "names lm_head in modules_to_save, and"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_an_adapters_configuration_is_not_the_bases(
    kind: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    settings, words = FAULTS[kind]
    with pytest.raises(AdapterError, match=words):
        compare(base, variant(adapter, tmp_path / "broken", **settings))


def test_tensors_for_modules_that_the_configuration_does_not_name(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    more = load_file(adapter / "adapter_model.safetensors")
    place = "base_model.model.model.layers.1.self_attn.k_proj"
    more |= {f"{place}.lora_A.weight": torch.ones(4, 32), f"{place}.lora_B.weight": torch.ones(16, 4)}
    with pytest.raises(AdapterError, match=r"does not name \(target_modules\)"):
        compare(base, variant(adapter, tmp_path / "more", more))


def test_what_lies_beside_an_adapter_is_told(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = variant(adapter, tmp_path / "two")
    shutil.copytree(adapter, folder / "second")
    assert any("holds other adapters besides" in note for note in compare(base, folder).notes)
    torch.save({}, folder / "adapter_model.bin")
    for run in (compare, lazarus.weight_diff):
        with pytest.raises(GateNotMetError, match=r"adapter_model\.bin"):
            run(f"{base}+{folder}", f"{base}+{adapter}").check_gates(expect="identical")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_that_peft_does_not_merge_is_named_as_that(base: Path, tmp_path: Path) -> None:
    tuned(load(base), tmp_path / "adapter", lora_bias=True)
    with pytest.raises(UnsupportedModelError, match="cannot be merged by PEFT"):
        lazarus.weight_diff(base, tmp_path / "adapter")


# --- Prompts and gates


def test_layers_without_a_counterpart_fail_a_limit(base: Path, tmp_path: Path) -> None:
    deeper = save_model(tmp_path / "deeper", tiny_llama(num_hidden_layers=8), tiny_tokenizer())
    with pytest.raises(GateNotMetError, match="4 of 8 layers of fine-tuned have no counterpart"):
        compare(base, deeper).check_gates(fail_above=2.0)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("twice.csv", "prompt,prompt\nHello,Bye\n", "two columns are called prompt"),
        ("twice.jsonl", '{"prompt": "Hello", "prompt": "Bye"}\n', "two keys 'prompt'"),
    ],
)
def test_a_field_that_is_there_twice_is_refused(
    name: str, text: str, words: str, base: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(PromptsError, match=words):
        lazarus.activation_diff(base, base, tmp_path / name)


def test_two_chat_templates_are_told(base: Path, tmp_path: Path) -> None:
    other = save_model(
        tmp_path / "other", tiny_llama(), tiny_tokenizer(template="{{ messages[0]['content'] }}")
    )
    chat = [{"messages": [{"role": "user", "content": "Hello"}]}]
    notes = lazarus.activation_diff(base, other, chat, chat_template="base").notes
    assert any("bring different chat templates: both read the prompts in that of base" in n for n in notes)


def test_names_of_a_multimodal_models_text_part_are_read(base: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)

    renamed = edit_weights(base, tmp_path / "renamed", rename)
    for run in (compare, lazarus.weight_diff):
        assert run(base, renamed).summary.verdict == "identical"


def test_a_causal_mask_that_one_checkpoint_stores_is_no_difference(tmp_path: Path) -> None:
    """As older versions of transformers stored it, in GPT-2 and GPT-NeoX."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    plain = save_model(tmp_path / "plain", GPT2LMHeadModel(config).eval(), tiny_tokenizer())
    mask = torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64)
    older = edit_weights(
        plain, tmp_path / "older", lambda tensors: tensors.update({"transformer.h.0.attn.bias": mask})
    )
    compare(plain, older).check_gates(expect="identical")


def test_compare_tells_where_one_vocabulary_is_read_in_two_ways(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "post_processor": None}), encoding="utf-8")
    notes = lazarus.compare(base, tmp_path / "other", "Hello").notes
    assert any("have one vocabulary and read the prompt as other ids" in note for note in notes)


@pytest.mark.parametrize("text", ["[]", '{"weight_map": []}'])
def test_an_index_that_is_none_is_named(text: str, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").unlink()
    (tmp_path / "other" / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    for run in (compare, lazarus.weight_diff):
        with pytest.raises(WeightsError, match=r"other: model\.safetensors\.index\.json"):
            run(base, tmp_path / "other")
