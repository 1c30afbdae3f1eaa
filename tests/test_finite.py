"""States that are not finite: in which model, from where on, and what did it: weights, dtype, computation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import lazarus
from factories import (
    let_head_see_tokens,
    notes_of,
    perturbed,
    save_model,
    tiny_llama,
    tiny_tokenizer,
    word_tokenizer,
)
from lazarus.engine import find_break, learn
from lazarus.engine.head import alike
from lazarus.errors import NoDataError, UnsupportedModelError
from lazarus.models import wrap_model

TEXTS = [f"t{i} t{i + 3} t{i + 7}" for i in range(1, 9)]
IDS = [5, 17, 80, 3, 41, 9, 33, 12]
NAN, INF = float("nan"), float("inf")
OF_STATES = ("not-finite", "states-left-out", "logits-left-out", "output-not-measured")


def gemma(scale: float = 30000.0, **changes: Any) -> Any:
    """A model whose states grow in every block, past what float16 holds, from layer 1 on."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 64,
        "sliding_window": 16,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    model = Gemma3ForCausalLM(Gemma3TextConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.post_feedforward_layernorm.weight.fill_(scale)
    return model


def saved(folder: Path, model: Any) -> str:
    return str(save_model(folder, model, tiny_tokenizer()))


def in_memory(base: Any, finetuned: Any, **options: Any) -> lazarus.ActivationDiff:
    return lazarus.activation_diff(
        base, finetuned, TEXTS, tokenizer=word_tokenizer(), **{"no_noise_floor": True, **options}
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str, str]:
    """Two models that overflow float16, and two of the same configuration that do not."""
    folder = tmp_path_factory.mktemp("finite")
    wide, narrow = gemma(), gemma(1.0)
    return (
        saved(folder / "wide", wide),
        saved(folder / "wide2", perturbed(wide, 0.02)),
        saved(folder / "narrow", narrow),
        saved(folder / "narrow2", perturbed(narrow, 0.02)),
    )


# --- Overflow


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("pair", [(0, 1), (2, 0), (0, 2)])
def test_an_overflow_is_told_of_the_models_that_do(
    pair: tuple[int, int], memory: str, folders: tuple[str, ...]
) -> None:
    base, finetuned = (folders[i] for i in pair)
    diff = lazarus.activation_diff(base, finetuned, ["Hello, how", "What is"], dtype="float16", memory=memory)
    for index, name in zip(pair, (base, finetuned), strict=True):
        told = [note for note in notes_of(diff, "not-finite") if note.startswith(f"{name}: ")]
        expected = (
            f"{name}: its states overflow float16 from layer 1 on: run with --dtype bfloat16 or --dtype "
        )
        assert told == ([f"{expected}float32"] if index < 2 else [])
    broken = [name for index, name in zip(pair, (base, finetuned), strict=True) if index < 2]
    assert (
        f"the logits of {' and '.join(broken)} are not finite: the effect on the output was not measured"
        in diff.notes
    )
    assert not any("no next-token head" in note for note in notes_of(diff, "output-not-measured"))
    assert diff.layers[0].divergence is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_the_note_advises_helps(dtype: str, folders: tuple[str, ...]) -> None:
    base, finetuned = folders[:2]
    diff = lazarus.activation_diff(base, finetuned, ["Hello, how", "What is"], dtype=dtype)
    assert not notes_of(diff, *OF_STATES)
    assert diff.record.output is not None


def test_compare_says_the_same(folders: tuple[str, ...]) -> None:
    record = lazarus.compare(folders[2], folders[0], "Hello, how", dtype="float16").record
    told = notes_of(record, "not-finite")[-1]
    assert told.startswith(f"{folders[0]}: its states overflow float16 from layer 1 on: run with --dtype")
    assert "lens-by-cutting" not in record.note_codes
    assert record.model1.layers[-1].top
    assert not record.model2.layers[-1].top


def test_a_model_in_memory_cannot_be_given_a_dtype() -> None:
    model = gemma().half()
    diff = in_memory(model, model)
    told, other = notes_of(diff, "not-finite")
    assert told.startswith("base (Gemma3ForCausalLM): its")
    assert other.startswith("fine-tuned (Gemma3ForCausalLM): its")
    assert told.endswith("from layer 1 on: load it in bfloat16 or float32")


def test_weights_that_overflow_by_their_dtype_alone_are_told_as_that(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = 1e6
    base, broken = saved(tmp_path / "base", tiny_llama()), saved(tmp_path / "large", model)
    diff = lazarus.activation_diff(base, broken, ["Hello, how", "What is"], dtype="float16")
    assert (
        f"{broken}: 1 weights overflow float16, first model.layers.2.mlp.down_proj.weight, and are stored in "
        "float32: run with --dtype bfloat16 or --dtype float32"
    ) in diff.notes


def test_an_overflow_of_float32_has_no_wider_dtype() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e38)
    diff = in_memory(tiny_llama(), model)
    assert any("overflow float32 from layer 1 on" in note for note in diff.notes)


# --- NaN


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("side", [0, 1])
def test_weights_that_are_not_finite_are_named(value: float, side: int) -> None:
    pair = [tiny_llama(), perturbed(tiny_llama())]
    with torch.no_grad():
        pair[side].model.layers[2].mlp.down_proj.weight[3, 3] = value
    diff = in_memory(*pair)
    assert any(
        note.startswith(
            f"{('base', 'fine-tuned')[side]} (LlamaForCausalLM): 1 weights hold NaN or infinity, first model."
        )
        for note in diff.notes
    )
    assert "not-finite" not in diff.note_codes


def test_weights_that_are_read_block_by_block_are_named_too(tmp_path: Path) -> None:
    model = perturbed(tiny_llama())
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 3] = NAN
    base, broken = saved(tmp_path / "base", tiny_llama()), saved(tmp_path / "broken", model)
    diff = lazarus.activation_diff(base, broken, ["Hello, how", "What is"], memory="stream")
    told = f"{broken}: 1 weights hold NaN or infinity, first model.layers.2.mlp.down_proj.weight"
    assert f"{told}: fetch or train that model again" in diff.notes


