"""The files that a model is read from: which may be read, which were, and whether they changed meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import lazarus
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from layouts import save_sentence_transformer
from lazarus.errors import LazarusError, ModelError, RecordingError, UsageError, WeightsError
from lazarus.models import digests
from lazarus.models.digests import sha256_of
from lazarus.models.files import ReadFiles
from lazarus.models.inside import FOLLOW_LINKS, check_files
from lazarus.models.stored import read_headers
from lazarus.models.tables import Table
from lazarus.models.tokenizer import find_tokenizer
from lazarus.notes import Notes
from lazarus.results import ActivationDiffRecord

PROMPTS = ["Hello there", "What is that", "The answer is 42"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = tiny_llama()
    return (
        save_model(tmp_path / "base", base, tiny_tokenizer()),
        save_model(tmp_path / "finetuned", perturbed(base), tiny_tokenizer()),
    )


def numbers(result: lazarus.ActivationDiff) -> list[float | None]:
    return [layer.divergence for layer in result.record.layers]


def every_command(base: Path, other: Path) -> list[Callable[[], Any]]:
    return [
        lambda: lazarus.activation_diff(base, other, PROMPTS),
        lambda: lazarus.activation_diff(base, other, PROMPTS, memory="stream"),
        lambda: lazarus.compare(base, other, "Hello"),
        lambda: lazarus.weight_diff(base, other),
    ]


# --- which files may be read --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors", "vocab.txt"])
def test_a_link_out_of_the_folder_is_refused_and_shows_nothing_of_what_it_leads_to(
    name: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    secret = tmp_path / "token"
    secret.write_text("hf_AbCdEfGhIjKl")
    (pair[1] / name).unlink(missing_ok=True)
    (pair[1] / name).symlink_to(secret)
    for run in every_command(*pair):
        with pytest.raises(ModelError, match=f"{name} is a link out of this folder") as raised:
            run()
        assert "AbCd" not in str(raised.value)


@pytest.mark.parametrize("place", ["1_Pooling", "inner/1_Pooling", "1.json/config.json"])
def test_a_link_out_of_the_folder_of_a_module_is_refused(
    place: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text('{"secret": 1}')
    (pair[1] / "modules.json").write_text("[]")
    (pair[1] / place).parent.mkdir(exist_ok=True)
    (pair[1] / place).symlink_to(tmp_path / "outside" / ("config.json" if place.endswith("json") else ""))
    for run in every_command(*pair):
        with pytest.raises(ModelError, match="is a link out of this folder"):
            run()


def test_a_link_in_the_place_of_further_chat_templates_is_refused(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (pair[1] / "additional_chat_templates").symlink_to(tmp_path / "outside")
    with pytest.raises(ModelError, match="additional_chat_templates is a link out of this folder"):
        check_files("it", pair[1])


def test_folders_within_a_model_may_be_deep_and_links_may_lead_in_circles(pair: tuple[Path, Path]) -> None:
    (pair[1] / "modules.json").write_text("[]")
    deep = pair[1]
    for _ in range(200):
        deep /= "d"
    deep.mkdir(parents=True)
    (deep / "back").symlink_to(pair[1])
    check_files("it", pair[1])


def test_links_within_the_folder_and_into_the_hub_cache_are_followed(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (pair[1] / "model.safetensors").rename(cache / "blob")
    (pair[1] / "model.safetensors").symlink_to(cache / "blob")
    (pair[1] / "config.json").rename(pair[1] / "first.json")
    (pair[1] / "config.json").symlink_to("first.json")
    with pytest.raises(ModelError, match="is a link out"):
        check_files("it", pair[1])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    check_files("it", pair[1])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv(FOLLOW_LINKS, "1")
    check_files("it", pair[1])


def test_a_snapshot_of_a_cache_that_was_moved_is_read(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = tmp_path / "models--org--name"
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for file in pair[1].iterdir():
        shutil.copy(file, model / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert lazarus.weight_diff(pair[1], snapshot).record.summary.verdict == "identical"


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_a_device_or_a_pipe_is_refused(target: str, pair: tuple[Path, Path]) -> None:
    place = pair[1] / "tokenizer.json"
    place.unlink()
    os.mkfifo(place) if target == "pipe" else place.symlink_to(target)
    with pytest.raises(ModelError, match=r"tokenizer\.json is a device or a pipe"):
        lazarus.activation_diff(*pair, PROMPTS)


@pytest.mark.parametrize(
    "shard",
    [
        *("w.bin", "/dev/zero", "/etc/hostname", "../base/model.safetensors", "sub/model.safetensors", 3),
        *("nul\0.safetensors", "é" * 125 + ".safetensors"),
    ],
)
def test_an_index_names_safetensors_of_its_own_folder_and_nothing_else(
    shard: Any, pair: tuple[Path, Path]
) -> None:
    state = load_file(pair[1] / "model.safetensors")
    (pair[1] / "model.safetensors").unlink()
    torch.save(state, pair[1] / "w.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, shard)}
    (pair[1] / INDEX).write_text(json.dumps(index))
    for run in every_command(*pair):
        with pytest.raises(WeightsError, match=r"index\.json names .* has a plain name"):
            run()


def test_weights_that_config_json_chooses_are_of_its_own_folder(pair: tuple[Path, Path]) -> None:
    config = pair[1] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_weights": "../x.bin"}))
    for run in every_command(*pair):
        with pytest.raises(WeightsError, match=r"config\.json names '\.\./x\.bin'"):
            run()


@pytest.fixture
def with_secret(tmp_path: Path) -> tuple[Path, Path]:
    """Make a folder with a tokenizer of a plain vocabulary, and a file outside that could be one as well."""
    special = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
    folder, secret = tmp_path / "words", tmp_path / "secret"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "vocab.txt").write_text("\n".join([*special, "hello"]))
    secret.write_text("\n".join([*special, "hf_AbCd"]))
    return folder, secret


@pytest.mark.parametrize("setting", ["vocab_file", "vocab"])
def test_a_tokenizer_reads_no_file_that_its_settings_name(
    setting: str, with_secret: tuple[Path, Path]
) -> None:
    folder, secret = with_secret
    settings = {"tokenizer_class": "BertTokenizer", setting: str(secret)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = find_tokenizer(folder)
    assert found is not None
    assert {"hello", "[MASK]"} <= found.get_vocab().keys()
    assert "hf_AbCd" not in found.get_vocab()


@pytest.mark.parametrize("settings", [{"init_inputs": ["{}"]}, {"sp_model_kwargs": {"model_file": "{}"}}])
def test_a_tokenizer_whose_settings_may_be_paths_is_refused(
    settings: dict[str, Any], with_secret: tuple[Path, Path]
) -> None:
    folder, secret = with_secret
    text = json.dumps({"tokenizer_class": "BertTokenizer", **settings}).replace("{}", str(secret))
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: has init_inputs") as raised:
        find_tokenizer(folder)
    assert "AbCd" not in str(raised.value)


@pytest.mark.parametrize(
    "setting", ["_attn_implementation", "attn_implementation", "_experts_implementation_internal"]
)
def test_a_kernel_that_config_json_names_is_refused(setting: str, pair: tuple[Path, Path]) -> None:
    config = pair[1] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {setting: "someone/kernel"}))
    for run in every_command(*pair):
        with pytest.raises(ModelError, match=f"{setting} names a kernel of the Hub, 'someone/kernel'"):
            run()


@pytest.mark.parametrize("path", ["../base", "/etc", "a\0", "a" * 256])
def test_the_modules_of_a_sentence_transformers_model_are_in_its_folder(
    path: str, pair: tuple[Path, Path]
) -> None:
    (pair[1] / "config.json").unlink()
    (pair[1] / "modules.json").write_text(json.dumps([{"type": "x.Transformer", "path": path}]))
    with pytest.raises(ModelError, match=r"modules\.json names the folder"):
        lazarus.activation_diff(*pair, PROMPTS)


def test_rows_of_an_embedding_whose_file_was_replaced_are_an_error(pair: tuple[Path, Path]) -> None:
    weights = pair[1] / "model.safetensors"
    stored = read_headers([str(weights)])["model.embed_tokens.weight"]
    table = Table(stored, torch.float32)
    table.fill([1])
    weights.rename(pair[1] / "older")
    shutil.copy(pair[0] / "model.safetensors", weights)
    with pytest.raises(WeightsError, match=r"model\.safetensors changed while it was read"):
        table.fill([2])


# --- which were read ----------------------------------------------------------------------------


def test_a_result_lists_the_files_with_their_digests(pair: tuple[Path, Path]) -> None:
    results: list[Any] = [
        lazarus.activation_diff(*pair, PROMPTS).record,
        lazarus.activation_diff(*pair, PROMPTS, memory="stream").record,
        lazarus.weight_diff(*pair).record,
    ]
    lens = lazarus.compare(*pair, "Hello").record
    both: list[Any] = [(record.base.files, record.finetuned.files) for record in results]
    for sides in [*both, (lens.model1.info.files, lens.model2.info.files)]:
        for folder, files in zip(pair, sides, strict=True):
            found = {file.name: (file.bytes, file.sha256) for file in files}
            assert {"config.json", "model.safetensors", "tokenizer.json"} <= found.keys()
            for name, told in found.items():
                content = (folder / name).read_bytes()
                assert told == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("subfolder", ["", "0_Transformer"])
def test_the_modules_of_a_sentence_encoder_are_among_its_files(subfolder: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(**sizes, vocab_size=len(tiny_tokenizer()), max_position_embeddings=64))
    folder = save_sentence_transformer(tmp_path / "encoder", subfolder, model, tiny_tokenizer())

    def run() -> ActivationDiffRecord:
        return lazarus.activation_diff(folder, folder, PROMPTS, work_dir=str(tmp_path / "work")).record

    listed = {file.name for file in run().base.files}
    inner = {str(Path(subfolder, name)) for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert {"modules.json", "1_Pooling/config.json", *inner} <= listed
    assert all((folder / name).is_file() for name in listed)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UsageError, match=r"another run: base 1_Pooling/config\.json of"):
        run()


def test_without_digests_the_files_are_listed_all_the_same(pair: tuple[Path, Path]) -> None:
    record = lazarus.activation_diff(*pair, PROMPTS, no_digests=True).record
    assert record.base.files
    assert {file.sha256 for file in record.base.files} == {None}


def test_one_flipped_bit_can_be_told(pair: tuple[Path, Path]) -> None:
    before = lazarus.weight_diff(*pair).record.finetuned.files
    path = pair[1] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)
    after = lazarus.weight_diff(*pair).record.finetuned.files
    changed = [one.name for one, other in zip(before, after, strict=True) if one != other]
    assert changed == ["model.safetensors"]


def test_a_recording_keeps_the_files_of_its_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    lazarus.record(pair[0], PROMPTS, tmp_path / "recording")
    told = lazarus.activation_diff(tmp_path / "recording", pair[1]).record
    live = lazarus.activation_diff(*pair, PROMPTS).record
    assert told.base.files == live.base.files


def test_a_file_that_is_not_what_the_hub_holds_is_refused(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    large, small = b"weights", b"{}"
    git = hashlib.sha1(b"blob %d\0%b" % (len(small), small)).hexdigest()
    names = {"model.safetensors": hashlib.sha256(large).hexdigest(), "config.json": git}
    for (name, blob), content in zip(names.items(), (large, small), strict=True):
        (blobs / blob).write_bytes(content)
        (snapshot / name).symlink_to(blobs / blob)

    def read() -> ReadFiles:
        files = ReadFiles("org/name")
        files.add(snapshot, [snapshot / name for name in names])
        return files

    assert [file.name for file in read().told(Notes())] == list(names)
    for name, blob in names.items():
        content = (blobs / blob).read_bytes()
        (blobs / blob).write_bytes(content + b" ")
        with pytest.raises(WeightsError, match=f"{name} is not what the Hub holds"):
            read().told(Notes())
        (blobs / blob).write_bytes(content)


def test_the_digest_of_a_large_file_is_kept_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    path = tmp_path / "large"
    path.write_bytes(bytes(2**24))
    first = sha256_of(str(path))
    assert first == hashlib.sha256(bytes(2**24)).hexdigest()
    (kept,) = [each for each in (tmp_path / "assets").rglob("*") if each.is_file()]
    digests._KNOWN.clear()  # as in another process
    kept.write_text("f" * 64)
    assert sha256_of(str(path)) == "f" * 64  # what is kept is used
    kept.write_text("no digest")
    assert sha256_of(str(path)) == first
    times = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert sha256_of(str(path)) == hashlib.sha256(b"x" + bytes(2**24 - 1)).hexdigest()


# --- whether they changed meanwhile -------------------------------------------------------------


class AtFirstTokens:
    """An observer that does something when the first tokens were run."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act: Callable[[], object] | None = act

    def loading(self, role: Any, name: str) -> None: ...
    def testing(self, prompts: Any) -> None: ...
    def running(self, n: int) -> None: ...
    def detected(self, families: Any, n_layers: int) -> None: ...

    def advanced(self, n: int) -> None:
        if self.act is not None:
            self.act()
            self.act = None


