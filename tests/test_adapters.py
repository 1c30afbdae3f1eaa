"""PEFT adapters: what they give, what they share with their base, and what they leave alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import lazarus
from factories import notes_on_models, perturbed, save_model, tiny_llama, tiny_tokenizer
from layouts import addresses, compare, edit_json, most, pair_of, publish, save_adapter, save_gguf
from lazarus.errors import AdapterError
from lazarus.models.adapters import share_storage

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "rank-stabilised": lambda: LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "dora": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "upper half": lambda: LoraConfig(r=4, target_modules=TARGETS, layers_to_transform=[2, 3]),
    "modules to save": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "input_layernorm"]
    ),
    "new tokens": lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[45, 70]),
    "olora": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"),
    "pissa": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
}
REWRITES = ("olora", "pissa")  # their start is taken off the weights of the model that they are put on


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, Path]:
    """An adapter of each kind on base, without a tokenizer."""
    root = tmp_path_factory.mktemp("adapters")
    for kind, config in CONFIGS.items():
        save_adapter(root / kind, base_folder, config())
    return {kind: root / kind for kind in CONFIGS}


@pytest.fixture(scope="module")
def lora(adapters: dict[str, Path]) -> Path:
    return adapters["lora"]


# --- What they give


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_what_peft_merges(kind: str, tmp_path: Path, base_folder: Path) -> None:
    wrapped = save_adapter(tmp_path / "adapter", base_folder, CONFIGS[kind]())
    merged = save_model(tmp_path / "merged", wrapped.merge_and_unload(), tiny_tokenizer())
    diff = compare(merged, f"{base_folder}+{tmp_path / 'adapter'}")
    assert most(diff) < 1e-5
    assert most(compare(base_folder, merged)) > 1e-3


def test_an_adapter_may_be_alone_or_on_its_model_on_either_side(base_folder: Path, lora: Path) -> None:
    alone = compare(base_folder, lora)
    assert alone.results == compare(base_folder, f"{base_folder}+{lora}").results
    for base in (lora, f"{base_folder}+{lora}"):
        turned = compare(base, base_folder)
        assert [layer.divergence for layer in turned.layers] == [layer.divergence for layer in alone.layers]
        assert turned.record.base.kind == "adapter"
    info = alone.record.finetuned
    assert (info.id, info.kind, info.adapter) == (str(lora), "adapter", f"{lora} (LORA)")
    assert (info.stored_dtype, info.architecture, info.revision) == ("float32", "LlamaForCausalLM", None)
    assert notes_on_models(alone) == []


def test_two_adapters_of_one_model_can_be_compared(base_folder: Path, adapters: dict[str, Path]) -> None:
    first, second = (f"{base_folder}+{adapters[kind]}" for kind in ("lora", "ia3"))
    assert most(compare(first, second)) > 1e-3
    assert most(compare(first, first)) == 0
    with pytest.raises(AdapterError, match="Say which model it belongs to"):
        compare(adapters["lora"], adapters["ia3"])


def test_layers_below_an_adapter_do_not_move_at_all(base_folder: Path, adapters: dict[str, Path]) -> None:
    diff = compare(base_folder, adapters["upper half"])
    moved = [layer.relative_l2 or 0 for layer in diff.layers]
    assert moved[:2] == [0, 0]
    assert min(moved[2:]) > 1e-3


def test_an_adapter_runs_in_the_type_of_its_model(base_folder: Path, lora: Path) -> None:
    diff = compare(base_folder, lora, dtype="bfloat16")
    assert (diff.record.finetuned.run_dtype, diff.record.finetuned.stored_dtype) == ("bfloat16", "float32")
    exact = compare(base_folder, lora).results.column("relative_l2")
    assert diff.results.column("relative_l2") == pytest.approx(exact, rel=0.2)
    _, finetuned = pair_of(str(base_folder), str(lora), torch.bfloat16)
    assert {parameter.dtype for parameter in finetuned.model.parameters()} == {torch.bfloat16}


def test_an_adapter_goes_onto_a_gguf_file(tmp_path: Path, lora: Path, base_folder: Path) -> None:
    path = tmp_path / "base.gguf"
    save_gguf(path, tiny_llama(), tiny_tokenizer(), gguf.GGMLQuantizationType.F32)
    for finetuned in (str(lora), f"{path}+{lora}"):
        diff = compare(f"{base_folder}+{lora}" if "+" in finetuned else path, finetuned)
        assert diff.record.finetuned.stored_dtype == "F32"
        assert (most(diff) < 1e-6) == ("+" in finetuned)


# --- What they share, and what they leave alone


@pytest.mark.parametrize("base_too", [False, True], ids=["base, adapter", "base+one, base+other"])
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in REWRITES])
def test_the_weights_of_the_base_are_in_memory_once(
    kind: str, base_too: bool, base_folder: Path, adapters: dict[str, Path]
) -> None:
    other = f"{base_folder}/../{base_folder.name}/+{adapters['ia3']}"
    base, finetuned = pair_of(
        other if base_too else str(base_folder),
        f"{base_folder}+{adapters[kind]}" if base_too else str(adapters[kind]),
    )
    ours, theirs = (dict(_of_the_base(model.model)) for model in (base, finetuned))
    assert ours == theirs
    assert len(theirs) == len(list(tiny_llama().parameters()))


def _of_the_base(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The address of each parameter that is not an adapter's, under the name that it has without one."""
    for name, address in addresses(model).items():
        if "default" not in name and ".ia3_" not in name and ".lora_" not in name:
            plain = name.replace(".base_layer", "").replace(".original_module", "")
            yield plain.replace(".token_adapter", ""), address


