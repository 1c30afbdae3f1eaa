"""Checkpoints that were saved out of a wrapper: their names are read as those of the model inside."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from factories import notes_of, notes_on_models, perturbed, save_model, tiny_llama, tiny_tokenizer
from layouts import METADATA, WEIGHTS, compare, edit_weights
from lazarus import weight_diff
from lazarus.errors import WeightsError

Rename = Callable[[str], str]


def prefixed(prefix: str) -> Rename:
    return lambda key: prefix + key


def in_layers(part: str, where: str = r"(layers\.\d+\.)") -> Rename:
    return lambda key: re.sub(where, rf"\1{part}.", key)


NAMES: dict[str, tuple[Rename, str]] = {
    "torch.compile": (prefixed("_orig_mod."), "begin with _orig_mod."),
    "DDP": (prefixed("module."), "begin with module."),
    "compiled in DDP": (prefixed("module._orig_mod."), "begin with module._orig_mod."),
    "DDP compiled": (prefixed("_orig_mod.module."), "begin with _orig_mod.module."),
    "PEFT": (prefixed("base_model.model."), "begin with base_model.model."),
    "a trainer's attribute": (prefixed("policy.net."), "begin with policy.net."),
    "blocks compiled one by one": (in_layers("_orig_mod"), "_orig_mod in them"),
    "FSDP": (
        lambda key: in_layers("_fsdp_wrapped_module")(f"_fsdp_wrapped_module.{key}"),
        "_fsdp_wrapped_module in them",
    ),
    "activation checkpointing": (
        in_layers("_checkpoint_wrapped_module", r"(mlp\.)"),
        "_checkpoint_wrapped_module in them",
    ),
    "a part of them": (
        lambda key: key if key == "lm_head.weight" else f"module.{key}",
        "begin with module.",
    ),
}


def renamed(folder: Path, source: Path, rename: Rename, **more: Tensor) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        old = dict(tensors)
        tensors.clear()
        tensors.update({rename(key): value for key, value in old.items()} | more)

    return edit_weights(source, folder, change)


@pytest.mark.parametrize("kind", NAMES)
def test_a_wrappers_names_are_read_as_the_models(
    kind: str, tmp_path: Path, base_folder: Path, finetuned_folder: Path
) -> None:
    rename, told = NAMES[kind]
    wrapped = renamed(tmp_path / "wrapped", finetuned_folder, rename)
    expected = compare(base_folder, finetuned_folder)
    for memory in ("resident", "stream"):
        diff = compare(base_folder, wrapped, memory=memory)
        assert diff.results == expected.results
        [note] = notes_on_models(diff)
        assert told in note
        assert str(wrapped) in note
    weights = weight_diff(base_folder, wrapped)
    plain = weight_diff(base_folder, finetuned_folder)
    assert [row.change_norm for row in weights.results] == [row.change_norm for row in plain.results]
    assert [note for note in weights.notes if told in note]


def test_names_as_a_real_wrapper_gives_them(
    tmp_path: Path, base_folder: Path, finetuned_folder: Path
) -> None:
    model: Any = torch.compile(perturbed(tiny_llama()))
    folder = save_model(tmp_path / "compiled", perturbed(tiny_llama()), tiny_tokenizer())
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / WEIGHTS, METADATA)
    assert all(key.startswith("_orig_mod.") for key in load_file(folder / WEIGHTS))
    assert compare(base_folder, folder).results == compare(base_folder, finetuned_folder).results


def test_both_sides_may_be_wrapped_and_extra_tensors_stay_extra(tmp_path: Path, base_folder: Path) -> None:
    extra = {"value_head.weight": torch.ones(1, 32)}
    one = renamed(tmp_path / "one", base_folder, prefixed("module."), **extra)
    other = renamed(tmp_path / "other", base_folder, prefixed("_orig_mod."), **extra)
    diff = compare(one, other)
    assert diff.summary.verdict == "identical"
    assert sum("tensor names" in note for note in diff.notes) == 2
    assert [part.what for part in diff.record.base.not_compared] == ["score head (value_head)"]


@pytest.mark.parametrize("tied", [True, False])
def test_plain_names_are_left_alone(tied: bool, tmp_path: Path) -> None:
    for name, model in (
        ("a", tiny_llama(tie_word_embeddings=tied)),
        ("b", tiny_llama(1, tie_word_embeddings=tied)),
    ):
        save_model(tmp_path / name, model, tiny_tokenizer())
    diff = compare(tmp_path / "a", tmp_path / "b")
    assert notes_on_models(diff) == []


def test_names_that_would_collide_are_not_guessed(tmp_path: Path, base_folder: Path) -> None:
    tensors = load_file(base_folder / WEIGHTS)
    both = renamed(tmp_path / "both", base_folder, prefixed("ema."), **tensors)
    diff = compare(base_folder, both)
    assert diff.summary.weights_identical is not True
    [note] = notes_of(diff, "unplaced-tensors")
    assert "first ema." in note


@pytest.mark.parametrize("run", [compare, weight_diff], ids=["activation-diff", "weight-diff"])
def test_an_adapter_saved_unmerged_with_its_model_is_refused(
    run: Callable[..., Any], tmp_path: Path, base_folder: Path
) -> None:
    wrapped = get_peft_model(perturbed(tiny_llama()), LoraConfig(target_modules=["q_proj"]))
    folder = save_model(tmp_path / "unmerged", tiny_llama(), tiny_tokenizer())
    save_file({key: value.clone() for key, value in wrapped.state_dict().items()}, folder / WEIGHTS, METADATA)
    with pytest.raises(WeightsError, match=r"unmerged.*merge_and_unload"):
        run(base_folder, folder)
