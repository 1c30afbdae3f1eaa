"""The mean differences as a file of steering vectors, against hidden states that transformers returns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

import lazarus
from factories import perturbed, tiny_llama, word_tokenizer
from lazarus.cli import app
from lazarus.demo import BASE, FINETUNED, PROMPTS
from lazarus.errors import OutputError
from reference import recorded_states, run_whole

TEXTS = [" ".join(f"t{3 + (7 * i + k * k) % 90}" for k in range(2 + i % 7)) for i in range(14)]
REPEATED = [*TEXTS, TEXTS[3], TEXTS[3], TEXTS[6]]


def compare(models: Sequence[PreTrainedModel], texts: Sequence[str] = TEXTS, **options: Any) -> Any:
    base, finetuned = models
    return lazarus.activation_diff(base, finetuned, list(texts), tokenizer=word_tokenizer(), **options)


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    base = tiny_llama()
    return base, perturbed(base)


@pytest.mark.parametrize("position", ["last", "all"])
def test_the_vectors_are_the_mean_differences(models: Any, tmp_path: Path, position: str) -> None:
    """By hand: mean over prompts of each prompt's mean f − b, from transformers' own hidden states."""
    diff = compare(models, REPEATED, position=position)
    assert diff.save(tmp_path / "shift.safetensors") == [str(tmp_path / "shift.safetensors")]
    found = load_file(tmp_path / "shift.safetensors")
    assert list(found) == [f"resid_post.{layer}" for layer in range(4)]
    for layer in range(3):  # transformers' last hidden state is behind the final norm
        by_prompt = []
        for text in REPEATED:
            ids = [int(word[1:]) for word in text.split()]
            base, finetuned = (recorded_states(model, ids)[layer + 1] for model in models)
            rows = (finetuned - base)[1:] if position == "all" else (finetuned - base)[-1:]
            by_prompt.append(rows.mean(0))
        vector = found[f"resid_post.{layer}"]
        assert (vector.dtype, vector.shape) == (torch.float32, (32,))
        np.testing.assert_allclose(vector.numpy(), np.mean(by_prompt, axis=0), rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(diff.vectors[f"resid_post.{layer}"], vector.numpy())


def test_the_file_says_what_it_is_of_and_is_the_same_each_time(models: Any, tmp_path: Path) -> None:
    diff = compare(models, position="all")
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    diff.save(one)
    diff.with_threshold(0.5).save(other)
    assert one.read_bytes() == other.read_bytes()
    with safe_open(one, "np") as opened:
        about = json.loads(opened.metadata()["lazarus"])
    assert about["tool"].startswith("lazarus ")
    assert (about["position"], about["n_prompts"], about["dtype"]) == ("all", len(TEXTS), "float32")
    assert (about["base"], about["finetuned"]) == (diff.record.base.id, diff.record.finetuned.id)
    assert about["finetuned_layers"] == [0, 1, 2, 3]


def test_models_of_other_depth_have_vectors_of_the_matched_layers(tmp_path: Path) -> None:
    deeper = tiny_llama(num_hidden_layers=6)
    diff = compare((tiny_llama(), deeper))
    diff.save(tmp_path / "shift.safetensors")
    with safe_open(tmp_path / "shift.safetensors", "np") as opened:
        layers = json.loads(opened.metadata()["lazarus"])["finetuned_layers"]
        assert len(opened.keys()) == 4
    assert layers == [r.layer if r.finetuned_layer is None else r.finetuned_layer for r in diff.layers]
    assert layers[-1] == 5


def test_a_layer_without_a_finite_pair_has_no_vector(tmp_path: Path) -> None:
    base = tiny_llama()
    finetuned: Any = perturbed(base, 0.02)
    with torch.no_grad():
        finetuned.model.layers[2].mlp.down_proj.weight[0] = torch.inf
    diff = compare((base, finetuned))
    diff.save(tmp_path / "shift.safetensors")
    assert list(load_file(tmp_path / "shift.safetensors")) == ["resid_post.0", "resid_post.1"]


def test_the_vectors_steer_base_towards_the_fine_tune(tmp_path: Path) -> None:
    """Added to what a block returns, by a hook in plain transformers: KL(fine-tuned‖base) falls."""
    lazarus.activation_diff(BASE, FINETUNED, f"@{PROMPTS}", no_noise_floor=True).save(
        tmp_path / "shift.safetensors"
    )
    vectors = load_file(tmp_path / "shift.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base, finetuned = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (BASE, FINETUNED)
    )
    rows = map(json.loads, PROMPTS.read_text(encoding="utf-8").splitlines())
    texts = [tokenizer(row["prompt"]).input_ids for row in rows]

    def kl() -> float:
        found = []
        for ids in texts:
            p, q = (run_whole(m, ids).logits[0, -1].double().log_softmax(-1) for m in (finetuned, base))
            found.append(float((p.exp() * (p - q)).sum()))
        return float(np.mean(found))

    before, after = kl(), {}
    for layer in (2, 6, 7):
        vector = vectors[f"resid_post.{layer}"]
        handle = base.model.layers[layer].register_forward_hook(lambda _m, _a, out, v=vector: out + v)
        after[layer] = kl()
        handle.remove()
    assert before > 1.3
    assert after[7] < after[6] < after[2] < before
    # The figures of docs/readout.md.
    assert (after[6], after[7]) == pytest.approx((0.74, 0.42), abs=0.01)


def test_a_saved_result_has_no_vectors(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compare(models).save("diff.json")
    with pytest.raises(
        OutputError, match=r"not kept in a saved result. Run the comparison again with -o FILE"
    ):
        lazarus.ActivationDiff.load("diff.json").save("shift.safetensors")
    shown = CliRunner().invoke(app, ["show", "diff.json", "-o", "shift.safetensors", "-o", "rows.csv"])
    assert shown.exit_code == 2
    assert "not kept in a saved result" in shown.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diff.json", "rows.csv"]


def test_models_of_two_widths_have_no_vectors(tmp_path: Path) -> None:
    pair = tiny_llama(), tiny_llama(hidden_size=48)
    diff = compare(pair, [f"t{i} t5" for i in range(50)])
    with pytest.raises(OutputError, match="states of 32 and 48 features have no difference"):
        diff.save(tmp_path / "shift.safetensors")


@pytest.mark.parametrize("command", ["weight-diff", "compare"])
def test_the_siblings_write_no_vectors(command: str, base_folder: Path, tmp_path: Path) -> None:
    models = ["-m1", base_folder, "-m2", base_folder, "-p", "a"] if command == "compare" else None
    models = models or ["-b", base_folder, "-f", base_folder]
    words = ["introspect", command, *map(str, models), "-o", str(tmp_path / "x.safetensors")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert f"{command} writes no .safetensors. Choose one of .json" in " ".join(done.stderr.split())


def test_no_vectors_are_put_into_the_folder_of_a_model(base_folder: Path, finetuned_folder: Path) -> None:
    """There the next one that loads the model would find two sets of weights."""
    words = ["introspect", "activation-diff", "-b", str(base_folder), "-f", str(finetuned_folder), "-p", "a"]
    done = CliRunner().invoke(app, [*words, "-o", str(finetuned_folder / "shift.safetensors")])
    assert done.exit_code == 2
    assert "would be taken for its weights" in " ".join(done.stderr.split())
    assert not (finetuned_folder / "shift.safetensors").exists()
