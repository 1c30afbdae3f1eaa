"""Which GGUF files are read and which refused: parts, what is no model, what contradicts itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from huggingface_hub import constants

from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from ggufs import add, write_gguf
from layouts import publish, save_gguf
from lazarus import activation_diff, weight_diff
from lazarus.errors import LazarusError, ModelNotFoundError, UnsupportedModelError, WeightsError

TEXTS = ["Hello, how are you?", "What is AI?"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def both(base: Path | str, finetuned: Path | str) -> list[Any]:
    """What both commands find."""
    return [activation_diff(base, finetuned, TEXTS), weight_diff(base, finetuned)]


def same_weights(diff: Any) -> bool:
    """Whether one of the two commands found the same weights."""
    return diff.summary.verdict == "identical" or bool(diff.summary.weights_identical)


def refused(base: Path | str, finetuned: Path | str, kind: type[LazarusError] = WeightsError) -> str:
    """What both commands say, which is the same."""
    with pytest.raises(kind) as ours:
        activation_diff(base, finetuned, TEXTS)
    with pytest.raises(kind) as theirs:
        weight_diff(base, finetuned)
    assert str(ours.value) == str(theirs.value)
    return str(ours.value)


def parts_of(folder: Path, model: Any = None, stem: str = "model") -> list[Path]:
    folder.mkdir(exist_ok=True)
    write_gguf(folder / f"{stem}.gguf", "llama", tiny_llama() if model is None else model, split=12)
    return sorted(folder.glob(f"{stem}-*.gguf"))


# --- several files


@pytest.mark.parametrize("named", [0, 2])
def test_any_part_stands_for_all(named: int, tmp_path: Path, base_folder: Path) -> None:
    parts = parts_of(tmp_path / "parts")
    assert len(parts) == 4
    for diff in both(base_folder, parts[named]):
        assert same_weights(diff)
        assert f"{parts[named]}: all 4 parts of the GGUF model were read" in diff.notes
    assert all(diff.summary.causes == ["both names are the same files"] for diff in both(parts[0], parts[3]))


def test_a_part_that_is_missing_is_named(tmp_path: Path, base_folder: Path) -> None:
    parts = parts_of(tmp_path / "parts")
    parts[2].unlink()
    said = refused(base_folder, parts[0])
    assert f"split into 4 parts, of which 1 is missing: {parts[2].name}" in said
    parts[0].unlink()
    assert parts[0].name in refused(base_folder, parts[1])


def test_parts_whose_names_lie_are_refused(tmp_path: Path, base_folder: Path) -> None:
    parts = parts_of(tmp_path / "parts")
    whole = write_gguf(tmp_path / "whole.gguf", "llama", tiny_llama())
    renamed = Path(shutil.copy(parts[1], tmp_path / "renamed.gguf"))
    said = refused(base_folder, renamed)
    assert "part 2 of 4 (split.no, split.count)" in said
    assert "llama-gguf-split --merge" in said
    for number in (1, 2):
        shutil.copy(whole, tmp_path / f"lie-0000{number}-of-00002.gguf")
    said = refused(base_folder, tmp_path / "lie-00001-of-00002.gguf")
    assert "part 1 of 2, and by its metadata part 1 of 1" in said
    alone = shutil.copy(whole, tmp_path / "alone-00001-of-00001.gguf")
    assert weight_diff(base_folder, alone).summary.verdict == "identical"


def test_parts_of_two_models_are_refused(tmp_path: Path, base_folder: Path) -> None:
    parts = parts_of(tmp_path / "parts")
    shutil.copy(parts[1], parts[2])
    assert "by its metadata part 2 of 4" in refused(base_folder, parts[0])
    parts = parts_of(tmp_path / "parts")
    others = parts_of(tmp_path / "others", tiny_llama(tie_word_embeddings=True))
    shutil.copy(others[2], parts[2])
    assert "not of one model: their split.tensors.count" in refused(base_folder, parts[0])


# --- what is no model


def write(path: Path, architecture: str, keys: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add(writer, key, value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LORA: dict[str, tuple[int, ...]] = {
    "blk.0.attn_q.weight.lora_a": (4, 32),
    "blk.0.attn_q.weight.lora_b": (32, 4),
}
OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]], str]] = {
    "a LoRA": ("llama", {"general.type": "adapter", "adapter.type": "lora"}, LORA, "a LoRA adapter"),
    "a LoRA, by its keys": ("llama", {"adapter.lora.alpha": 16.0}, {"x": (2,)}, "a LoRA adapter"),
    "a LoRA, by its tensors": ("llama", {}, LORA, "a LoRA adapter"),
    "a projector": ("clip", {"general.type": "mmproj"}, {"mm.0.weight": (2, 2)}, "mmproj"),
    "a projector of before there were types": ("clip", {}, {"v.blk.0.attn_q.weight": (2, 2)}, "mmproj"),
    "a projector, by its tensors": ("llama", {}, {"mm.2.weight": (2, 2)}, "mmproj"),
    "an importance matrix": (
        "llama",
        {"general.type": "imatrix", "imatrix.chunk_count": 2},
        {"blk.0.attn_q.weight.in_sum2": (2,)},
        "importance matrix",
    ),
    "an importance matrix, by its tensors": (
        "llama",
        {},
        {"blk.0.attn_q.weight.in_sum2": (2,), "blk.0.attn_q.weight.counts": (1,)},
        "importance matrix",
    ),
    "a control vector": ("controlvector", {}, {"direction.1": (32,)}, "control vector"),
    "a vocabulary": ("llama", {"general.type": "vocab"}, {}, "a vocabulary"),
    "no tensors": ("llama", {"llama.block_count": 2}, {}, "holds no tensor"),
    "a kind of the future": ("llama", {"general.type": "dream"}, {"x": (2,)}, "general.type is 'dream'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_model_is_named_for_what_it_is(name: str, tmp_path: Path, base_folder: Path) -> None:
    architecture, keys, tensors, what = OTHERS[name]
    said = refused(
        base_folder, write(tmp_path / "other.gguf", architecture, keys, tensors), UnsupportedModelError
    )
    assert what in said
    assert "Name the" in said


# --- what contradicts itself


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_a_size_that_is_not_in_the_file_is_refused_by_its_key(
    key: str, tmp_path: Path, base_folder: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", tiny_llama(), without=[key])
    assert f"no llama.{key}" in refused(base_folder, path)


def test_sizes_that_follow_from_others_are_not_transformers_defaults(tmp_path: Path) -> None:
    model = tiny_llama(num_key_value_heads=4)
    base = save_model(tmp_path / "base", model, tiny_tokenizer())
    keys = ["attention.head_count_kv", "attention.key_length", "vocab_size", "rope.freq_base"]
    path = write_gguf(tmp_path / "model.gguf", "llama", model, without=keys)
    for diff in both(base, path):
        assert diff.notes == [note for note in diff.notes if str(path) not in note]
        assert same_weights(diff)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"block_count": 32}, "llama.block_count is 32, and its tensors are of 4 blocks"),
        ({"embedding_length": 4096}, "llama.embedding_length is 4096, and token_embd.weight has 32 there"),
        ({"feed_forward_length": 128}, "llama.feed_forward_length is 128, and blk.0.ffn_down.weight has 64"),
        ({"vocab_size": 32000}, "llama.vocab_size is 32000, and token_embd.weight has 300 there"),
        (
            {"attention.head_count": 8},
            "self_attn.o_proj.weight has the shape [32, 32], and its metadata asks for [32, 64]",
        ),
    ],
)
def test_metadata_that_is_not_the_tensors_is_refused(
    keys: dict[str, Any], says: str, tmp_path: Path, base_folder: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", tiny_llama(), keys)
    with pytest.raises(WeightsError) as error:
        activation_diff(base_folder, path, TEXTS)
    assert says in str(error.value)
    with pytest.raises(WeightsError, match=r"Metadata and tensors are not of one model"):
        weight_diff(base_folder, path)


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path, base_folder: Path) -> None:
    more = {"token_embd.weight": np.zeros((310, 32), dtype=np.float32)}
    path = write_gguf(tmp_path / "model.gguf", "llama", tiny_llama(), tensors=more, without=["vocab_size"])
    assert "tokenizer.ggml.tokens has 300 tokens, and token_embd.weight is of [310, 32]" in refused(
        base_folder, path
    )


def _changed(path: Path, place: int, new: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[place : place + len(new)] = new
    path.write_bytes(raw)


def test_what_cannot_be_read_says_why(tmp_path: Path, base_folder: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", tiny_llama())
    whole = path.read_bytes()
    for kind in (gguf.GGMLQuantizationType.F64, gguf.GGMLQuantizationType.I32):
        dtype = np.float64 if kind.name == "F64" else np.int32
        other = {"blk.1.ffn_norm.weight": np.ones(32, dtype=dtype)}
        write_gguf(path, "llama", tiny_llama(), tensors=other)
        said = refused(base_folder, path, UnsupportedModelError)
        assert f"blk.1.ffn_norm.weight is stored as {kind.name}" in said
    path.write_bytes(whole)
    _changed(path, 4, (1).to_bytes(4, "little"))
    assert "GGUF's version 1" in refused(base_folder, path, UnsupportedModelError)
    _changed(path, 4, (3).to_bytes(4, "big"))
    said = refused(base_folder, path, UnsupportedModelError)
    assert "big-endian" in said
    assert "gguf-convert-endian" in said
    path.write_bytes(whole)
    _changed(path, whole.index(b"token_embd.weight") + 17 + 4 + 16, (99).to_bytes(4, "little"))
    assert "ggml's type 99" in refused(base_folder, path, UnsupportedModelError)


def test_a_file_that_ends_anywhere_is_cut_short(tmp_path: Path, base_folder: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", tiny_llama())
    whole = path.read_bytes()
    for n_bytes in (4, 7, 20, 24, 100, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(WeightsError, match="damaged or cut short"):
            weight_diff(base_folder, path)
    path.write_bytes(whole[:3])
    with pytest.raises(WeightsError, match="not a GGUF file"):
        weight_diff(base_folder, path)


# --- which file is meant


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return lambda hub_id, folder: publish(tmp_path / "hub", hub_id, {"main": (COMMIT, folder)})


def files(folder: Path, *names: str) -> Path:
    """A folder with one model under several names."""
    folder.mkdir()
    for name in names:
        write_gguf(folder / name, "llama", tiny_llama())
    return folder


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path, base_folder: Path) -> None:
    folder = files(tmp_path / "one", "model-F32.gguf")
    write(folder / "mmproj-F16.gguf", "clip", {"general.type": "mmproj"}, {"mm.0.weight": (2, 2)})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for diff in both(base_folder, folder):
        assert f"{folder} holds one model, the GGUF file model-F32.gguf, which was read" in diff.notes
        assert (diff.record.finetuned.kind, diff.record.finetuned.id) == ("gguf", str(folder))
        assert same_weights(diff)


def test_a_folder_with_the_parts_of_one_is_that_model(tmp_path: Path, base_folder: Path) -> None:
    parts_of(tmp_path / "parts")
    assert weight_diff(base_folder, tmp_path / "parts").summary.verdict == "identical"


def test_of_several_gguf_files_one_must_be_named(tmp_path: Path, base_folder: Path) -> None:
    folder = files(tmp_path / "two", "model-Q4_0.gguf", "model-Q8_0.gguf")
    said = refused(base_folder, folder, ModelNotFoundError)
    assert f"Name one of them: {folder}/model-Q4_0.gguf, {folder}/model-Q8_0.gguf" in said
    save_model(folder, perturbed(tiny_llama()), tiny_tokenizer())
    assert weight_diff(base_folder, folder).record.finetuned.kind == "folder"


@pytest.mark.parametrize(
    "name",
    [
        "org/model-GGUF",
        "org/model-GGUF@main",
        "org/model-GGUF:model.gguf",
        "org/model-GGUF@main:model.gguf",
        "org/model-GGUF/model.gguf",
    ],
)
def test_a_gguf_file_on_the_hub_is_read_from_the_cache(
    name: str, hub: Callable[[str, Path], None], tmp_path: Path, base_folder: Path
) -> None:
    hub("org/model-GGUF", files(tmp_path / "repository", "model.gguf"))
    for diff in both(base_folder, name):
        info = diff.record.finetuned
        assert (info.id, info.kind, info.revision) == (name, "gguf", COMMIT)
        assert same_weights(diff)


def test_two_spellings_of_one_file_on_the_hub_are_one(
    hub: Callable[[str, Path], None], tmp_path: Path
) -> None:
    hub("org/parts", parts_of(tmp_path / "repository")[0].parent)
    one, other = "org/parts", "org/parts@main:model-00002-of-00004.gguf"
    for diff in both(one, other):
        assert diff.summary.causes == ["both names are the same files"]


def test_what_is_not_in_the_repository_is_told(
    hub: Callable[[str, Path], None], tmp_path: Path, base_folder: Path
) -> None:
    hub("org/several", files(tmp_path / "repository", "a.gguf", "b.gguf"))
    said = refused(base_folder, "org/several", ModelNotFoundError)
    assert "Name one of them: org/several:a.gguf, org/several:b.gguf" in said
    said = refused(base_folder, "org/several:c.gguf", ModelNotFoundError)
    assert "org/several:c.gguf: no such file" in said
    assert "org/none:c.gguf: no such folder or file here, not in the cache" in refused(
        base_folder, "org/none:c.gguf", ModelNotFoundError
    )
    assert "org/none: no such folder or file here" in refused(base_folder, "org/none", ModelNotFoundError)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "Q8_0"])
def test_a_file_on_the_hub_has_a_tokenizer_and_a_stored_dtype(
    kind: str, hub: Callable[[str, Path], None], tmp_path: Path
) -> None:
    (tmp_path / "repository").mkdir()
    stored = gguf.GGMLQuantizationType[kind]
    save_gguf(tmp_path / "repository" / "model.gguf", tiny_llama(), tiny_tokenizer(), stored)
    hub("org/model", tmp_path / "repository")
    info = activation_diff("org/model", "org/model:model.gguf", TEXTS).record.base
    assert (info.stored_dtype, info.run_dtype) == (kind, "float32")
