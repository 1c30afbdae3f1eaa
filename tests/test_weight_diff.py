"""weight_diff from files to result: every tensor is there, and its numbers are right."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig, ViTModel

from architectures import CAUSAL, ENCODER_DECODERS, ENCODERS, MULTIMODAL, UNBUILDABLE, build, swept
from factories import notes_of, save_model, tiny_llama, tiny_tokenizer
from layouts import (
    METADATA,
    WEIGHTS,
    edit_json,
    edit_weights,
    publish,
    save_gguf,
    save_sentence_transformer,
    scattered,
    store_codes,
)
from lazarus import WeightDiff, weight_diff
from lazarus.errors import (
    BlocksNotFoundError,
    GateNotMetError,
    ModelError,
    ModelNotFoundError,
    NoDataError,
    UnsupportedModelError,
    UsageError,
    WeightsError,
)
from lazarus.results import TensorRecord
from made_weights import record_of

ARCHITECTURES = (
    "llama",
    "gemma2",
    "gemma3",
    "qwen3",
    "olmo2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "bloom",
    "falcon",
    "gptj",
    "codegen",
    "opt",
    "mixtral",
    "qwen2_moe",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
    "granitemoe",
    "jetmoe",
    "dbrx",
    "mamba",
    "mamba2",
    "jamba",
    "rwkv",
    "qwen3_next",
    "glm4",
    "bert:masked",
    "modernbert:masked",
    "t5:seq2seq",
    "bart:seq2seq",
)


UP = "model.layers.1.mlp.up_proj.weight"


def rows_of(diff: WeightDiff) -> dict[tuple[int | None, str], TensorRecord]:
    """The rows by their places."""
    rows = {(row.layer, row.component): row for row in diff.results}
    assert len(rows) == len(diff.results)
    return rows


def with_up(base: Path, folder: Path, up: Tensor) -> Path:
    """A copy of a checkpoint with another up projection in layer 1."""
    return edit_weights(base, folder, lambda tensors: tensors.update({UP: up}))


def normal(seed: int) -> Tensor:
    """An up projection in float64."""
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pickled(base: Path, folder: Path, changes: Mapping[Any, Any] = MappingProxyType({})) -> Path:
    """A copy of a checkpoint whose tensors are pickled, with some of them changed or added."""
    shutil.copytree(base, folder)
    torch.save({**load_file(base / WEIGHTS), **changes}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def saved_as_before(folder: Path) -> Path:
    """The same pickle in torch's format before 1.6."""
    path = folder / "pytorch_model.bin"
    stored = torch.load(path, weights_only=True)
    torch.save(stored, path, _use_new_zipfile_serialization=False)
    return folder


# --- The numbers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_of_every_architecture_is_what_numpy_says(name: str, tmp_path: Path) -> None:
    model = build(name)
    base = save_model(tmp_path / "base", model)
    finetuned = save_model(tmp_path / "finetuned", scattered(model))
    diff = weight_diff(base, finetuned)
    ours, theirs = (numbers_of(folder) for folder in (base, finetuned))
    parts: dict[str, list[TensorRecord]] = {}
    for row in diff.results:
        parts.setdefault(row.name, []).append(row)
    assert parts.keys() == ours.keys()
    assert diff.record.unmatched == []
    assert "missing-tensors" not in diff.note_codes
    for key, rows in parts.items():
        b, f = ours[key], theirs[key]
        assert sum(int(np.prod(row.shape)) for row in rows) == b.size, key
        check(rows, b, f, key)
    change = np.sqrt(sum(np.sum((theirs[key] - ours[key]) ** 2) for key in ours))
    norm = np.sqrt(sum(np.sum(tensor**2) for tensor in ours.values()))
    assert diff.summary.relative_change == pytest.approx(change / norm, rel=1e-9)


def numbers_of(folder: Path) -> dict[str, Any]:
    """A checkpoint's tensors in float64."""
    return {key: tensor.astype(np.float64) for key, tensor in load_numpy(folder / WEIGHTS).items()}


def check(rows: list[TensorRecord], b: Any, f: Any, key: str) -> None:
    """The rows of one stored tensor against NumPy: a whole one in every number, a fused one in its sums."""
    change, base = np.linalg.norm(f - b), np.linalg.norm(b)
    assert np.sqrt(sum((row.change_norm or 0) ** 2 for row in rows)) == pytest.approx(change, rel=1e-9), key
    assert np.sqrt(sum((row.base_norm or 0) ** 2 for row in rows)) == pytest.approx(base, rel=1e-9), key
    assert max(row.max_abs_change or 0 for row in rows) == np.abs(f - b).max(), key
    assert sum(row.n_changed for row in rows) == np.count_nonzero(f != b), key
    if len(rows) == 1 and base:
        (row,) = rows
        cosine = np.sum(f * b) / (np.linalg.norm(f) * base)
        assert row.relative_change == pytest.approx(change / base, rel=1e-9), key
        assert row.cosine_similarity == pytest.approx(cosine, abs=1e-9), key
        assert row.share_changed == np.mean(f != b), key
        assert list(b.shape) == row.shape, key


def test_fused_tensors_are_the_parts_that_numpy_cuts(tmp_path: Path) -> None:
    model = build("phi3")
    base, finetuned = save_model(tmp_path / "b", model), save_model(tmp_path / "f", scattered(model))
    rows = rows_of(weight_diff(base, finetuned))
    key = "model.layers.1.self_attn.qkv_proj.weight"
    b, f = (load_numpy(folder / WEIGHTS)[key].astype(np.float64) for folder in (base, finetuned))
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    sizes = [config.num_attention_heads * head] + [config.num_key_value_heads * head] * 2
    cuts = np.cumsum(sizes)[:-1]
    for component, ours, theirs in zip(
        ("attn_q", "attn_k", "attn_v"), np.split(b, cuts), np.split(f, cuts), strict=True
    ):
        expected = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
        assert rows[1, component].relative_change == pytest.approx(expected, rel=1e-9)
        assert rows[1, component].shape == list(ours.shape)
        assert rows[1, component].name == key


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("weights") / "base", tiny_llama())