def replaced(path: Path) -> None:
    """Write another save by rename, as save_pretrained of another process may."""
    state = {name: tensor * 1.5 for name, tensor in load_file(path).items()}
    save_file(state, path.with_name("new"), metadata={"format": "pt"})
    path.with_name("new").rename(path)


def written_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\0" * 8)
    os.utime(path, ns=(0, 0))  # whatever the clock's resolution


def cut(path: Path) -> None:
    os.truncate(path, 0)


CHANGES = [replaced, written_over, cut, os.unlink]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_while_they_are_streamed_are_an_error(
    change: Callable[[Path], None], pair: tuple[Path, Path]
) -> None:
    observer = AtFirstTokens(lambda: change(pair[0] / "model.safetensors"))
    with pytest.raises(LazarusError, match=r"model\.safetensors") as raised:
        lazarus.activation_diff(*pair, PROMPTS, memory="stream", observer=observer)
    assert isinstance(raised.value, WeightsError)
    assert observer.act is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_after_they_were_read_change_nothing_and_are_noted(
    change: Callable[[Path], None], dtype: str, tmp_path: Path
) -> None:
    base = tiny_llama().to(getattr(torch, dtype))  # stored as they run: nothing is converted
    folders = (
        save_model(tmp_path / "base", base, tiny_tokenizer()),
        save_model(tmp_path / "finetuned", perturbed(base), tiny_tokenizer()),
    )
    truth = lazarus.activation_diff(*folders, PROMPTS, dtype=dtype)
    observer = AtFirstTokens(lambda: change(folders[0] / "model.safetensors"))
    found = lazarus.activation_diff(*folders, PROMPTS, dtype=dtype, observer=observer)
    assert numbers(found) == numbers(truth)
    assert "files-changed" in found.record.note_codes


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_under_weight_diff_are_an_error(
    change: Callable[[Path], None], pair: tuple[Path, Path]
) -> None:
    observer = AtFirstTokens(lambda: change(pair[0] / "model.safetensors"))
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        lazarus.weight_diff(*pair, observer=observer)


