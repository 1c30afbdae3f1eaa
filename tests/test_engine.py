"""Positions, padding, batches and what the probe learns, on tiny real models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import lazarus
from factories import perturbed, tiny_llama, word_tokenizer
from lazarus.batches import make_batches
from lazarus.engine import learn
from lazarus.errors import BlocksNotFoundError, ShapeMismatchError
from lazarus.models import dissect, wrap_model
from lazarus.tokens import TokenizedPrompt
from reference import block_outputs, cosine

IDS = [[5, 17, 80, 3, 41], [9], [12, 77, 31], [64, 2, 50, 23, 8, 91, 36, 70, 19], [44, 6]]
TEXTS = [" ".join(f"t{i}" for i in ids) for ids in IDS]


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 100, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, bos_token_id=0, eos_token_id=0)).eval()


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 64,
    }
    return BertForMaskedLM(BertConfig(**sizes, num_attention_heads=4, initializer_range=0.2)).eval()


MODELS = {"llama": tiny_llama, "gpt2": gpt2, "bert": bert}


def cosines(
    base: PreTrainedModel, finetuned: PreTrainedModel, texts: list[str], **options: Any
) -> np.ndarray:
    diff = lazarus.activation_diff(base, finetuned, texts, tokenizer=word_tokenizer(), **options)
    return diff.results.column("cosine_similarity")


def expected(base: PreTrainedModel, finetuned: PreTrainedModel, position: str | int) -> np.ndarray:
    """The oracle for a position: each prompt alone, unpadded."""
    rows = []
    for ids in IDS:
        states = [block_outputs(model, dissect(model).blocks, ids) for model in (base, finetuned)]
        first = min(1, len(ids) - 1)
        row = []
        for b, f in zip(*states, strict=True):
            if position == "mean":
                row.append(cosine(b[first:].mean(0, keepdims=True), f[first:].mean(0, keepdims=True))[0])
            elif position == "all":
                row.append(cosine(b[first:], f[first:]).mean())
            else:
                place = -1 if position == "last" else int(position)
                row.append(cosine(b[[place]], f[[place]])[0])
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("position", ["last", "mean", "all", 0, -1])
def test_every_position_equals_the_oracle_in_every_batch_size(name: str, position: str | int) -> None:
    base = MODELS[name]()
    finetuned = perturbed(base)
    wanted = expected(base, finetuned, position)
    for batch_tokens in (1, 7, 20, 10_000):
        found = cosines(base, finetuned, TEXTS, position=position, batch_tokens=batch_tokens)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_any_order_of_prompts_gives_the_same_rows(name: str) -> None:
    base = MODELS[name]()
    finetuned = perturbed(base)
    order = [3, 0, 4, 2, 1]
    found = cosines(base, finetuned, [TEXTS[i] for i in order], position="all")
    np.testing.assert_allclose(
        found, cosines(base, finetuned, TEXTS, position="all")[order], atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_near_float32(name: str) -> None:
    base = MODELS[name]()
    finetuned = perturbed(base)
    single = cosines(base, finetuned, TEXTS)
    half = cosines(base.to(torch.bfloat16), finetuned.to(torch.bfloat16), TEXTS)
    np.testing.assert_allclose(half, single, atol=0.05, rtol=0)


def test_auto_is_last_for_causal_models_and_mean_for_encoders() -> None:
    for name, position in (("llama", "last"), ("gpt2", "last"), ("bert", "mean")):
        model = MODELS[name]()
        diff = lazarus.activation_diff(model, model, TEXTS, tokenizer=word_tokenizer())
        assert diff.record.settings.position == position


def test_layer_norm_models_have_a_centred_cosine_and_others_none() -> None:
    for name, measured in (("llama", False), ("gpt2", True), ("bert", True)):
        base = MODELS[name]()
        diff = lazarus.activation_diff(base, perturbed(base), TEXTS, tokenizer=word_tokenizer())
        assert all((layer.centered_cosine_similarity is not None) == measured for layer in diff.layers)


def test_a_final_norm_is_a_site_only_where_there_is_one() -> None:
    for name, sites in (("llama", ["embedding", "final_norm"]), ("bert", ["embedding"])):
        base = MODELS[name]()
        diff = lazarus.activation_diff(base, perturbed(base), TEXTS, tokenizer=word_tokenizer())
        assert [site.name for site in diff.sites] == sites


def test_only_the_changed_block_and_later_ones_diverge() -> None:
    base = tiny_llama()
    finetuned = tiny_llama()
    with torch.no_grad():
        finetuned.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    diff = lazarus.activation_diff(base, finetuned, TEXTS, tokenizer=word_tokenizer(), position="all")
    assert [layer.divergence == 0.0 for layer in diff.layers] == [True, True, False, False]
    assert diff.sites[0].divergence == 0.0


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    limit=st.integers(1, 100),
    padding=st.sampled_from(["right", "equal_lengths", "one_by_one"]),
)
@settings(max_examples=60, deadline=None)
def test_every_prompt_is_in_one_batch_that_is_not_too_large(
    lengths: list[int], limit: int, padding: Any
) -> None:
    prompts = [TokenizedPrompt(i, [7] * n) for i, n in enumerate(lengths)]
    batches = make_batches(prompts, limit, padding, pad_id=0)
    assert sorted(i for batch in batches for i in batch.prompts) == list(range(len(lengths)))
    for batch in batches:
        input_ids, mask = batch.padded()
        assert input_ids.numel() <= limit or len(batch.prompts) == 1
        assert mask.sum(1).tolist() == batch.lengths
        assert (input_ids == 7 * mask).all()
        assert padding == "right" or len(set(batch.lengths)) == 1
        assert padding != "one_by_one" or len(batch.prompts) == 1


def test_models_of_other_width_are_refused_below_50_prompts() -> None:
    with pytest.raises(
        ShapeMismatchError, match=r"have 32 and 64 features .* from 50 prompts on, and these are 5"
    ):
        cosines(tiny_llama(), tiny_llama(hidden_size=64), TEXTS)


def test_the_probe_finds_the_model_that_padding_changes() -> None:
    """A model that reads its neighbours' padding, as one with expert capacity does, is run more carefully."""
    model = tiny_llama()
    block = model.model.layers[1]
    plain = block.forward

    def leaking(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        leaked: torch.Tensor = plain(states + 0.1 * states.mean((0, 1)), *args, **kwargs)
        return leaked

    block.forward = leaking
    conventions = learn(wrap_model(model, "leaky"), [5, 17, 80, 3, 41, 9, 12], 0)
    assert conventions.padding == "one_by_one"
    diff = lazarus.activation_diff(model, model, TEXTS, tokenizer=word_tokenizer(), position="last")
    assert any("prompts ran one at a time" in note for note in diff.notes)


@pytest.mark.parametrize("name", MODELS)
def test_the_probe_finds_the_model_that_padding_does_not_change(name: str) -> None:
    assert learn(wrap_model(MODELS[name](), name), [5, 17, 80, 3, 41, 9, 12], 0).padding == "right"


def test_blocks_that_do_not_run_are_refused() -> None:
    model = tiny_llama()
    assert dissect(model, "model.layers").blocks == dissect(model).blocks
    model.spare = torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(BlocksNotFoundError, match="block 0 of 1 did not run"):
        learn(wrap_model(model, "m", "spare"), [5, 17], 0)


def test_states_that_are_not_finite_are_left_out_and_named() -> None:
    base = tiny_llama()
    finetuned = tiny_llama()
    with torch.no_grad():
        finetuned.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    diff = lazarus.activation_diff(base, finetuned, TEXTS, tokenizer=word_tokenizer())
    assert [layer.divergence for layer in diff.layers] == [0.0, 0.0, None, None]
    assert any(
        "layer 2 to final_norm" in note and "in 5 of 5 prompts: 0, 1, 2, 3, 4" in note for note in diff.notes
    )
    assert any("first model.layers.2.mlp.down_proj.weight" in note for note in diff.notes)
    assert str(diff).splitlines()[10 + 4].endswith("nan           nan")
    assert diff.summary.most_divergent_layer == 0


def test_a_model_without_one_finite_state_fails() -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(lazarus.LazarusError, match=r"first model\.embed_tokens\.weight"):
        cosines(tiny_llama(), broken, TEXTS)


def test_hooks_are_taken_off_and_the_model_is_as_it_was() -> None:
    model = tiny_llama().train()
    cosines(model, model, TEXTS)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
