"""Folders that hold more than one set of weights: what is read is told, and what is ambiguous is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from layouts import METADATA, WEIGHTS, compare, edit_json, most, save_adapter
from lazarus import ActivationDiff, weight_diff
from lazarus.errors import AdapterError, WeightsError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Base in one file, and a fine-tune saved into the same folder in shards."""
    folder = save_model(tmp_path / "mixed", tiny_llama(), tiny_tokenizer())
    return save_model(folder, perturbed(tiny_llama()), max_shard_size="60KB")


@pytest.fixture
def copied(tmp_path: Path, base_folder: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "copied"))


def add(folder: Path, name: str, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
    """Write the folder's tensors, changed, into another file beside them."""
    tensors = dict(change(*item) for item in load_file(folder / WEIGHTS).items())
    save_file(tensors, folder / name, metadata=METADATA)


def told_of(folder: Path, notes: Any) -> str:
    [note] = [note for note in notes if note.startswith(f"{folder}: its weights were read from")]
    return str(note).partition("were read from ")[2]


RUNS = pytest.mark.parametrize("run", [compare, weight_diff], ids=["activation-diff", "weight-diff"])


@RUNS
def test_two_sets_that_differ_are_refused_and_both_names_are_given(
    run: Callable[..., Any], mixed: Path, base_folder: Path
) -> None:
    with pytest.raises(WeightsError) as refused:
        run(base_folder, mixed)
    for name in (f"{mixed}/{WEIGHTS}", f"{mixed}/{INDEX}", "they differ, first in"):
        assert name in str(refused.value)


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_the_file_that_is_named_is_read(
    memory: str, mixed: Path, base_folder: Path, finetuned_folder: Path
) -> None:
    one = compare(base_folder, mixed / WEIGHTS, memory=memory)
    assert most(one) == 0
    shards = compare(base_folder, mixed / INDEX, memory=memory)
    assert shards.results == compare(base_folder, finetuned_folder).results
    assert told_of(mixed / WEIGHTS, one.notes) == f"{WEIGHTS}, and not from {INDEX} (other weights)"
    assert told_of(mixed / INDEX, shards.notes) == f"{INDEX}, and not from {WEIGHTS} (other weights)"
    assert [part.what for part in one.record.finetuned.not_compared] == [f"weights in {INDEX}"]
    assert one.summary.verdict == "identical"
    assert one.summary.weights_identical is not True


def test_weight_diff_reads_the_file_that_is_named(mixed: Path, base_folder: Path) -> None:
    assert weight_diff(base_folder, mixed / WEIGHTS).summary.n_changed_tensors == 0
    assert weight_diff(base_folder, mixed / INDEX).summary.verdict == "changed"
    both = weight_diff(mixed / WEIGHTS, mixed / INDEX)
    assert both.summary.verdict == "changed"


def test_two_sets_that_are_the_same_are_a_note(tmp_path: Path, base_folder: Path) -> None:
    folder = save_model(tmp_path / "twice", tiny_llama(), tiny_tokenizer())
    save_model(folder, tiny_llama(), max_shard_size="60KB")
    diff = compare(base_folder, folder)
    assert told_of(folder, diff.notes) == f"{WEIGHTS}, and not from {INDEX} (the same weights)"
    assert diff.summary.weights_identical is True
    assert [part.differs for part in diff.record.finetuned.not_compared] == [False]
    told_of(folder, weight_diff(base_folder, folder).notes)


def test_an_index_whose_files_are_gone_is_left_over(mixed: Path, base_folder: Path) -> None:
    n_files = len(list(mixed.glob("model-*.safetensors")))
    next(mixed.glob("model-00002-*.safetensors")).unlink()
    diff = compare(base_folder, mixed)
    assert f"{INDEX} (1 of its {n_files} files are absent)" in told_of(mixed, diff.notes)
    assert most(diff) == 0


def test_files_under_names_of_another_tool_are_a_note_and_no_part_of_the_dtype(
    copied: Path, base_folder: Path
) -> None:
    add(
        copied,
        "consolidated.safetensors",
        lambda key, t: (key.replace("model.", ""), t.repeat(4, 1)[0].bfloat16()),
    )
    diff = compare(base_folder, copied)
    assert told_of(copied, diff.notes) == f"{WEIGHTS}, and not from consolidated.safetensors"
    assert diff.record.finetuned.stored_dtype == "float32"


def test_the_dtype_is_that_of_the_file_that_is_read(copied: Path, base_folder: Path) -> None:
    add(copied, "model.fp16.safetensors", lambda key, t: (key, t.half()))
    add(copied, "extra.safetensors", lambda key, t: (f"{key}.codes", torch.zeros(9000, dtype=torch.bfloat16)))
    diff = compare(base_folder, copied)
    assert "model.fp16.safetensors (a variant)" in told_of(copied, diff.notes)
    assert diff.record.finetuned.stored_dtype == "float32"
    named = compare(base_folder, copied / "model.fp16.safetensors")
    assert named.record.finetuned.stored_dtype == "float16"
    assert 0 < most(named) < 1e-2


def test_newer_weights_in_another_format_are_told(copied: Path, base_folder: Path) -> None:
    for name in ("pytorch_model.bin", "model-q8_0.gguf"):
        (copied / name).write_bytes(b"0")
    later = (copied / WEIGHTS).stat().st_mtime + 60
    os.utime(copied / "pytorch_model.bin", (later, later))
    os.utime(copied / "model-q8_0.gguf", (later - 120, later - 120))
    for diff in (compare(base_folder, copied), weight_diff(base_folder, copied)):
        told = told_of(copied, diff.notes)
        assert (
            told == f"{WEIGHTS}, and not from model-q8_0.gguf, pytorch_model.bin (newer than what was read)"
        )
        unknown = [part.what for part in diff.record.finetuned.not_compared if part.differs is None]
        assert unknown == ["weights in model-q8_0.gguf", "weights in pytorch_model.bin"]
        assert diff.summary.verdict == "identical"


def test_the_same_file_beside_both_is_no_difference(tmp_path: Path, base_folder: Path) -> None:
    folders = [Path(shutil.copytree(base_folder, tmp_path / name)) for name in "ab"]
    for folder in folders:
        (folder / "pytorch_model.bin").write_bytes(b"the same")
    diff = compare(*folders)
    assert [part.differs for part in diff.record.base.not_compared] == [False]
    assert diff.summary.weights_identical is True


@RUNS
def test_two_shards_that_hold_one_tensor_with_two_values_are_refused(
    run: Callable[..., Any], tmp_path: Path, base_folder: Path
) -> None:
    folder = save_model(tmp_path / "sharded", tiny_llama(), tiny_tokenizer(), max_shard_size="60KB")
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    key, tensor = next(iter(load_file(first).items()))
    for value, is_wrong in ((tensor, False), (tensor + 1, True)):
        save_file(load_file(second) | {key: value}, second, metadata=METADATA)
        if is_wrong:
            with pytest.raises(WeightsError, match="two of its files with two values"):
                run(base_folder, folder)
        else:
            run(base_folder, folder)


def test_shards_that_the_index_does_not_name_are_a_note(tmp_path: Path, base_folder: Path) -> None:
    folder = save_model(tmp_path / "sharded", tiny_llama(), tiny_tokenizer(), max_shard_size="60KB")
    shutil.copy(base_folder / WEIGHTS, folder / "model-00001-of-00099.safetensors")
    diff = compare(base_folder, folder)
    assert told_of(folder, diff.notes).startswith(f"{INDEX}, and not from model-00001-of-00099.safetensors")
    assert most(diff) == 0


# --- A model beside an adapter


@pytest.fixture
def both(tmp_path: Path, base_folder: Path) -> Path:
    """A fine-tuned model, and in the same folder an adapter that was trained on it."""
    folder = save_model(tmp_path / "both", perturbed(tiny_llama()), tiny_tokenizer())
    save_adapter(tmp_path / "adapter", folder, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(folder / WEIGHTS))
    return folder


@RUNS
def test_a_model_beside_an_adapter_is_refused(run: Callable[..., Any], both: Path, base_folder: Path) -> None:
    with pytest.raises(AdapterError) as refused:
        run(base_folder, both)
    for way in (f"{both}/{WEIGHTS}", f"{both}/adapter_model.safetensors", f"{both}+{both}"):
        assert way in str(refused.value)


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_what_is_said_of_the_two_is_run(memory: str, both: Path, tmp_path: Path, base_folder: Path) -> None:
    plain = save_model(tmp_path / "plain", perturbed(tiny_llama()), tiny_tokenizer())
    ways: dict[str, tuple[Any, Any]] = {
        "the model": (both / WEIGHTS, plain),
        "the adapter": (both / "adapter_model.safetensors", tmp_path / "adapter"),
        "both": (f"{both}+{both}", f"{plain}+{tmp_path / 'adapter'}"),
    }
    for named, meant in ways.values():
        found: ActivationDiff = compare(base_folder, named, memory=memory)
        assert found.results == compare(base_folder, meant, memory=memory).results
        ours, theirs = weight_diff(base_folder, named), weight_diff(base_folder, meant)
        assert [row.change_norm for row in ours.results] == [row.change_norm for row in theirs.results]
    alone = compare(both / WEIGHTS, both / "adapter_model.safetensors", memory=memory)
    assert most(alone) > 1e-3
    assert "unplaced-tensors" not in alone.note_codes


def test_a_chosen_file_is_named_in_the_configuration_of_the_result(mixed: Path, base_folder: Path) -> None:
    diff = compare(base_folder, mixed / INDEX)
    assert diff.record.finetuned.id == str(mixed / INDEX)
    assert diff.record.finetuned.kind == "folder"
