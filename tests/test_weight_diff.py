"""weight_diff from files to result: every tensor is there, and its numbers are right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from torch import Tensor

from architectures import build
from factories import save_model, tiny_llama
from layouts import (
    METADATA,
    WEIGHTS,
    edit_json,
    edit_weights,
    publish,
    save_fp8,
    save_sentence_transformer,
    scattered,
)
from lazarus import WeightDiff, weight_diff
from lazarus.errors import (
    BlocksNotFoundError,
    GateNotMetError,
    ModelNotFoundError,
    NoDataError,
    UnsupportedModelError,
    UsageError,
    WeightsError,
)
from lazarus.results import TensorRecord

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


def rows_of(diff: WeightDiff) -> dict[tuple[int | None, str], TensorRecord]:
    """The rows by their places."""
    rows = {(row.layer, row.component): row for row in diff.results}
    assert len(rows) == len(diff.results)
    return rows


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
        with pytest.raises(GateNotMetError, match="--expect changed"):
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
    with pytest.raises(GateNotMetError, match="--expect identical"):
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


def test_a_resized_vocabulary_is_compared_as_far_as_both_go(base: Path, tmp_path: Path) -> None:
    larger = tiny_llama()
    larger.resize_token_embeddings(310)
    diff = weight_diff(base, save_model(tmp_path / "larger", larger))
    rows = rows_of(diff)
    assert rows[None, "embed"].shape == [300, 32]
    assert (rows[None, "embed"].n_changed, rows[None, "lm_head"].n_changed) == (0, 0)
    assert sum("310 in fine-tuned" in note for note in diff.notes) == 2


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
    assert any("tied to embed in both" in note for note in both.notes)
    diff = weight_diff(tied, base)
    rows, stored = rows_of(diff), [load_numpy(folder / WEIGHTS) for folder in (tied, base)]
    b, f = stored[0]["model.embed_tokens.weight"], stored[1]["lm_head.weight"]
    expected = np.linalg.norm(f.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64))
    assert rows[None, "lm_head"].relative_change == pytest.approx(expected, rel=1e-6)
    assert any("a tensor of its own" in note for note in diff.notes)


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
    assert any("NaN or infinity" in note and "2, " in note for note in diff.notes)
    with pytest.raises(GateNotMetError, match="layer 0 mlp_up has no relative change"):
        diff.check_gates(fail_above=5)
    assert weight_diff(tmp_path / "spoilt", tmp_path / "spoilt").summary.verdict == "identical"


def test_a_base_of_zeros_has_no_relative_change(base: Path, tmp_path: Path) -> None:
    zero = edit_weights(base, tmp_path / "zero", lambda t: t["model.norm.weight"].zero_())
    diff = weight_diff(zero, base)
    assert rows_of(diff)[None, "final_norm"].relative_change is None
    assert any("all zero in base" in note for note in diff.notes)


@pytest.mark.parametrize(("dtype", "narrowed"), [(torch.bfloat16, True), (torch.float64, False)])
def test_two_types_are_compared_as_numbers(
    base: Path, tmp_path: Path, dtype: torch.dtype, narrowed: bool
) -> None:
    diff = weight_diff(base, save_model(tmp_path / "other", tiny_llama().to(dtype)))
    assert (diff.summary.verdict == "changed") == narrowed
    assert any("different types (float32 to bfloat16)" in note for note in diff.notes) == narrowed
    largest = max(row.relative_change or 0 for row in diff.results)
    assert (0 < largest < 2**-8) if narrowed else largest == 0


# --- What is refused, and what is allowed


def test_what_is_pickled_is_read_only_where_it_is_allowed(base: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(base, tmp_path / "pickled")
    torch.save(load_file(base / WEIGHTS), pickled / "pytorch_model.bin")
    (pickled / WEIGHTS).unlink()
    with pytest.raises(WeightsError, match="--allow-pickle"):
        weight_diff(base, pickled)
    assert weight_diff(base, pickled, allow_pickle=True).summary.verdict == "identical"
    old = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    torch.save(old, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert weight_diff(base, pickled, allow_pickle=True).summary.verdict == "identical"


def test_a_pickle_that_would_run_code_is_refused_even_then(base: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    pickled = shutil.copytree(base, tmp_path / "pickled")
    torch.save({"model.norm.weight": Evil()}, pickled / "pytorch_model.bin")
    (pickled / WEIGHTS).unlink()
    with pytest.raises(WeightsError):
        weight_diff(base, pickled, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_what_is_quantised_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="quantised \\(fp8\\)"):
        weight_diff(base, save_fp8(tmp_path / "fp8", tiny_llama(), None))


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
    with pytest.raises(BlocksNotFoundError, match="--layers-path"):
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
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
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