@pytest.mark.parametrize("kind", CONFIGS)
def test_loading_an_adapter_changes_nothing_in_its_base(
    kind: str, base_folder: Path, adapters: dict[str, Path]
) -> None:
    pristine = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    base, finetuned = pair_of(str(base_folder), str(adapters[kind]))
    for (name, left), (_, right) in zip(
        base.model.named_parameters(), pristine.named_parameters(), strict=True
    ):
        assert torch.equal(left, right), name
        assert not left.requires_grad, name
    assert [type(m) for m in base.model.modules()] == [type(m) for m in pristine.modules()]
    assert torch.equal(_states(base.model), _states(pristine))
    assert not torch.equal(_states(base.model), _states(finetuned.model))


def _states(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        states: Tensor = model.base_model(torch.tensor([[5, 45, 7, 8]])).last_hidden_state
    return states


def test_a_quantised_parameter_is_shared_whole() -> None:
    class Packed(nn.Parameter):
        scale = 0.5

    model = tiny_llama()
    model.lm_head.weight = Packed(model.lm_head.weight.data)
    second = share_storage(model)
    assert second.lm_head.weight is model.lm_head.weight
    assert second.model.norm.weight is not model.model.norm.weight
    assert addresses(second) == addresses(model)


# --- What must be said


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../base", "~/base", "base", "./base"])
@pytest.mark.parametrize("typed", ["{adapter}", "{base}+{adapter}"])
def test_a_base_under_another_spelling_is_the_same_base(
    spelling: str, typed: str, base_folder: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base_folder.parent)
    monkeypatch.setenv("HOME", str(base_folder.parent))
    adapter = tmp_path / "adapter"
    shutil.copytree(lora, adapter)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=spelling.format(base_folder))
    assert notes_on_models(compare(base_folder, typed.format(base=base_folder, adapter=adapter))) == []


@pytest.mark.parametrize("typed", ["{adapter}", "{base}+{adapter}"])
def test_another_base_than_the_one_it_names_is_noted(
    typed: str, base_folder: Path, finetuned_folder: Path, lora: Path
) -> None:
    diff = compare(finetuned_folder, typed.format(base=finetuned_folder, adapter=lora))
    [note] = notes_on_models(diff)
    assert note == f"{lora} names {base_folder} as its base; it was put on {finetuned_folder}"


def test_an_adapter_of_the_hub_keeps_its_commit_and_that_of_its_base(
    base_folder: Path, finetuned_folder: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, commits = tmp_path / "hub", ["a" * 40, "b" * 40, "c" * 40]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    publish(cache, "org/base", {"main": (commits[0], finetuned_folder), "v1": (commits[1], base_folder)})
    adapter = tmp_path / "adapter"
    shutil.copytree(lora, adapter)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/base", revision="v1")
    publish(cache, "org/adapter", {"main": (commits[2], adapter)})

    diff = compare("org/adapter", "org/base@v1")
    info = diff.record.base
    assert (info.kind, info.revision) == ("adapter", commits[1])
    assert info.adapter == f"org/adapter (LORA, commit {commits[2]})"
    assert diff.results == compare(f"{base_folder}+{lora}", base_folder).results
    assert notes_on_models(diff) == []
    on_main = compare("org/base", "org/base+org/adapter@main")
    assert on_main.results == compare(finetuned_folder, lora).results


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "virtual tokens"),
        (
            lambda: LoraConfig(target_modules=TARGETS, alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
            "activated LoRA",
        ),
    ],
    ids=["prompt tuning", "aLoRA"],
)
def test_an_adapter_that_does_not_act_on_every_token_is_refused(
    config: Callable[[], PeftConfig], words: str, tmp_path: Path, base_folder: Path
) -> None:
    save_adapter(tmp_path / "adapter", base_folder, config())
    in_memory = get_peft_model(tiny_llama(), config())
    for finetuned in (tmp_path / "adapter", in_memory):
        with pytest.raises(AdapterError, match=words):
            compare(base_folder, finetuned)


# --- Models in memory


