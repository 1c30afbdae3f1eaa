"""weight_diff with an adapter on one side of a tie: what the embedding and the LM head compute with.

The oracle is PEFT's forward pass: the embedding of every token, and the LM head of every unit vector.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from factories import save_model, tiny_llama
from layouts import save_adapter
from lazarus import WeightDiff, weight_diff
from lazarus.errors import GateNotMetError
from lazarus.models import Source
from lazarus.models.adapters import put_on, share_storage
from lazarus.notes import Notes

Table = NDArray[np.float64]
NAMES = {"embed": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning")


def lora(*targets: str, **options: Any) -> Callable[[], PeftConfig]:
    return lambda: LoraConfig(r=4, target_modules=list(targets), **options)


PARTED: dict[str, Callable[[], PeftConfig]] = {
    "a LoRA on the embedding": lora("embed_tokens"),
    "a LoRA on the head": lora("lm_head"),
    "a LoRA on each": lora("embed_tokens", "lm_head"),
    "a DoRA on the embedding": lora("embed_tokens", use_dora=True),
    "a head of its own": lora("q_proj", modules_to_save=["lm_head"]),
    "an embedding of its own": lora("q_proj", modules_to_save=["embed_tokens"]),
    "both of their own": lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]),
}
TIED: dict[str, Callable[[], PeftConfig]] = {
    "a LoRA on both": lora("embed_tokens", ensure_weight_tying=True),
    "one table for both": lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "some tokens": lora("q_proj", trainable_token_indices=[45, 70, 3]),
    "some tokens of the embedding": lora("q_proj", trainable_token_indices={"embed_tokens": [45, 70]}),
    "some tokens and nothing else": lambda: TrainableTokensConfig(token_indices=[5, 6]),
}


def computed(base: Path, adapter: Path | None) -> dict[str, Table]:
    """Each table as the forward pass has it, in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double().eval()
        model = model.get_base_model()
    config = model.config
    with torch.no_grad():
        embed = model.model.embed_tokens(torch.arange(config.vocab_size))
        head = model.lm_head(torch.eye(config.hidden_size, dtype=torch.float64)).T
    return {"embed": embed.numpy(), "lm_head": head.numpy()}


def check(diff: WeightDiff, before: dict[str, Table], after: dict[str, Table]) -> None:
    rows = {row.component: row for row in diff.results}
    for component in ("embed", "lm_head"):
        row = rows.get(component, rows["embed"])
        change, norm = np.linalg.norm(after[component] - before[component]), np.linalg.norm(before[component])
        assert row.change_norm == pytest.approx(float(change), rel=1e-9, abs=1e-13 * float(norm)), component
        assert (row.n_changed == 0) == (change < 1e-13 * norm), component


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base", tiny_llama(tie_word_embeddings=True))


@pytest.mark.parametrize("kind", PARTED)
def test_an_adapter_on_one_side_of_a_tie_parts_the_two(kind: str, base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", base, PARTED[kind]())
    diff = weight_diff(base, tmp_path / "adapter")
    assert {"embed", "lm_head"} <= {row.component for row in diff.results}
    check(diff, computed(base, None), computed(base, tmp_path / "adapter"))
    (note,) = (note for note in diff.notes if note.startswith("lm_head is tied"))
    assert "in base and a tensor of its own in fine-tuned" in note
    acts = any("acts on embed and not on lm_head" in note for note in diff.notes)
    assert acts == (kind in ("a LoRA on the embedding", "a DoRA on the embedding", "an embedding of its own"))


@pytest.mark.parametrize("kind", TIED)
def test_an_adapter_that_keeps_a_tie_is_compared_once(kind: str, base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", base, TIED[kind]())
    diff = weight_diff(base, tmp_path / "adapter")
    assert "lm_head" not in {row.component for row in diff.results}
    check(diff, computed(base, None), computed(base, tmp_path / "adapter"))
    assert "lm_head is tied to embed in both: one tensor, compared once" in diff.notes


@pytest.mark.parametrize("saves_table", [False, True])
def test_a_merge_into_a_tied_table_is_not_the_model_with_its_adapter(
    saves_table: bool, base: Path, tmp_path: Path
) -> None:
    """PEFT merges an update of the embedding into the head as well."""
    wrapped: Any = save_adapter(tmp_path / "adapter", base, lora("embed_tokens", "q_proj")())
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=saves_table)
    merged = save_model(tmp_path / "merged", wrapped.merge_and_unload())
    both = f"{base}+{tmp_path / 'adapter'}"
    diff = weight_diff(merged, both)
    check(diff, computed(merged, None), computed(base, tmp_path / "adapter"))
    head = next(row for row in diff.results if row.component == "lm_head")
    assert (head.relative_change or 0) > 0.01
    assert diff.summary.verdict == "changed"
    with pytest.raises(GateNotMetError, match="lm_head"):
        diff.check_gates(fail_above=1e-6)
    with pytest.raises(GateNotMetError, match="changed"):
        diff.check_gates(expect="identical")


def test_a_table_that_comes_with_the_adapter_is_both_tables(base: Path, tmp_path: Path) -> None:
    """PEFT saves the embedding whole when an adapter is on it; on another base, that one counts."""
    wrapped: Any = save_adapter(tmp_path / "adapter", base, lora("embed_tokens")())
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    other = save_model(tmp_path / "other", tiny_llama(seed=9, tie_word_embeddings=True))
    check(
        weight_diff(other, tmp_path / "adapter"),
        computed(other, None),
        computed(other, tmp_path / "adapter"),
    )


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_table_that_comes_with_the_adapter_leaves_the_base_as_it_is(
    target: str, base: Path, tmp_path: Path
) -> None:
    """Both are loaded over the same memory, and a tied table has two names in it."""
    wrapped: Any = save_adapter(tmp_path / "adapter", base, lora(target)())
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    model = tiny_llama(seed=9, tie_word_embeddings=True)
    before = model.lm_head.weight.detach().clone()
    folder = str(tmp_path / "adapter")
    put_on(share_storage(model), Source(folder, "folder", folder), Notes())
    assert torch.equal(model.lm_head.weight, before)


def test_tokens_of_an_untied_model_are_the_embedding_s_alone(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama(tie_word_embeddings=False))
    save_adapter(tmp_path / "adapter", base, lora("q_proj", trainable_token_indices=[45, 70])())
    diff = weight_diff(base, tmp_path / "adapter")
    check(diff, computed(base, None), computed(base, tmp_path / "adapter"))
    rows = {row.component: row for row in diff.results}
    assert rows["embed"].n_changed == 2 * rows["embed"].shape[1]
    assert rows["lm_head"].n_changed == 0


def test_tokens_that_were_trained_to_what_they_were_are_identical(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", base, TrainableTokensConfig(token_indices=[5, 6]))
    table = load_file(base / "model.safetensors")[NAMES["embed"]]
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: table[[5, 6]].clone() for key in load_file(path)}, path)
    assert weight_diff(base, tmp_path / "adapter").summary.verdict == "identical"
