"""Which memory mode is chosen, and that both give the same numbers from the same folders."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lazarus
from architectures import build
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer, word_tokenizer
from lazarus import loading
from lazarus.errors import ModelNotFoundError, UnsupportedModelError, UsageError
from lazarus.estimating import peak_bytes, reset_peak
from lazarus.models import Footprint, estimate, give_back, parse_model, wrap_model
from lazarus.options import Options

TEXTS = ["Hello, how are you?", "What is AI?", "The answer is 42", "Hello, how are you? What is AI?"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    base = tiny_llama()
    return (
        save_model(tmp_path / "base", base, tiny_tokenizer()),
        save_model(tmp_path / "finetuned", perturbed(base), tiny_tokenizer()),
    )


def compare(base: Any, finetuned: Any, **options: Any) -> lazarus.ActivationDiff:
    return lazarus.activation_diff(base, finetuned, TEXTS, **options)


def numbers(diff: lazarus.ActivationDiff) -> Any:
    record = diff.record
    return record.layers, record.sites, record.summary, record.output, record.results


def test_both_fit_and_are_in_memory(folders: tuple[Path, Path]) -> None:
    diff = compare(*folders)
    assert diff.record.settings.memory == "resident"
    assert "streamed" not in diff.note_codes


def test_threads_that_load_at_once_leave_each_other_alone(folders: tuple[Path, Path]) -> None:
    """transformers puts its own functions in the place of torch's while it builds a model."""
    alone = numbers(compare(*folders))
    for _ in range(3):
        with ThreadPoolExecutor(3) as threads:
            found = [threads.submit(compare, *folders) for _ in range(3)]
        assert all(numbers(each.result()) == alone for each in found)
    assert numbers(compare(*folders)) == alone


