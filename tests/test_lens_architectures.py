"""The logit lens on every causal architecture of transformers: the last layer must be the own logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from architectures import CAUSAL, REFUSED, UNBUILDABLE, WITHOUT_HEAD, build, swept
from factories import tiny_llama, word_tokenizer
from lazarus.engine import learn
from lazarus.errors import UnsupportedModelError
from lazarus.lens import compare
from lazarus.lens.reading import read_layers
from lazarus.models import wrap_model
from lazarus.notes import Notes
from reference import block_outputs, run_whole

IDS = [64, 27, 50, 23, 8, 91, 36, 70, 19]
UNREADABLE = {"inkling2_loop_text"}
READ = [name for name in CAUSAL if name not in {*UNBUILDABLE, *REFUSED, *WITHOUT_HEAD, *UNREADABLE}]
Floats = NDArray[np.float64]


def read(model: PreTrainedModel, ids: list[int] = IDS) -> torch.Tensor:
    wrapped = wrap_model(model, "the model")
    return read_layers(wrapped, learn(wrapped, ids, 100), ids, lambda _: None, Notes())


@pytest.mark.parametrize("name", swept(READ))
def test_the_last_layer_is_the_models_own_next_token(name: str) -> None:
    model = build(name)
    found = read(model)
    own = run_whole(model, IDS).logits[0, -1]
    assert found[-1].shape == own.shape
    assert (found[-1] - own).abs().max() <= 1e-5 * max(1.0, float(own.abs().max()))
    assert not torch.allclose(found[0], found[-1], rtol=1e-3)


def test_loops_of_blocks_that_are_mixed_at_the_end_are_refused() -> None:
    model = build("inkling2_loop_text")
    before = run_whole(model, IDS).logits
    with pytest.raises(UnsupportedModelError, match=r"the model: Inkling2Loop.*cannot be cut.*compare other"):
        read(model)
    assert torch.equal(run_whole(model, IDS).logits, before)


def inkling(n_layers: int, blocks_a_bank: int) -> PreTrainedModel:
    """Inkling 2 with so many of four layers, and a state kept for its end after every `blocks_a_bank`."""
    like = build("inkling2_text")
    settings = {
        **like.config.to_dict(),
        "num_hidden_layers": n_layers,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"][:n_layers],
        "n_layers_per_attn_res_block": blocks_a_bank,
    }
    return type(like)(type(like.config)(**settings)).float().eval()


@pytest.mark.parametrize("blocks_a_bank", [1, 2])
def test_where_the_end_mixes_in_earlier_blocks_each_layer_is_a_shorter_model(blocks_a_bank: int) -> None:
    """The oracle has so many layers by its configuration, and the weights that it shares with the whole."""
    model = inkling(4, blocks_a_bank)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=random)
    before = run_whole(model, IDS).logits
    told: list[int] = []
    wrapped = wrap_model(model, "the model")
    found = read_layers(wrapped, learn(wrapped, IDS, 100), IDS, told.append, notes := Notes())
    assert told == [1, 1, 1, 1]
    assert notes.texts == [
        "the model: its end reads earlier blocks too: each layer is the model cut after that block"
    ]
    for layer in range(4):
        shorter = inkling(layer + 1, blocks_a_bank)
        weights = shorter.state_dict()
        shorter.load_state_dict({k: v for k, v in model.state_dict().items() if k in weights})
        own = run_whole(shorter, IDS).logits[0, -1]
        assert torch.allclose(found[layer], own, rtol=1e-5, atol=1e-5)
        assert layer == 3 or not torch.allclose(found[layer], before[0, -1], rtol=1e-2)
    assert torch.equal(run_whole(model, IDS).logits, before)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert:masked", r"BertForMaskedLM lets tokens see those after them"),
        ("xlnet", r"XLNetLMHeadModel lets tokens see those after them"),
        ("t5:seq2seq", r"T5ForConditionalGeneration is an encoder-decoder"),
        ("bart:seq2seq", r"BartForConditionalGeneration is an encoder-decoder"),
    ],
)
def test_a_model_that_predicts_no_next_token_is_refused(name: str, reason: str) -> None:
    model = build(name)
    with pytest.raises(UnsupportedModelError, match=f"{reason}.*Compare causal language models"):
        compare(model, model, "t5 t17 t80", tokenizer=word_tokenizer())


def test_a_stack_without_its_head_is_refused() -> None:
    model = build("llama").base_model
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no next-token head"):
        compare(model, model, "t5 t17 t80", tokenizer=word_tokenizer())


# The oracle: every step after the last block written out for the family, in float64.


def states_after_blocks(model: PreTrainedModel, blocks: Any) -> list[Floats]:
    """What leaves each block at the last token, [hidden]."""
    return [states[-1] for states in block_outputs(model, list(blocks), IDS)]


def rms_norm(x: Floats, weight: torch.Tensor, eps: float, *, plus_one: bool = False) -> Floats:
    w = weight.detach().double().numpy() + (1.0 if plus_one else 0.0)
    scaled: Floats = x / np.sqrt((x**2).mean() + eps) * w
    return scaled


def layer_norm(x: Floats, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> Floats:
    centred = x - x.mean()
    normed: Floats = centred / np.sqrt((centred**2).mean() + eps) * weight.detach().double().numpy()
    return normed if bias is None else normed + bias.detach().double().numpy()


def by_hand(name: str, model: Any) -> list[Floats]:
    """Final norm → unembedding → cap or scale, of each block's output, as the family's papers have it."""
    config, stack = model.config, model.base_model
    head = model.lm_head.weight.detach().double().numpy()
    logits = []
    for x in states_after_blocks(model, stack.h if name == "gpt2" else stack.layers):
        if name == "gpt2":
            row = head @ layer_norm(x, stack.ln_f.weight, stack.ln_f.bias, config.layer_norm_epsilon)
        elif name == "cohere":
            row = head @ layer_norm(x, stack.norm.weight, None, config.layer_norm_eps) * config.logit_scale
        elif name == "gemma2":
            cap = config.final_logit_softcapping
            raw = head @ rms_norm(x, stack.norm.weight, config.rms_norm_eps, plus_one=True)
            row = cap * np.tanh(raw / cap)
        else:
            row = head @ rms_norm(x, stack.norm.weight, config.rms_norm_eps)
            row = row / config.logits_scaling if name == "granite" else row
        logits.append(row)
    return logits


SETTINGS: dict[str, dict[str, float]] = {
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gpt2": {},
    "granite": {"logits_scaling": 4.0},
    "llama": {},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_layer_equals_the_norm_and_the_head_by_hand(name: str, tied: bool) -> None:
    model = build(name)
    for setting, value in SETTINGS[name].items():
        setattr(model.config, setting, value)
        if hasattr(model, setting):
            setattr(model, setting, value)
    table = model.get_input_embeddings().weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(table if tied else torch.randn_like(table))
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    found, expected = read(model).double().numpy(), np.stack(by_hand(name, model))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    assert np.abs(found[0] - found[-1]).max() > 1e-2


def test_parallel_streams_are_each_read_through_what_joins_them() -> None:
    """Gemma 3n: the last block's streams replaced in a whole pass on the real prompt give the same logits."""
    model = build("gemma3n_text")
    found = read(model)
    blocks = list(model.base_model.layers)
    seen: list[torch.Tensor] = []
    handles = [b.register_forward_hook(lambda _m, _a, out: seen.append(out.clone())) for b in blocks]
    run_whole(model, IDS)
    for handle in handles:
        handle.remove()
    assert seen[0].shape == (4, 1, len(IDS), 32)
    for layer, states in enumerate(seen):
        handle = blocks[-1].register_forward_hook(lambda _m, _a, _out, states=states: states)
        logits = run_whole(model, IDS).logits[0, -1]
        handle.remove()
        assert torch.allclose(found[layer], logits, rtol=1e-5, atol=1e-5)


def test_more_layers_than_tokens_of_context_are_read_in_parts() -> None:
    model = tiny_llama(num_hidden_layers=7, max_position_embeddings=3)
    told: list[int] = []
    wrapped = wrap_model(model, "the model")
    ids = IDS[:3]
    found = read_layers(wrapped, learn(wrapped, ids, 2), ids, told.append, Notes())
    assert told == [1, 3, 3]
    whole = tiny_llama(num_hidden_layers=7)
    assert torch.allclose(found, read(whole, ids), rtol=1e-5, atol=1e-5)