def test_a_model_against_itself_is_exactly_nothing(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    for finetuned, cause in ((base, "same files"), (copy, "a copy of the other")):
        diff = weight_diff(base, finetuned)
        assert diff.summary.verdict == "identical"
        assert any(cause in told for told in diff.summary.causes)
        assert {
            (r.relative_change, r.cosine_similarity, r.max_abs_change, r.n_changed) for r in diff.results
        } == {(0.0, 1.0, 0.0, 0)}
        assert diff.summary.relative_change == 0
        diff.check_gates(fail_above=0, expect="identical")
        with pytest.raises(GateNotMetError, match=r"`expect=.changed.`"):
            diff.check_gates(expect="changed")


def test_a_single_bit_is_found(base: Path, tmp_path: Path) -> None:
    key = "model.layers.2.mlp.down_proj.weight"

    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(torch.int32)[5, 7] ^= 1

    diff = weight_diff(base, edit_weights(base, tmp_path / "bit", flip))
    changed = [row for row in diff.results if row.n_changed]
    assert [(row.layer, row.component, row.n_changed) for row in changed] == [(2, "mlp_down", 1)]
    (b, f) = (load_numpy(folder / WEIGHTS)[key].astype(np.float64) for folder in (base, tmp_path / "bit"))
    assert changed[0].relative_change == pytest.approx(np.linalg.norm(f - b) / np.linalg.norm(b), rel=1e-9)
    assert diff.summary.verdict == "changed"
    assert diff.summary.first_changed_layer == 2
    assert [diff.results[i].name for i in diff.summary.most_changed] == [key]
    assert [layer.n_changed_tensors for layer in diff.layers] == [0, 0, 1, 0]
    with pytest.raises(GateNotMetError, match=r"`expect=.identical.`"):
        diff.check_gates(expect="identical")


def test_layers_are_their_tensors_together(base: Path, tmp_path: Path) -> None:
    def scale(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5

    diff = weight_diff(base, edit_weights(base, tmp_path / "scaled", scale))
    assert [layer.relative_change == 0 for layer in diff.layers] == [True, False, True, True]
    stored, scaled = numbers_of(base), numbers_of(tmp_path / "scaled")
    key = "model.layers.1.mlp.up_proj.weight"
    moved = np.linalg.norm(scaled[key] - stored[key])
    total = np.sqrt(sum(np.sum(v**2) for k, v in stored.items() if k.startswith("model.layers.1.")))
    assert diff.layers[1].relative_change == pytest.approx(moved / total, rel=1e-9)
    assert (diff.layers[1].n_tensors, diff.layers[1].n_changed_tensors) == (9, 1)
    every = np.sqrt(sum(np.sum(tensor**2) for tensor in stored.values()))
    assert diff.summary.relative_change == pytest.approx(moved / every, rel=1e-9)


def test_the_tensors_that_changed_most_come_first_and_only_what_is_above_the_threshold_is_flagged(
    base: Path, tmp_path: Path
) -> None:
    """A tensor times k has changed by |k − 1|; twice a tensor by 1, exactly."""
    factors = {
        "model.layers.1.mlp.up_proj.weight": 2.0,
        "model.layers.1.mlp.down_proj.weight": 0.5,
        "model.layers.2.self_attn.q_proj.weight": -2.0,
        "model.layers.2.self_attn.v_proj.weight": 0.25,
        "model.layers.3.self_attn.o_proj.weight": -1.0,
        "model.norm.weight": 8.0,
    }

    def scale(tensors: dict[str, Tensor]) -> None:
        for key, factor in factors.items():
            tensors[key] *= factor

    diff = weight_diff(base, edit_weights(base, tmp_path / "scaled", scale), threshold=1)
    changes = {row.name: row.relative_change for row in diff.results if row.relative_change}
    assert changes == pytest.approx({key: abs(factor - 1) for key, factor in factors.items()}, rel=1e-12)
    assert changes["model.layers.1.mlp.up_proj.weight"] == diff.record.settings.threshold
    ranked = sorted(changes, key=lambda key: -abs(factors[key] - 1))
    assert [diff.results[i].name for i in diff.summary.most_changed] == ranked[:5]
    assert {row.name for row in diff.results if row.flagged} == set(ranked[:3])
    assert (diff.summary.n_changed_tensors, diff.summary.n_flagged_tensors) == (6, 3)
    assert diff.summary.first_changed_layer == 1
    assert (diff.summary.n_matrices, diff.summary.n_low_rank) == (None, None)


def test_the_rank_of_an_adapter_is_the_largest_and_of_all_or_of_none(base: Path, tmp_path: Path) -> None:
    def plant(ranks: dict[str, int]) -> Callable[[dict[str, Tensor]], None]:
        generator = torch.Generator().manual_seed(5)

        def add(tensors: dict[str, Tensor]) -> None:
            for name, rank in ranks.items():
                up = tensors[f"model.layers.{name}.weight"]
                b, a = (torch.randn(n, rank, generator=generator) for n in up.shape)
                up += 0.01 * b @ a.T

        return add

    ranks = {"0.mlp.up_proj": 2, "1.mlp.up_proj": 5, "2.mlp.gate_proj": 3}
    found = []
    for name, more in (("low", {}), ("mixed", {"3.mlp.gate_proj": 32})):
        folder = edit_weights(base, tmp_path / name, plant({**ranks, **more}))
        summary = weight_diff(base, folder, spectrum=True).summary
        found.append((summary.n_matrices, summary.n_low_rank, summary.adapter_rank))
    assert found == [(3, 3, 5), (4, 3, None)]


def test_a_planted_update_of_rank_8_is_found_with_its_rank(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    base = save_model(tmp_path / "base", model)
    generator = torch.Generator().manual_seed(5)

    def plant(tensors: dict[str, Tensor]) -> None:
        b, a = torch.randn(256, 8, generator=generator), torch.randn(8, 128, generator=generator)
        tensors["model.layers.1.mlp.gate_proj.weight"] += 0.001 * b @ a

    diff = weight_diff(base, edit_weights(base, tmp_path / "planted", plant), spectrum=True)
    found = {(row.layer, row.component): row.spectrum for row in diff.results if row.spectrum is not None}
    assert found.keys() == {(1, "mlp_gate")}
    spectrum = found[1, "mlp_gate"]
    b, f = (
        load_numpy(p / WEIGHTS)["model.layers.1.mlp.gate_proj.weight"] for p in (base, tmp_path / "planted")
    )
    sigma = np.linalg.svd(f.astype(np.float64) - b.astype(np.float64), compute_uv=False)
    shares = np.cumsum(sigma**2) / np.sum(sigma**2)
    assert spectrum.adapter_rank == 8
    assert spectrum.spectral_norm == pytest.approx(sigma[0], rel=1e-9)
    assert spectrum.stable_rank == pytest.approx(np.sum(sigma**2) / sigma[0] ** 2, rel=1e-9)
    assert spectrum.rank_90 == 1 + int(np.searchsorted(shares, 0.9))
    assert (diff.summary.n_matrices, diff.summary.n_low_rank, diff.summary.adapter_rank) == (1, 1, 8)


# --- What belongs to what


def test_shards_are_one_checkpoint(base: Path, tmp_path: Path) -> None:
    shards = save_model(tmp_path / "shards", tiny_llama(), max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert weight_diff(base, shards).summary.verdict == "identical"


def test_a_model_of_the_hub_is_read_at_its_revision(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    other = save_model(tmp_path / "other", scattered(tiny_llama()))
    publish(tmp_path / "hub", "org/model", {"main": ("a" * 40, base), "tuned": ("b" * 40, other)})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert weight_diff("org/model", base).summary.verdict == "identical"
    diff = weight_diff("org/model", "org/model@tuned")
    assert diff.summary.verdict == "changed"
    assert (diff.record.base.revision, diff.record.finetuned.revision) == ("a" * 40, "b" * 40)


@pytest.mark.parametrize("n_rows", [310, 290])
def test_a_resized_vocabulary_is_compared_as_far_as_both_go_and_is_a_change(
    n_rows: int, base: Path, tmp_path: Path
) -> None:
    resized = tiny_llama()
    resized.resize_token_embeddings(n_rows)
    diff = weight_diff(base, save_model(tmp_path / "resized", resized))
    rows = rows_of(diff)
    for component in ("embed", "lm_head"):
        row = rows[None, component]
        assert (row.shape, row.n_changed) == ([min(n_rows, 300), 32], 0)
        (note,) = [note for note in diff.notes if component in note]
        assert note.startswith(f"{component} has 300 rows in base and {n_rows} in fine-tuned")
    assert [(t.component, t.base_shape, t.finetuned_shape) for t in diff.record.unmatched] == [
        (component, [300, 32], [n_rows, 32]) for component in ("embed", "lm_head")
    ]
    assert (diff.summary.verdict, diff.summary.n_changed_tensors) == ("changed", 0)
    with pytest.raises(GateNotMetError, match=r"`expect=.identical.`"):
        diff.check_gates(expect="identical")
    with pytest.raises(GateNotMetError, match="2 tensors have no counterpart"):
        diff.check_gates(fail_above=0)


def test_the_rows_of_a_resized_vocabulary_that_both_have_are_what_numpy_says(
    base: Path, tmp_path: Path
) -> None:
    smaller = tiny_llama()
    smaller.resize_token_embeddings(290)
    finetuned = save_model(tmp_path / "smaller", scattered(smaller))
    row = rows_of(weight_diff(base, finetuned))[None, "embed"]
    b, f = (numbers_of(folder)["model.embed_tokens.weight"][:290] for folder in (base, finetuned))
    check([row], b, f, row.name)


def test_what_only_one_has_is_named(base: Path, tmp_path: Path) -> None:
    biased = tiny_llama(attention_bias=True)
    diff = weight_diff(base, save_model(tmp_path / "biased", biased))
    added = {(t.layer, t.component) for t in diff.record.unmatched}
    assert added == {(i, f"attn_{part}.bias") for i in range(4) for part in "qkvo"}
    assert {(t.base_shape, tuple(t.finetuned_shape or ())) for t in diff.record.unmatched} <= {
        (None, (32,)),
        (None, (16,)),
    }
    assert "only fine-tuned has them: 16 tensors, model.layers.0.self_attn." in " ".join(diff.notes)
    assert diff.summary.verdict == "changed"
    turned = weight_diff(tmp_path / "biased", base)
    assert "only base has them: 16 tensors" in " ".join(turned.notes)
    with pytest.raises(GateNotMetError, match="no counterpart"):
        diff.check_gates(fail_above=1)


def test_a_tensor_more_is_a_change_though_all_others_are_the_same(base: Path, tmp_path: Path) -> None:
    more = edit_weights(base, tmp_path / "more", lambda t: t.update({"model.extra.weight": torch.ones(3)}))
    for one, other in ((base, more), (more, base)):
        diff = weight_diff(one, other)
        assert (diff.summary.verdict, diff.summary.n_changed_tensors, diff.summary.n_unmatched) == (
            "changed",
            0,
            1,
        )
        who = "fine-tuned" if other is more else "base"
        (note,) = notes_of(diff, "unmatched-tensors")
        assert note == f"not compared, because only {who} has them: 1 tensor, model.extra.weight"


def test_a_deeper_model_has_layers_that_are_named(base: Path, tmp_path: Path) -> None:
    diff = weight_diff(base, save_model(tmp_path / "deeper", tiny_llama(num_hidden_layers=5)))
    assert {t.layer for t in diff.record.unmatched} == {4}
    assert [layer.layer for layer in diff.layers] == [0, 1, 2, 3]


def test_other_shapes_are_named(base: Path, tmp_path: Path) -> None:
    diff = weight_diff(base, save_model(tmp_path / "wider", tiny_llama(intermediate_size=96)))
    assert {t.component for t in diff.record.unmatched} == {"mlp_gate", "mlp_up", "mlp_down"}
    note = "model.layers.0.mlp.gate_proj.weight was not compared: its shape is [64, 32] in base and [96, 32]"
    assert any(note in each for each in diff.notes)


def test_a_tied_head_is_compared_once_and_with_the_other_s_own(base: Path, tmp_path: Path) -> None:
    tied = save_model(tmp_path / "tied", tiny_llama(tie_word_embeddings=True))
    both = weight_diff(tied, shutil.copytree(tied, tmp_path / "copy"))
    assert (None, "lm_head") not in rows_of(both)
    assert both.notes == ["lm_head is tied to embed in both: one tensor, compared once"]
    diff = weight_diff(tied, base)
    rows, stored = rows_of(diff), [load_numpy(folder / WEIGHTS) for folder in (tied, base)]
    b, f = stored[0]["model.embed_tokens.weight"], stored[1]["lm_head.weight"]
    expected = np.linalg.norm(f.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64))
    assert rows[None, "lm_head"].relative_change == pytest.approx(expected, rel=1e-6)
    told = "lm_head is tied to embed in {} and a tensor of its own in {}: it was compared with that embed"
    assert notes_of(diff, "tied-tensors") == [told.format("base", "fine-tuned")]
    assert notes_of(weight_diff(base, tied), "tied-tensors") == [told.format("fine-tuned", "base")]


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with a tied head, and the same files of one that says it has a head of its own."""
    folder = tmp_path_factory.mktemp("headless")
    tied = save_model(folder / "tied", tiny_llama(tie_word_embeddings=True))
    untied = shutil.copytree(tied, folder / "untied")
    edit_json(untied / "config.json", tie_word_embeddings=False)
    return tied, untied


def test_a_head_that_is_tied_in_one_and_lacking_in_the_other_is_a_change(headless: tuple[Path, Path]) -> None:
    tied, untied = headless
    shape = [300, 32]
    for one, other, shapes in ((tied, untied, (shape, None)), (untied, tied, (None, shape))):
        diff = weight_diff(one, other)
        assert (diff.summary.verdict, diff.summary.n_changed_tensors) == ("changed", 0)
        assert [(t.component, t.base_shape, t.finetuned_shape) for t in diff.record.unmatched] == [
            ("lm_head", *shapes)
        ]
        assert f"{untied}: its files lack 1 of the model's parameters: lm_head.weight" in diff.notes
        assert "tied-tensors" not in diff.note_codes
        with pytest.raises(GateNotMetError, match="no counterpart"):
            diff.check_gates(fail_above=1)


def test_the_embedding_that_a_tied_head_uses_is_not_said_to_lack_a_counterpart(
    headless: tuple[Path, Path],
) -> None:
    diff = weight_diff(*headless)
    assert rows_of(diff)[None, "embed"].n_changed == 0
    assert not [note for note in diff.notes if "not compared" in note and "embed_tokens" in note]


def test_parameters_that_no_file_holds_are_named(base: Path, tmp_path: Path) -> None:
    folders = [edit_weights(base, tmp_path / name, lambda t: t.pop(UP)) for name in ("one", "other")]
    diff = weight_diff(*folders)
    assert diff.summary.verdict == "identical"
    assert diff.notes == [f"{folder}: its files lack 1 of the model's parameters: {UP}" for folder in folders]


def test_a_tied_table_is_held_where_its_head_is(headless: tuple[Path, Path], tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    renamed = edit_weights(headless[0], tmp_path / "renamed", rename)
    assert "missing-tensors" not in weight_diff(renamed, renamed).note_codes
    for one, other in ((headless[0], renamed), (renamed, headless[0])):
        diff = weight_diff(one, other)
        assert (diff.summary.verdict, diff.record.unmatched) == ("identical", [])
        assert diff.summary.causes  # and no setting differs


def test_a_model_that_reads_no_tokens_is_compared_without_a_vocabulary(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8}
    model = ViTModel(ViTConfig(**sizes, num_hidden_layers=2, patch_size=4))
    base = save_model(tmp_path / "base", scattered(model, seed=1))
    diff = weight_diff(base, save_model(tmp_path / "finetuned", scattered(model, seed=2)))
    assert (diff.summary.n_unmatched, diff.notes) == (0, [])
    assert diff.summary.n_changed_tensors == diff.summary.n_tensors == len(load_file(base / WEIGHTS))


EVERY = [n for n in (*CAUSAL, *ENCODERS, *ENCODER_DECODERS, *MULTIMODAL) if n not in UNBUILDABLE]


@pytest.mark.parametrize("name", swept(EVERY))
def test_a_whole_checkpoint_lacks_nothing(name: str, tmp_path: Path) -> None:
    """One stored tensor may be several parameters: Sarvam's queries, keys and values."""
    folder = save_model(tmp_path / "model", build(name))
    diff = weight_diff(folder, folder)
    assert diff.record.unmatched == []
    assert "missing-tensors" not in diff.note_codes


def test_an_expert_that_no_file_holds_is_named(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", build("mixtral"))
    expert = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    lacking = edit_weights(base, tmp_path / "lacking", lambda t: t.pop(expert))
    assert any("its files lack" in note for note in weight_diff(lacking, lacking).notes)


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_lacks_nothing(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    base = save_model(tmp_path / "base", model)
    path = save_gguf(tmp_path / "model.gguf", model, tiny_tokenizer(), gguf.GGMLQuantizationType.F32)
    assert "missing-tensors" not in weight_diff(base, path).note_codes


def test_a_second_fused_tensor_in_a_place_keeps_all_of_its_numbers(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", build("phi3"))
    fused = "model.layers.1.self_attn.{}.weight"

    def double(tensors: dict[str, Tensor]) -> None:
        tensors[fused.format("Wqkv")] = tensors[fused.format("qkv_proj")].clone()

    doubled = edit_weights(base, tmp_path / "doubled", double)
    changed = edit_weights(doubled, tmp_path / "changed", lambda t: t[fused.format("Wqkv")][:1].add_(1))
    diff = weight_diff(doubled, changed)
    (row,) = [row for row in diff.results if row.n_changed]
    assert (row.component, row.layer, row.n_changed) == (fused.format("Wqkv"), 1, 32)


def test_experts_that_are_stacked_match_those_that_are_not(tmp_path: Path) -> None:
    model = build("mixtral")
    apart = save_model(tmp_path / "apart", model)
    keys = load_file(apart / WEIGHTS).keys()
    assert any(".experts.1.w1." in key for key in keys)
    stacked = tmp_path / "stacked"
    shutil.copytree(apart, stacked)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, stacked / WEIGHTS, metadata=METADATA
    )
    diff = weight_diff(apart, stacked)
    assert diff.record.unmatched == []
    assert diff.notes == []
    assert diff.summary.verdict == "identical"
    assert {(0, "expert_0.mlp_gate"), (0, "expert_3.mlp_down"), (1, "expert_2.mlp_up")} <= rows_of(
        diff
    ).keys()
    assert weight_diff(stacked, apart).summary.verdict == "identical"


def test_rows_are_in_the_model_s_order(base: Path, tmp_path: Path) -> None:
    diff = weight_diff(base, base)
    places = [(row.layer, row.component) for row in diff.results]
    assert places[0] == (None, "embed")
    assert places[-2:] == [(None, "final_norm"), (None, "lm_head")]
    assert [layer for layer, _ in places[1:-2]] == sorted(
        layer for layer, _ in places[1:-2] if layer is not None
    )


def test_extra_tensors_are_compared_too(base: Path, tmp_path: Path) -> None:
    def add(value: float) -> Callable[[dict[str, Tensor]], None]:
        def edit(tensors: dict[str, Tensor]) -> None:
            tensors["model.layers.9.extra.weight"] = torch.full((3, 4), value)

        return edit

    one = edit_weights(base, tmp_path / "one", add(1.0))
    other = edit_weights(base, tmp_path / "other", add(2.0))
    (row,) = [row for row in weight_diff(one, other).results if row.n_changed]
    assert (row.name, row.layer, row.relative_change) == ("model.layers.9.extra.weight", None, 1.0)


def test_numbers_that_are_not_finite_are_told_and_fail_every_gate(base: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")

    diff = weight_diff(base, edit_weights(base, tmp_path / "spoilt", spoil), spectrum=True)
    broken = [row for row in diff.results if row.relative_change is None]
    assert [(row.layer, row.component) for row in broken] == [(0, "mlp_up"), (1, "mlp_up")]
    assert notes_of(diff, "undefined-change") == [
        "tensors that hold NaN or infinity, so that their change is no number: "
        "2, model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight"
    ]
    with pytest.raises(GateNotMetError, match="layer 0 mlp_up has no relative change"):
        diff.check_gates(fail_above=5)
    assert weight_diff(tmp_path / "spoilt", tmp_path / "spoilt").summary.verdict == "identical"


def test_a_base_of_zeros_has_no_relative_change(base: Path, tmp_path: Path) -> None:
    zero = edit_weights(base, tmp_path / "zero", lambda t: t["model.norm.weight"].zero_())
    diff = weight_diff(zero, base)
    assert rows_of(diff)[None, "final_norm"].relative_change is None
    assert diff.notes == [
        "tensors that are all zero in base, so that no change is relative: 1, model.norm.weight"
    ]


def test_what_is_not_finite_and_the_same_leaves_no_change_of_all(base: Path, tmp_path: Path) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    broken = edit_weights(base, tmp_path / "broken", lambda t: t[norm][:1].fill_(float("nan")))
    diff = weight_diff(broken, edit_weights(broken, tmp_path / "scaled", lambda t: t[UP].mul_(1.5)))
    rows = rows_of(diff)
    b, f = (numbers_of(tmp_path / name)[UP] for name in ("broken", "scaled"))
    expected = np.linalg.norm(f - b) / np.linalg.norm(b)
    assert rows[1, "mlp_up"].relative_change == pytest.approx(expected, rel=1e-9)
    same = rows[1, "attn_norm"]
    assert (same.relative_change, same.n_changed, same.base_norm) == (0.0, 0, None)
    assert [layer.relative_change for layer in diff.layers] == [0.0, None, 0.0, 0.0]
    assert diff.summary.relative_change is None
    (note,) = diff.notes
    assert note.startswith("tensors with the same bits whose norm is not finite")
    assert note.endswith(f": 1, {norm}")
    diff.check_gates(fail_above=0.51)


def test_nothing_changed_needs_no_note_on_norms(base: Path, tmp_path: Path) -> None:
    broken = with_up(base, tmp_path / "broken", normal(1) * math.nan)
    assert weight_diff(broken, broken).notes == []


@pytest.mark.parametrize(("ours", "theirs"), [(1e307, 1.01e307), (1e-200, 1e200)])
def test_what_overflows_is_null_and_meets_no_gate(
    ours: float, theirs: float, base: Path, tmp_path: Path
) -> None:
    """A norm of base in the one, a relative change in the other."""
    b, f = normal(1) * ours, normal(1) * theirs
    diff = weight_diff(with_up(base, tmp_path / "b", b), with_up(base, tmp_path / "f", f))
    row = rows_of(diff)[1, "mlp_up"]
    scaled = [((f - b) / theirs).numpy(), (b / ours).numpy()]
    change, norm = (float(np.linalg.norm(x)) for x in scaled)
    assert row.relative_change is None
    assert row.change_norm == pytest.approx(change * theirs, rel=1e-9)
    assert row.base_norm == (None if math.isinf(norm * ours) else pytest.approx(norm * ours, rel=1e-9))
    assert [code for note, code in zip(diff.notes, diff.note_codes, strict=True) if UP in note] == [
        "undefined-change",
        "absurd-weights",
    ]
    note = next(note for note in diff.notes if UP in note)
    assert "too large for float64" in note
    with pytest.raises(GateNotMetError, match="layer 1 mlp_up has no relative change"):
        diff.check_gates(fail_above=1e9)


def test_a_change_that_overflows_is_not_said_to_hold_infinity(base: Path, tmp_path: Path) -> None:
    ones = torch.ones(64, 32, dtype=torch.float64)
    diff = weight_diff(
        with_up(base, tmp_path / "b", ones * 1e308), with_up(base, tmp_path / "f", ones * 1.5e308)
    )
    row = rows_of(diff)[1, "mlp_up"]
    assert (row.relative_change, row.max_abs_change) == (None, 1.5e308 - 1e308)
    (note,) = [note for note in diff.notes if UP in note and "2⁴⁰" not in note]
    assert "NaN or infinity" not in note


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_a_change_whose_squares_are_no_numbers_has_no_spectrum(
    scale: float, base: Path, tmp_path: Path
) -> None:
    b, f = normal(1) * scale, normal(2) * scale
    ours = {UP: b, "two_rows": b[:2].clone()}
    theirs = {UP: f, "two_rows": f[:2].clone(), "model.norm.weight": torch.zeros(32)}
    folders = (
        edit_weights(base, tmp_path / "b", lambda tensors: tensors.update(ours)),
        edit_weights(base, tmp_path / "f", lambda tensors: tensors.update(theirs)),
    )
    diff = weight_diff(*folders, spectrum=True)
    row = rows_of(diff)[1, "mlp_up"]
    b, f = b / scale, f / scale
    expected = np.linalg.norm((f - b).numpy()) / np.linalg.norm(b.numpy())
    assert row.spectrum is None
    assert row.relative_change == pytest.approx(expected, rel=1e-9)
    absurd = ["absurd-weights"] * (scale > 1)
    assert diff.note_codes == [*absurd, "missing-spectrum"]
    note = diff.notes[-1]
    assert note.startswith("changed matrices without a spectrum")
    assert note.endswith(f": 2, {UP}, two_rows")
    assert weight_diff(*folders).note_codes == absurd


def test_a_matrix_that_changed_in_the_sign_of_zeros_has_no_squares_out_of_range(
    base: Path, tmp_path: Path
) -> None:
    zero = edit_weights(base, tmp_path / "zero", lambda t: t[UP][:1].zero_())
    signed = edit_weights(zero, tmp_path / "signed", lambda t: t[UP][:1].neg_())
    diff = weight_diff(zero, signed, spectrum=True)
    row = rows_of(diff)[1, "mlp_up"]
    assert (row.n_changed, row.change_norm, row.spectrum) == (32, 0.0, None)
    assert "missing-spectrum" not in diff.note_codes


def test_an_empty_tensor_has_not_changed_and_weighs_nothing(base: Path, tmp_path: Path) -> None:
    empty = edit_weights(base, tmp_path / "empty", lambda t: t.update(empty=torch.zeros(3, 0)))
    finetuned = edit_weights(empty, tmp_path / "finetuned", lambda t: t[UP].mul_(1.5))
    diff = weight_diff(empty, finetuned, spectrum=True)
    row = rows_of(diff)[None, "empty"]
    assert (row.shape, row.relative_change, row.cosine_similarity) == ([3, 0], 0.0, 1.0)
    assert (row.n_changed, row.share_changed, row.base_norm, row.change_norm) == (0, 0.0, 0.0, 0.0)
    ours, theirs = numbers_of(empty), numbers_of(finetuned)
    norm = np.sqrt(sum(np.sum(tensor**2) for tensor in ours.values()))
    expected = np.linalg.norm(theirs[UP] - ours[UP]) / norm
    assert diff.summary.relative_change == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("ours", "theirs", "narrowed"),
    [
        (torch.float8_e5m2, torch.float8_e4m3fn, True),
        (torch.float8_e4m3fn, torch.float8_e5m2, True),
        (torch.bfloat16, torch.float8_e5m2, True),
        (torch.float8_e5m2, torch.float32, False),
        (torch.float8_e4m3fn, torch.bfloat16, False),
    ],
    ids=str,
)
def test_types_of_8_bits_are_compared_as_numbers(
    ours: torch.dtype, theirs: torch.dtype, narrowed: bool, base: Path, tmp_path: Path
) -> None:
    b, f = normal(1).to(ours), normal(2).to(theirs)
    diff = weight_diff(with_up(base, tmp_path / "b", b), with_up(base, tmp_path / "f", f))
    check([rows_of(diff)[1, "mlp_up"]], b.double().numpy(), f.double().numpy(), UP)
    names = " to ".join(str(dtype).removeprefix("torch.") for dtype in (ours, theirs))
    assert any(f"different types ({names})" in note for note in diff.notes) == narrowed


@pytest.mark.parametrize(("dtype", "narrowed"), [(torch.bfloat16, True), (torch.float64, False)])
def test_two_types_are_compared_as_numbers(
    base: Path, tmp_path: Path, dtype: torch.dtype, narrowed: bool
) -> None:
    diff = weight_diff(base, save_model(tmp_path / "other", tiny_llama().to(dtype)))
    assert diff.summary.verdict == ("rounding" if narrowed else "identical")
    assert ("fine-tuned is base rounded to bfloat16" in diff.summary.causes) == narrowed
    largest = max(row.relative_change or 0 for row in diff.results)
    assert (0 < largest < 2**-8) if narrowed else largest == 0


# --- What is refused, and what is allowed


def test_what_is_pickled_is_read_only_where_it_is_allowed(base: Path, tmp_path: Path) -> None:
    folder = pickled(base, tmp_path / "pickled")
    with pytest.raises(WeightsError, match="`allow_pickle=True`"):
        weight_diff(base, folder)
    for _ in range(2):
        assert weight_diff(base, folder, allow_pickle=True).summary.verdict == "identical"
        saved_as_before(folder)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_pickle_that_would_run_code_is_refused_even_then(is_old: bool, base: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    folder = pickled(base, tmp_path / "pickled")
    stored = {"model.norm.weight": Evil()}
    torch.save(stored, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not is_old)
    with pytest.raises(WeightsError, match=r"holds more than plain tensors.*save_pretrained") as refused:
        weight_diff(base, folder, allow_pickle=True)
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


NO_PLAIN_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "without numbers": lambda tensor: tensor.to("meta"),
}


@pytest.mark.filterwarnings("ignore:.*quantized tensor:UserWarning", "ignore:TypedStorage:UserWarning")
@pytest.mark.parametrize("kind", NO_PLAIN_NUMBERS)
def test_a_pickled_tensor_of_no_plain_numbers_is_refused_by_name(
    kind: str, base: Path, tmp_path: Path
) -> None:
    tensor = NO_PLAIN_NUMBERS[kind](load_file(base / WEIGHTS)[UP])
    folder = pickled(base, tmp_path / "pickled", {UP: tensor})
    with pytest.raises(WeightsError, match=rf"{UP} is {kind}.*save_pretrained"):
        weight_diff(base, folder, allow_pickle=True)


def test_pickled_tensors_that_torch_holds_conjugated_or_negated_are_read_as_they_are(
    base: Path, tmp_path: Path
) -> None:
    x = torch.complex(normal(1)[0], normal(2)[0]).to(torch.complex64)
    y, part = x.conj(), x.clone().conj().imag
    assert (y.is_conj(), part.is_neg()) == (True, True)
    plain = edit_weights(base, tmp_path / "plain", lambda t: t.update(x=x, part=x.imag.clone()))
    diff = weight_diff(plain, pickled(base, tmp_path / "pickled", {"x": y, "part": part}), allow_pickle=True)
    rows, b = rows_of(diff), x.numpy().astype(np.complex128)
    for key, expected in (("x", np.linalg.norm(b.conj() - b) / np.linalg.norm(b)), ("part", 2.0)):
        assert rows[None, key].relative_change == pytest.approx(float(expected), rel=1e-9)
    assert diff.summary.n_changed_tensors == 2


def test_a_pickled_parameter_is_its_numbers(base: Path, tmp_path: Path) -> None:
    up = torch.nn.Parameter(2 * load_file(base / WEIGHTS)[UP])
    diff = weight_diff(base, pickled(base, tmp_path / "pickled", {UP: up}), allow_pickle=True)
    assert [(row.name, row.relative_change) for row in diff.results if row.n_changed] == [(UP, 1.0)]


def test_what_a_pickle_holds_besides_tensors_is_named(base: Path, tmp_path: Path) -> None:
    others = {"optimizer": {"step": torch.ones(1)}, "seeds": [torch.ones(1)], 7: torch.ones(1)}
    folder = pickled(base, tmp_path / "pickled", others)
    diff = weight_diff(base, folder, allow_pickle=True)
    assert diff.summary.verdict == "identical"
    (note,) = diff.notes
    assert note == (
        f"{folder / 'pytorch_model.bin'}: not compared, because they are no tensors: optimizer, seeds, 7"
    )


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("size", [0, 3, 1000, 100_000])
def test_a_pickle_that_is_cut_short_is_an_error_of_the_model(
    size: int, is_old: bool, base: Path, tmp_path: Path
) -> None:
    folder = pickled(base, tmp_path / "pickled")
    path = (saved_as_before(folder) if is_old else folder) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="pickled"):
        weight_diff(base, folder, allow_pickle=True)


def test_a_quantisation_that_is_not_decoded_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "aqlm"))
    store_codes(folder, quant_method="aqlm")
    with pytest.raises(UnsupportedModelError, match=r"quantised by 'aqlm'.*trained codebooks"):
        weight_diff(base, folder)


def test_two_models_without_a_common_tensor_are_an_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NoDataError, match="no tensor in common"):
        weight_diff(base, save_model(tmp_path / "wide", tiny_llama(hidden_size=64, intermediate_size=96)))


def test_models_of_which_nothing_is_a_number_are_an_error(base: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(float("nan"))

    with pytest.raises(NoDataError, match="NaN or infinity"):
        weight_diff(base, edit_weights(base, tmp_path / "spoilt", spoil))


def test_a_damaged_file_is_told(base: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(base, tmp_path / "damaged")
    (damaged / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(WeightsError, match="damaged or cut short"):
        weight_diff(base, damaged)


def test_a_wrong_path_of_blocks_is_an_error(base: Path) -> None:
    with pytest.raises(BlocksNotFoundError, match="`layers_path"):
        weight_diff(base, base, layers_path="model.nothing")


def test_a_model_in_memory_is_none(base: Path) -> None:
    with pytest.raises(UsageError, match="save_pretrained"):
        weight_diff(base, tiny_llama())


def test_what_is_not_there_is_an_error(base: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        weight_diff(base, "/no/such/folder")
    with pytest.raises(UsageError, match="unknown option"):
        weight_diff(base, base, position="last")  # type: ignore[call-arg]


def test_blocks_that_cannot_be_found_still_have_names(tmp_path: Path) -> None:
    model = build("xlm")
    base = save_model(tmp_path / "base", model)
    diff = weight_diff(base, save_model(tmp_path / "finetuned", scattered(model)))
    assert any("no tensor is in a layer" in note or "named by their keys" in note for note in diff.notes)
    assert {row.name for row in diff.results} == load_file(base / WEIGHTS).keys()


def test_settings_and_models_are_in_the_record(base: Path, tmp_path: Path) -> None:
    diff = weight_diff(base, base, threshold=0.2, seed=3)
    assert (diff.record.settings.threshold, diff.record.settings.seed) == (0.2, 3)
    info = diff.record.base
    assert (info.family, info.architecture, info.n_layers, info.stored_dtype) == (
        "llama",
        "LlamaForCausalLM",
        4,
        "float32",
    )
    assert info.n_tensors == len(load_file(base / WEIGHTS))
    assert info.n_parameters == sum(t.numel() for t in load_file(base / WEIGHTS).values())
    diff.save(tmp_path / "diff.json")
    assert WeightDiff.load(tmp_path / "diff.json").record == diff.record
    assert json.loads((tmp_path / "diff.json").read_text())["command"] == "weight-diff"


def test_a_missing_config_is_an_error(base: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(base, tmp_path / "bare")
    edit_json(bare / "config.json", model_type="no-such-model")
    with pytest.raises(UnsupportedModelError, match="does not know its architecture"):
        weight_diff(base, bare)


OWN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel


class OwnConfig(PretrainedConfig):
    model_type = "own"


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.post_init()
"""


def test_a_model_with_python_code_of_its_own_is_named_by_its_keys(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(9, 4, generator=generator),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(4, 4, generator=generator),
        "model.layers.1.mlp.down_proj.weight": torch.randn(4, 4, generator=generator),
        "model.layers.1.strange": torch.randn(3, generator=generator),
    }
    folders = []
    for name, factor in (("base", 1.0), ("finetuned", 2.0)):
        folder = tmp_path / name
        folder.mkdir()
        code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        config = {"model_type": "own", "auto_map": code, "architectures": ["OwnModel"]}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text(OWN_CODE)
        stored = {key: tensor * factor for key, tensor in tensors.items()}
        save_file(stored, folder / WEIGHTS, metadata=METADATA)
        folders.append(folder)
    with pytest.raises(UnsupportedModelError, match="`trust_remote_code=True`"):
        weight_diff(*folders)
    diff = weight_diff(*folders, trust_remote_code=True)
    assert {(row.layer, row.component) for row in diff.results} == {
        (None, "embed"),
        (0, "attn_q"),
        (1, "mlp_down"),
        (1, "strange"),
    }
    assert [row.relative_change for row in diff.results] == pytest.approx([1.0] * 4, rel=1e-12)
    assert any("named by their keys alone" in note for note in diff.notes)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(UnsupportedModelError, match="Merge the adapter"):
        weight_diff(folders[0], adapter, trust_remote_code=True)


def test_a_sentence_transformer_is_its_transformer(tmp_path: Path) -> None:
    model = build("bert:masked").bert
    one = save_sentence_transformer(tmp_path / "one", "", model, None)
    other = save_sentence_transformer(tmp_path / "other", "0_Transformer", scattered(model), None)
    diff = weight_diff(one, other)
    assert diff.summary.n_unmatched == 0
    assert diff.summary.n_changed_tensors == len(diff.results) > 10


# --- Models of another depth


def deepened(base: Path, folder: Path, origins: list[int], change: Callable[[int, Tensor], Tensor]) -> Path:
    """A model whose layers are copies of layers of another, each changed as is said."""

    def stack(tensors: dict[str, Tensor]) -> None:
        before = dict(tensors)
        for key in [key for key in tensors if ".layers." in key]:
            del tensors[key]
        for layer, origin in enumerate(origins):
            for key in [key for key in before if f".layers.{origin}." in key]:
                name = key.replace(f".layers.{origin}.", f".layers.{layer}.")
                tensors[name] = change(layer, before[key]).clone()

    edit_weights(base, folder, stack)
    edit_json(folder / "config.json", num_hidden_layers=len(origins))
    return folder


DEPTHS: dict[str, tuple[list[int], list[tuple[int, int, int]], str]] = {
    "repeated": (
        [0, 1, 2, 1, 2, 3],
        [(0, 0, 3), (3, 1, 3)],
        "6 layers of fine-tuned are copies of base's, bit for bit: layers 0 to 2 are base's layers 0 to 2, "
        "layers 3 to 5 are base's layers 1 to 3",
    ),
    "pruned": (
        [0, 3],
        [(0, 0, 1), (1, 3, 1)],
        "2 layers of fine-tuned are copies of base's, bit for bit: layer 0 is base's layer 0, "
        "layer 1 is base's layer 3",
    ),
    "doubled": (
        [0, 0, 1, 1, 2, 2, 3, 3],
        [(0, 0, 1), (1, 0, 2), (3, 1, 2), (5, 2, 2), (7, 3, 1)],
        "layers 5 to 6 are base's layers 2 to 3 and 1 more",
    ),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_which_layers_of_another_depth_are_copies_is_said(name: str, base: Path, tmp_path: Path) -> None:
    origins, runs, said = DEPTHS[name]
    other = deepened(base, tmp_path / "other", origins, lambda _, tensor: tensor)
    diff = weight_diff(base, other)
    found = [(run.finetuned, run.base, run.n_layers) for run in diff.record.copied_layers]
    assert found == runs
    (note,) = notes_of(diff, "depths-differ")
    assert note.startswith(f"base has 4 layers and fine-tuned {len(origins)}: ")
    assert said in note
    assert diff.summary.verdict == "changed"
    back = weight_diff(other, base)
    assert sum(run.n_layers for run in back.record.copied_layers) == len(set(origins))


def test_layers_that_differ_in_one_bit_are_no_copies(base: Path, tmp_path: Path) -> None:
    def change(layer: int, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        if layer == 2:
            tensor.view(-1)[-1] += 1e-3
        return tensor.bfloat16() if layer == 4 else tensor

    other = deepened(base, tmp_path / "other", [0, 1, 2, 3, 3], change)
    diff = weight_diff(base, other)
    found = [(run.finetuned, run.base, run.n_layers) for run in diff.record.copied_layers]
    assert found == [(0, 0, 2), (3, 3, 1)]
    assert any("3 layers of fine-tuned are copies" in note for note in diff.notes)
    assert any(note.endswith("; the other 2 are not") for note in diff.notes)
    none = deepened(base, tmp_path / "none", [0, 1], lambda _, tensor: tensor * 1.5)
    assert any("No layer of fine-tuned is a copy" in note for note in weight_diff(base, none).notes)


def test_models_of_one_depth_have_no_note_on_it(base: Path, tmp_path: Path) -> None:
    other = deepened(base, tmp_path / "other", [1, 0, 2, 3], lambda _, tensor: tensor)
    diff = weight_diff(base, other)
    assert diff.record.copied_layers == []
    assert "depths-differ" not in diff.note_codes


def test_a_gate_on_a_result_without_a_tensor_is_not_met() -> None:
    """As a file may be that was written by hand."""
    diff = WeightDiff(record_of([]))
    with pytest.raises(GateNotMetError, match="no tensor was compared"):
        diff.check_gates(fail_above=1)