@pytest.mark.parametrize("localize", [False, True])
def test_what_does_not_fit_is_streamed_and_a_note_says_so(
    folders: tuple[Path, Path], localize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = compare(*folders, localize=localize)
    monkeypatch.setattr(loading, "free_bytes", lambda _device: 10_000)
    streamed = compare(*folders, localize=localize)
    assert streamed.record.settings.memory == "stream"
    assert any(note.startswith("both models take 0.0 GB and 0.0 GB are free") for note in streamed.notes)
    assert numbers(streamed) == numbers(resident)


def test_resident_is_resident_whatever_is_free(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_bytes", lambda _device: 0)
    assert compare(*folders, memory="resident").record.settings.memory == "resident"


def test_a_model_in_memory_is_not_read_from_disk(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"`memory=.stream.` reads models from disk"):
        compare(tiny_llama(), folders[1], memory="stream")


def test_a_model_that_is_not_there_is_told_by_name(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_bytes", lambda _device: 0)
    with pytest.raises(ModelNotFoundError, match="no-such-folder"):
        compare(folders[0], "./no-such-folder")


def test_one_checkpoint_against_a_copy_is_streamed_and_identical(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    copied = save_model(tmp_path / "copy", tiny_llama(), tiny_tokenizer())
    diff = compare(folders[0], copied, memory="stream", localize=True)
    assert diff.summary.verdict == "identical"
    assert diff.summary.weights_identical is True
    assert [layer.local.relative_l2 for layer in diff.layers if layer.local] == [0.0] * len(diff.layers)
    assert any(note.startswith("blocks 0 to 3 are the same") for note in diff.notes)


@pytest.mark.parametrize("name", ["dory", "inkling2_text"])
def test_what_cannot_go_on_after_a_block_runs_batch_by_batch(name: str, tmp_path: Path) -> None:
    base = build(name)
    folders = (
        save_model(tmp_path / "base", base, word_tokenizer()),
        save_model(tmp_path / "finetuned", perturbed(base), word_tokenizer()),
    )
    texts = ["t5 t17 t80", "t9 t4", "t12 t77 t31 t3 t8"]
    resident, streamed = (
        lazarus.activation_diff(folders[0], folders[1], texts, memory=memory)
        for memory in ("resident", "stream")
    )
    assert any("each batch read all weights" in note for note in streamed.notes)
    assert numbers(streamed) == numbers(resident)


def test_what_cannot_be_streamed_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "rwkv", build("rwkv"), word_tokenizer())
    with pytest.raises(UnsupportedModelError, match=r"rescales all its weights.*Use `memory=.resident.`"):
        lazarus.activation_diff(folder, folder, ["t5 t17"], memory="stream")


@pytest.mark.parametrize("wrap", ["compile", "data parallel", "both"])
def test_a_wrapped_model_is_taken_out_of_its_wrapper(wrap: str) -> None:
    model = tiny_llama()
    wrapped: nn.Module = nn.DataParallel(model) if wrap != "compile" else model
    if wrap != "data parallel":
        wrapped = cast(nn.Module, torch.compile(wrapped))
    loaded = wrap_model(wrapped, "wrapped")
    assert loaded.model is model
    assert len(loaded.notes) == (2 if wrap == "both" else 1)
    assert {note.code for note in loaded.notes} == {"unwrapped-model"}


def test_a_wrapper_around_an_adapter_keeps_the_adapter() -> None:
    tuned = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    compiled = cast(nn.Module, torch.compile(tuned))
    assert wrap_model(compiled, "wrapped").adapter == wrap_model(tuned, "plain").adapter


LONG = ["Hello, how are you? " * 40, "What is AI? " * 60]


def rows_of(folders: tuple[Path, Path], n_rows: int, **options: Any) -> tuple[Footprint, int]:
    """What a pair takes, and what is said of the compared rows of a batch."""
    base, finetuned = (parse_model(str(folder)) for folder in folders)
    chosen, work = Options.make(**options), loading.Work(torch.device("cpu"), n_rows)
    found = estimate(base, finetuned, loading._load_options(chosen, work.device))
    assert found is not None
    return found, loading.rows_bytes(found, chosen, work)


def test_rows_that_leave_no_room_have_a_pair_streamed(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    footprint, few = rows_of(folders, 2)
    monkeypatch.setattr(loading, "ROOM_AT_LEAST", 0)
    room = int(footprint.resident * loading.ROOM_FOR_THE_REST) + 2 * few
    monkeypatch.setattr(loading, "free_bytes", lambda _device: room)
    texts = ["Hello", "What is AI?"]
    found = lazarus.activation_diff(*folders, texts, position="last")
    assert found.record.settings.memory == "resident"
    found = lazarus.activation_diff(*folders, texts * 4, position="all", batch_tokens=4096)
    assert found.record.settings.memory == "stream"
    assert any("what is compared of a batch" in note for note in found.notes)


@pytest.mark.parametrize("vocabulary", [300, 20_000])
def test_the_rows_of_a_batch_take_what_is_said_within_a_factor_of_two(
    vocabulary: int, tmp_path: Path
) -> None:
    model = tiny_llama(
        num_hidden_layers=12, hidden_size=256, vocab_size=vocabulary, max_position_embeddings=2048
    )
    models, tokenizer = (model, perturbed(model)), tiny_tokenizer()
    folders = (
        save_model(tmp_path / "base", models[0], tokenizer),
        save_model(tmp_path / "finetuned", models[1], tokenizer),
    )
    n_rows = sum(len(tokenizer(text).input_ids) for text in LONG)
    cpu, peaks = torch.device("cpu"), dict[str, int]()
    for position in ("last", "all"):
        # Once before, for what a process takes once.
        for texts in (["Hello"], LONG):
            give_back()
            if not reset_peak(cpu):
                pytest.skip("this system tells no peak")
            before = psutil.Process().memory_info().rss
            options: dict[str, Any] = {"position": position, "batch_tokens": 4096}
            lazarus.activation_diff(*models, texts, tokenizer=tokenizer, **options)
        peaks[position] = peak_bytes() - before
    # The same passes: what differs is the rows.
    taken = peaks["all"] - peaks["last"]
    said = rows_of(folders, n_rows, position="all")[1] - rows_of(folders, 2)[1]
    assert said / 2 <= taken <= 2 * said