def test_a_shard_of_another_state_is_an_error(pair: tuple[Path, Path]) -> None:
    model = tiny_llama()
    for folder in pair:
        shutil.rmtree(folder)
        save_model(folder, model, tiny_tokenizer(), max_shard_size="60KB")
    shards = sorted(pair[1].glob("model-*.safetensors"))
    assert len(shards) > 2
    observer = AtFirstTokens(lambda: replaced(shards[-1]))
    with pytest.raises(WeightsError, match=r"changed while"):
        lazarus.activation_diff(*pair, PROMPTS, memory="stream", observer=observer)


def test_a_work_dir_knows_other_weights_of_the_same_size_and_time(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    path, work = pair[1] / "model.safetensors", str(tmp_path / "work")
    lazarus.activation_diff(*pair, PROMPTS, work_dir=work)
    times = path.stat()
    written_over(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    with pytest.raises(UsageError, match=r"belongs to another run: finetuned model\.safetensors of"):
        lazarus.activation_diff(*pair, PROMPTS, work_dir=work)


def test_a_recording_of_a_model_that_changed_is_none(pair: tuple[Path, Path], tmp_path: Path) -> None:
    observer = AtFirstTokens(lambda: replaced(pair[0] / "model.safetensors"))
    with pytest.raises(WeightsError, match="changed while"):
        lazarus.record(pair[0], PROMPTS, tmp_path / "r", memory="stream", observer=observer)
    with pytest.raises(RecordingError):
        lazarus.Recording.open(tmp_path / "r")