def test_nan_that_a_block_makes_of_finite_states_is_placed() -> None:
    """As a softmax does that is given nothing but −∞; a wider dtype would not mend it."""
    model = tiny_llama()
    attention = model.model.layers[1].self_attn

    def nowhere(_module: nn.Module, _args: Any, output: Any) -> Any:
        states = output[0].clone()
        states[:, 1] = torch.full_like(states[:, 1], -INF).softmax(-1)
        return (states, *output[1:])

    attention.register_forward_hook(nowhere)
    diff = in_memory(tiny_llama(), model, position="all")
    [told] = notes_of(diff, "not-finite")
    assert "fine-tuned (LlamaForCausalLM): layer 1 makes NaN of finite states, though all its weights" in told
    assert "at tokens 1 of prompt 0" in told or "at tokens 1, 2 of prompt 0" in told


def test_logits_alone_that_are_not_finite() -> None:
    base, finetuned = tiny_llama(), tiny_llama()
    with torch.no_grad():
        finetuned.lm_head.weight[7] = NAN
    diff = in_memory(base, finetuned)
    name = "fine-tuned (LlamaForCausalLM)"
    told = f"{name}: 1 weights hold NaN or infinity, first lm_head.weight: fetch or train that model again"
    assert told in diff.notes
    assert f"the logits of {name} are not finite: the effect on the output was not measured" in diff.notes


def test_logits_of_some_prompts_that_are_not_finite_are_counted() -> None:
    base = tiny_llama()
    broken = copy.deepcopy(base)
    with torch.no_grad():
        broken.model.embed_tokens.weight[8] = INF  # t8 is in the texts 1, 5 and 8
    diff = in_memory(base, broken)
    assert diff.record.output is not None
    assert "logits that are not finite were left out, in 3 of 8 prompts: 0, 4, 7" in diff.notes


def test_states_that_are_all_zero_are_not_called_an_overflow() -> None:
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(NoDataError, match="all zero"):
        in_memory(model, model)


@pytest.mark.parametrize("side", [0, 1])
def test_a_model_with_nothing_finite_stops_the_run_and_is_named(side: int) -> None:
    pair: list[Any] = [tiny_llama(), tiny_llama()]
    with torch.no_grad():
        pair[side].model.embed_tokens.weight.fill_(NAN)
    with pytest.raises(NoDataError, match=r"1 weights hold NaN or infinity, first model\.embed_tokens"):
        in_memory(*pair)


def test_a_layer_without_finite_states_has_no_readout() -> None:
    model = gemma().half()
    diff = in_memory(model, perturbed(model, 0.02), readout="0,3")
    assert diff.record.readout is not None
    assert [bool(layer.base_promoted) for layer in diff.record.readout] == [True, False]


# --- What the probe concludes


def test_tokens_that_are_not_finite_say_nothing_of_the_model() -> None:
    """The probe's first tokens have no embedding; the next ones do."""
    plain, model = tiny_llama(), tiny_llama()
    unseen = torch.ones(300, dtype=torch.bool).index_fill(0, torch.tensor([2, *IDS[1:]]), False)
    with torch.no_grad():
        model.model.embed_tokens.weight[unseen] = NAN
    ids = [IDS[0]] * 7 + IDS[1:]
    expected, found = (learn(wrap_model(m, "model"), ids, 2) for m in (plain, model))
    assert found == expected


def test_a_model_that_sees_what_follows_is_not_taken_for_causal_where_states_are_not_finite() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    model = BertModel(BertConfig(vocab_size=100, num_attention_heads=4, **sizes)).eval()
    ids = [*IDS, 0, 14]
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[ids] = NAN
    assert not learn(wrap_model(model, "model"), ids, 1).causal


