"""Every way of naming a model: the Hub, the disk, GGUF, and models in memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from factories import notes_on_models, perturbed, save_model, tiny_llama, tiny_tokenizer
from layouts import addresses, compare, most, pair_of, publish, save_gguf
from lazarus import ActivationDiff
from lazarus.errors import ModelNotFoundError, PairError, UnsupportedModelError

COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture(scope="module")
def expected(base_folder: Path, finetuned_folder: Path) -> ActivationDiff:
    return compare(base_folder, finetuned_folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_folder: Path, finetuned_folder: Path) -> Path:
    """A cache in which org/name has base on main, and finetuned on a branch."""
    cache = tmp_path / "hub"
    branches = {"main": (COMMITS[0], base_folder), "tuned": (COMMITS[1], finetuned_folder)}
    publish(cache, "org/name", branches)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# --- Hub ids


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("revision", ["tuned", COMMITS[1]], ids=["branch", "commit"])
def test_a_hub_id_is_read_at_its_revision_and_the_commit_is_kept(
    revision: str, expected: ActivationDiff
) -> None:
    diff = compare("org/name", f"org/name@{revision}")
    assert diff.results == expected.results
    assert (diff.record.base.kind, diff.record.base.revision) == ("hub", COMMITS[0])
    assert (diff.record.finetuned.kind, diff.record.finetuned.revision) == ("hub", COMMITS[1])
    assert diff.record.finetuned.stored_dtype == "float32"


@pytest.mark.usefixtures("hub")
def test_two_names_of_one_commit_are_one_model_in_memory() -> None:
    base, finetuned = pair_of("org/name", "org/name@main")
    assert addresses(base.model) == addresses(finetuned.model)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["org/name@nowhere", f"org/name@{'c' * 40}", "org/other"])
def test_what_the_cache_does_not_have_is_not_found(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=name):
        compare("org/name", name)


@pytest.mark.usefixtures("hub")
def test_a_folder_of_the_very_name_wins_over_the_hub(
    here: Path, base_folder: Path, finetuned_folder: Path, expected: ActivationDiff
) -> None:
    shutil.copytree(finetuned_folder, here / "org" / "name")
    diff = compare(base_folder, "org/name")
    assert diff.results == expected.results
    assert (diff.record.finetuned.kind, diff.record.finetuned.revision) == ("folder", None)


@pytest.mark.usefixtures("hub")
def test_a_folder_never_stands_in_for_a_revision(here: Path, base_folder: Path) -> None:
    shutil.copytree(base_folder, here / "org" / "name")
    with pytest.raises(ModelNotFoundError, match="org/name is a folder here"):
        compare(base_folder, "org/name@tuned")


def test_the_command_reads_the_cache_of_the_environment(hub: Path, here: Path) -> None:
    words = "introspect activation-diff -b org/name -f org/name@tuned -p Hello -o diff.json"
    done = subprocess.run(
        [sys.executable, "-m", "lazarus", *words.split()],
        env={**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Loading base model: org/name\nLoading fine-tuned model: org/name@tuned\n")
    assert json.loads(Path("diff.json").read_text(encoding="utf-8"))["finetuned"]["revision"] == COMMITS[1]


# --- What is on disk


@pytest.mark.parametrize(
    ("folder", "typed"),
    [
        ("a+b", "a+b"),
        ("a+b", "./a+b/"),
        ("name@rev", "name@rev"),
        ("org/name@v1", "org/name@v1"),
        ("with space", "with space"),
        ("a+b", "~/a+b"),
    ],
)
def test_a_folder_is_found_under_its_very_name(
    folder: str,
    typed: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    base_folder: Path,
    finetuned_folder: Path,
    expected: ActivationDiff,
) -> None:
    monkeypatch.setenv("HOME", str(here))
    shutil.copytree(finetuned_folder, here / folder)
    diff = compare(base_folder, typed)
    assert diff.results == expected.results
    assert diff.record.finetuned.id == typed


def test_one_folder_spelled_in_two_ways_is_one_model_in_memory(base_folder: Path) -> None:
    base, finetuned = pair_of(str(base_folder), f"{base_folder}/../{base_folder.name}/")
    assert addresses(base.model) == addresses(finetuned.model)


def test_shards_are_the_whole_bit_for_bit(
    tmp_path: Path, base_folder: Path, expected: ActivationDiff
) -> None:
    model = perturbed(tiny_llama())
    sharded = save_model(tmp_path / "sharded", model, tiny_tokenizer(), max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 4
    diff = compare(base_folder, sharded)
    assert diff.results == expected.results
    assert diff.record.finetuned.stored_dtype == "float32"


# --- Models in memory


def test_models_in_memory_give_what_their_folders_give(expected: ActivationDiff) -> None:
    diff = compare(tiny_llama(), perturbed(tiny_llama()), tokenizer=tiny_tokenizer())
    assert diff.results == expected.results
    assert diff.record.base.kind == "loaded"
    assert notes_on_models(diff) == []


def test_a_name_and_a_model_in_memory_can_be_mixed(
    base_folder: Path, finetuned_folder: Path, expected: ActivationDiff
) -> None:
    for diff in (
        compare(base_folder, perturbed(tiny_llama())),
        compare(tiny_llama(), str(finetuned_folder)),
    ):
        assert diff.results == expected.results
        [note] = notes_on_models(diff)
        assert note == "LlamaForCausalLM brings no tokenizer; the other model's was used for both"


@pytest.mark.parametrize("training", [False, True])
def test_a_run_leaves_a_model_in_memory_as_it_was(training: bool) -> None:
    torch.manual_seed(0)
    settings = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(settings).train(training)
    model.transformer.h[0].requires_grad_(requires_grad=False)
    before = _appearance(model)
    before, logits = _appearance(model), _logits(model)

    diff = compare(model, model, tokenizer=tiny_tokenizer())
    assert most(diff) == 0, "dropout must be off"
    assert diff.record.settings.position == "last"
    assert _appearance(model) == before
    assert torch.equal(_logits(model), logits)


def _logits(model: PreTrainedModel) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([[5, 6, 7]])).logits
    return logits


def _appearance(model: nn.Module) -> list[Any]:
    modules = [
        (name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]
    parameters = [(n, id(p), p.data_ptr(), p.requires_grad, p._version) for n, p in model.named_parameters()]
    return [modules, parameters]


def test_what_is_no_transformers_model_is_refused(base_folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        compare(base_folder, nn.Linear(2, 2))
    with pytest.raises(PairError, match="neither LlamaForCausalLM nor LlamaForCausalLM brings a tokenizer"):
        compare(tiny_llama(), tiny_llama())


# --- GGUF


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_gguf_file_is_the_model_that_was_written(kind: str, tmp_path: Path) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    model = perturbed(tiny_llama())
    path = save_gguf(tmp_path / "model.gguf", model, tiny_tokenizer(), stored)
    with torch.no_grad():
        for matrix in (p for p in model.parameters() if p.dim() == 2):
            matrix.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(matrix.numpy(), stored), stored)))
    folder = save_model(tmp_path / "folder", model, tiny_tokenizer())
    for options in ({}, {"chat_template": "finetuned"}):
        diff = compare(folder, path, **options)
        assert most(diff) < 1e-6
        info = diff.record.finetuned
        assert (info.kind, info.stored_dtype, info.run_dtype) == ("gguf", kind, "float32")
        assert (info.revision, info.architecture) == (None, "LlamaForCausalLM")


def test_a_gguf_file_is_the_one_that_was_named(here: Path, base_folder: Path) -> None:
    stored = gguf.GGMLQuantizationType.F32
    save_gguf(here / "model.gguf", perturbed(tiny_llama()), tiny_tokenizer(), stored)
    other = here / "other"
    other.mkdir()
    save_gguf(other / "model.gguf", tiny_llama(), tiny_tokenizer(), stored)
    assert most(compare(base_folder, "other/model.gguf")) < 1e-6
    assert most(compare(base_folder, "model.gguf")) > 1e-2