@pytest.mark.parametrize("training", [False, True])
def test_a_peft_model_in_memory_runs_with_its_adapter(training: bool, base_folder: Path, lora: Path) -> None:
    wrapped = PeftModel.from_pretrained(tiny_llama(), lora, is_trainable=training).train(training)
    before = [(name, p.requires_grad, p.data_ptr()) for name, p in wrapped.named_parameters()]
    diff = compare(base_folder, wrapped, tokenizer=tiny_tokenizer())
    assert diff.results == compare(base_folder, lora).results
    assert (diff.record.finetuned.kind, diff.record.finetuned.adapter) == ("loaded", "default (LORA)")
    assert notes_on_models(diff) == []
    assert before == [(name, p.requires_grad, p.data_ptr()) for name, p in wrapped.named_parameters()]
    assert {m.training for m in wrapped.modules()} == {training}


def test_a_base_in_memory_that_peft_has_changed_is_noted(lora: Path) -> None:
    model = tiny_llama()
    wrapped = PeftModel.from_pretrained(model, lora)
    diff = compare(model, wrapped, tokenizer=tiny_tokenizer())
    assert most(diff) == 0
    assert notes_on_models(diff) == ["LlamaForCausalLM runs with the adapter that is in it: default (LORA)"]


# --- Tokenizers


def test_the_adapters_own_tokenizer_goes_before_its_bases(
    tmp_path: Path, base_folder: Path, lora: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(lora, adapter)
    tiny_tokenizer(template="{{ bos_token }}{{ messages[0]['content'] }}!").save_pretrained(adapter)
    diff = compare(base_folder, adapter, chat_template="finetuned")
    assert [prompt.rendered for prompt in diff.prompts] == ["<s>Hello, how are you?!", "<s>What is AI?!"]
    other: Any = compare(base_folder, lora, chat_template="finetuned")
    assert other.prompts[0].rendered == "<s>[user] Hello, how are you?\n[assistant] "


def test_an_adapter_on_a_changed_base_is_not_the_merge(tmp_path: Path, base_folder: Path, lora: Path) -> None:
    """What MODEL+ADAPTER is for: is this merge true?"""
    wrapped = PeftModel.from_pretrained(perturbed(tiny_llama()), lora)
    merged = save_model(tmp_path / "merged", wrapped.merge_and_unload(), tiny_tokenizer())
    assert most(compare(merged, f"{base_folder}+{lora}")) > 1e-2


# Several adapters, and adapters of another class.


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # of the merges that are the oracle
def test_adapters_one_on_the_other_are_their_merges_one_after_the_other(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama(), tiny_tokenizer())
    merged = tiny_llama()
    for name, targets in (("sft", ["q_proj", "down_proj"]), ("dpo", ["q_proj", "v_proj"])):
        torch.manual_seed(len(name) + len(targets[1]))
        tuned = get_peft_model(merged, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        tuned.save_pretrained(tmp_path / name)
        merged = tuned.merge_and_unload()
    expected = save_model(tmp_path / "merged", merged, tiny_tokenizer())
    both = f"{base}+{tmp_path / 'sft'}+{tmp_path / 'dpo'}"
    assert lazarus.activation_diff(both, expected, ["Hello", "What is AI?"]).summary.verdict == "within_noise"
    first = lazarus.activation_diff(f"{base}+{tmp_path / 'sft'}", expected, ["Hello", "What is AI?"])
    assert first.summary.verdict == "changed"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["SEQ_CLS", "FEATURE_EXTRACTION", "resized"])
def test_an_adapter_of_another_class_runs_on_the_blocks(kind: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama(), tiny_tokenizer())
    classes: dict[str, Any] = {
        "SEQ_CLS": AutoModelForSequenceClassification,
        "FEATURE_EXTRACTION": AutoModel,
        "resized": AutoModelForCausalLM,
    }
    model = classes[kind].from_pretrained(base, dtype=torch.float32)
    more: dict[str, Any] = {"task_type": "CAUSAL_LM" if kind == "resized" else kind}
    if kind == "resized":
        model.resize_token_embeddings(308, mean_resizing=False)
        more["modules_to_save"] = ["embed_tokens", "lm_head"]
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **more))
    tuned.save_pretrained(tmp_path / "adapter")
    diff = lazarus.activation_diff(base, tmp_path / "adapter", ["Hello"], position="all")
    ids = torch.tensor([tiny_tokenizer()("Hello")["input_ids"]])
    with torch.no_grad():
        states = tuned.eval()(ids, output_hidden_states=True).hidden_states
        own = tiny_llama()(ids, output_hidden_states=True).hidden_states
    for layer in range(3):
        b, f = own[layer + 1][0, 1:].double(), states[layer + 1][0, 1:].double()
        expected = float(((f - b).norm(dim=-1) / b.norm(dim=-1)).mean())
        assert diff.layers[layer].relative_l2 == pytest.approx(expected, rel=1e-4)
    assert any("trained as SEQ_CLS: 1 of its tensors" in n for n in diff.notes) == (kind == "SEQ_CLS")