def test_an_error_names_the_tokens_of_the_text_that_ran() -> None:
    model = tiny_llama()

    def nowhere(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (torch.full_like(output[0], -INF).softmax(-1), *output[1:])

    model.model.layers[0].self_attn.register_forward_hook(nowhere)
    with pytest.raises(
        NoDataError, match=r"makes NaN of finite states.* at tokens 0, 1, 2, 3, 4, 5, 6 of the"
    ):
        learn(wrap_model(model, "model"), IDS, 2)


def test_the_head_of_a_model_that_overflows_is_checked_on_other_states() -> None:
    plain = learn(wrap_model(gemma(), "model"), IDS, 2)
    model = wrap_model(gemma().half(), "model")
    drawn = torch.get_rng_state()
    known = learn(model, IDS, 2)
    assert known.head_reads is plain.head_reads is not None
    assert torch.equal(torch.get_rng_state(), drawn)  # none of the user's random numbers was taken


def test_a_head_that_looks_at_the_tokens_is_found_out_though_no_logit_is_finite() -> None:
    model = gemma().half()
    let_head_see_tokens(model)
    assert learn(wrap_model(model, "model"), IDS, 2).head_reads is None


def test_a_head_that_gives_nothing_finite_is_not_called_none() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(NAN)
    known = learn(wrap_model(model, "model"), IDS, 2)
    assert known.head_reads is None
    assert known.why_no_head == "the logits of model are not finite, so its head could not be checked"
    diff = in_memory(model, model)
    assert not any("no next-token head" in note for note in notes_of(diff, "output-not-measured"))
    with pytest.raises(UnsupportedModelError, match="are not finite, so its head could not be checked"):
        in_memory(model, model, readout="auto")


def test_padding_that_could_not_be_seen_is_not_trusted() -> None:
    """The blocks are of two kinds, and after the first of the second kind nothing is finite."""
    model = tiny_llama()
    model.model.layers[3].mlp.act_fn = nn.GELU()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(NAN)
    diff = in_memory(model, model)
    assert any(
        note.startswith("too few states were finite to see whether padding changes them, so prompts ran one")
        for note in diff.notes
    )


def test_a_first_state_of_zero_is_not_like_any_other() -> None:
    from lazarus.engine.probe import _alike

    zero, other = torch.zeros(2, 4), torch.ones(2, 4)
    assert _alike(zero, zero, 1e-3) is True
    assert _alike(other, zero, 1e-3) is False
    assert _alike(other, other * NAN, 1e-3) is None
    assert _alike(torch.cat([other, other * NAN]), torch.cat([other, other]), 1e-3) is True


def test_each_row_is_held_against_its_own_size() -> None:
    from lazarus.engine.probe import _alike

    rows = torch.tensor([[1e6, 0.0], [0.0, 1.0]])
    assert _alike(rows, rows, 1e-3) is True
    assert _alike(rows + torch.tensor([[0.0, 0.0], [0.0, 0.5]]), rows, 1e-3) is False
    # A row that is finite in part says nothing of the others.
    assert _alike(torch.tensor([[1e6, NAN], [0.0, 1.0]]), rows, 1e-3) is True


def test_logits_are_alike_by_what_is_finite() -> None:
    eps, row = 1e-7, torch.tensor([[1.0, -INF, NAN, 2.0]])
    assert alike(row, row, eps) is True
    assert alike(torch.tensor([[1.0, -INF, NAN, NAN]]), row, eps) is False
    assert alike(row * NAN, row * NAN, eps) is None


@pytest.mark.parametrize(
    ("off", "eps", "same"),
    [(0.09, 1e-7, True), (0.11, 1e-7, False), (6.0, 2**-7, True), (6.5, 2**-7, False)],
)
def test_logits_are_alike_to_a_thousandth_of_the_largest_or_eight_roundings(
    off: float, eps: float, same: bool
) -> None:
    """The limit of a logit of 0 beside one of 100; for the largest itself it is twice that."""
    expected = torch.tensor([[100.0, 0.0]])
    assert alike(expected + torch.tensor([[0.0, off]]), expected, eps) is same
    assert alike(expected + torch.tensor([[2 * off, 0.0]]), expected, eps) is same


def test_a_text_of_finite_states_has_no_break() -> None:
    model = wrap_model(tiny_llama(), "model")
    known = learn(model, IDS, 2)
    assert find_break(model, IDS, known.axes[1], known.head_reads) is None


def test_looking_for_a_break_leaves_the_model_as_it_was() -> None:
    model = gemma().half()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = wrap_model(model, "model")
    found = find_break(wrapped, IDS, 1)
    assert found is not None
    assert (found.site, found.in_wider) == (1, "finite")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
