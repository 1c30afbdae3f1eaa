"""A prefix that all prompts have in common runs once, and every number is what it would be without that."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache
from typer.testing import CliRunner

import lazarus
from architectures import CAUSAL, REFUSED, UNBUILDABLE, build, swept
from factories import TEMPLATE, notes_of, perturbed, tiny_llama, word_tokenizer
from layouts import save_adapter
from lazarus.batches import BatchPair, make_batches
from lazarus.cli import app
from lazarus.engine import (
    ModelPair,
    PrefixPlan,
    common_prefix,
    learn_pair,
    run_pairs,
    share_prefix,
)
from lazarus.metrics import relative_l2
from lazarus.models import dissect, wrap_model
from lazarus.notes import Notes
from lazarus.sites import Position
from lazarus.tokens import TokenizedPrompt

PREFIX = [5, 17, 80, 3, 41, 9, 33, 12, 77, 31, 64, 27, 50, 23, 8, 91, 36, 70]
LENGTHS = (2, 5, 3, 9, 2, 4, 7, 6, 3, 8, 2, 5, 4, 3, 6, 2)
ONCE = "the first 18 tokens, the same in all prompts, ran once"
ROUNDING = 1e-5

_REASONS: dict[str, str] = {
    "does not go on from a cache of keys and values": (
        "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid inkling2_loop_text inkling2_text "
        "inkling_text jamba kimi_linear lara_mini lfm2 lfm2_moe lfm3 mamba mamba2 megatron-bert minimax "
        "minimax_m3_vl_text musicgen musicgen_melody nemotron_h olmo_hybrid openai-gpt qwen3_5 "
        "qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma "
        "rembert roc_bert rwkv xlstm zamba zamba2 zaya"
    ),
    "prompts of several lengths cannot run together": (
        "axk2 deepseek_v32 deepseek_v4 dots3_note dots3_note_text glm_moe_dsa hy_v4"
    ),
    "differed by": "moshi",
    "not read from left to right alone": "xlnet",
}
WITHOUT = {name: reason for reason, names in _REASONS.items() for name in names.split()}
"""Causal architectures on which no prefix is shared, and a part of the reason that the user reads."""


def ids_after(prefix: Sequence[int], lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts that begin with the prefix, each with its own end of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [[*prefix, *torch.randint(1, 95, (n,), generator=generator).tolist()] for n in lengths]


def tokenized(ids: Sequence[Sequence[int]]) -> list[TokenizedPrompt]:
    return [TokenizedPrompt(index, found) for index, found in enumerate(ids)]


def texts(ids: Sequence[Sequence[int]]) -> list[str]:
    return [" ".join(f"t{i}" for i in found) for found in ids]


PROMPTS = tokenized(ids_after(PREFIX, LENGTHS))
TEXTS = texts(ids_after(PREFIX, LENGTHS))
STRANGER = " ".join(f"t{i}" for i in range(60, 80))
"""A prompt that begins otherwise: with it among them, prompts have no prefix in common."""


def llama() -> PreTrainedModel:
    return tiny_llama(vocab_size=100)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=64)).eval()


def gemma3() -> PreTrainedModel:
    """Every second layer sees no further than six tokens back."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=64,
    )
    return Gemma3ForCausalLM(config).eval()


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config).eval()


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "gpt2": gpt2,
    "gemma3": gemma3,
    "mixtral": mixtral,
}


def compare(base: Any, finetuned: Any, prompts: Sequence[str], **options: Any) -> lazarus.ActivationDiff:
    return lazarus.activation_diff(base, finetuned, prompts, tokenizer=word_tokenizer(), **options)


def assert_same(shared: lazarus.ActivationDiff, whole: lazarus.ActivationDiff) -> None:
    """Every number of every prompt of the one is the other's, but for rounding."""
    n_prompts = len(shared.record.prompts)
    for metric in ("relative_l2", "norm_ratio", "divergence"):
        ours, theirs = shared.results.column(metric), whole.results.column(metric)[:n_prompts]
        assert np.abs(ours - theirs).max() <= ROUNDING * np.abs(theirs).max()


def learned(base: PreTrainedModel, finetuned: PreTrainedModel) -> ModelPair:
    models = wrap_model(base, "base"), wrap_model(finetuned, "finetuned")
    return learn_pair(*models, (PROMPTS[0].ids, PROMPTS[0].ids), (0, 0))


def share(pair: ModelPair, **changes: Any) -> tuple[int, list[str]]:
    """How many first tokens run once, and what is noted."""
    plan = replace(PrefixPlan("last", 512, 0), **changes)
    return share_prefix(pair, PROMPTS, plan, notes := Notes()), notes.texts


# --- Which prefix


@pytest.mark.parametrize(
    ("prompts", "leave", "expected"),
    [
        ([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4, 5]], 1, 3),
        ([[1, 2, 3, 4], [1, 2, 9, 4]], 1, 2),
        ([[1, 2, 3], [2, 2, 3]], 1, 0),
        ([[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 5]], 1, 2),
        ([[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 5]], 2, 1),
        ([[1], [1, 2]], 1, 0),
        ([[1], [1, 2]], 3, 0),
        ([[7, 8, 9]], 1, 2),
        ([], 1, 0),
    ],
)
def test_the_prefix_is_what_all_begin_with_and_leaves_each_a_token(
    prompts: list[list[int]], leave: int, expected: int
) -> None:
    assert common_prefix(tokenized(prompts), leave) == expected


@pytest.mark.parametrize(
    "ids",
    [
        ids_after([], LENGTHS),
        ids_after(PREFIX[:15], LENGTHS),
        ids_after(PREFIX, LENGTHS[:6]),
        ids_after(PREFIX, [n * 10 for n in LENGTHS]),
        ids_after(PREFIX, LENGTHS[:1]),
        ids_after(PREFIX, [2]) * 20,
    ],
    ids=["none", "short", "few prompts", "long prompts", "one prompt", "one prompt many times"],
)
def test_a_prefix_that_saves_little_runs_with_every_prompt_without_a_word(ids: list[list[int]]) -> None:
    pair = learned(llama(), llama())
    assert share_prefix(pair, tokenized(ids), PrefixPlan("last", 512, 0), notes := Notes()) == 0
    assert notes.texts == []


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    """Two models that nothing is changed in."""
    return learned(llama(), llama())


def told(pair: ModelPair, prompts: Sequence[TokenizedPrompt], position: Position = "last") -> list[str]:
    """What is noted where something else needs every prompt whole: then no model runs."""
    plan = PrefixPlan(position, 512, 0, obstacle="for a reason")
    notes = Notes()
    assert share_prefix(pair, prompts, plan, notes) == 0
    return notes.texts


@pytest.mark.parametrize(("position", "n_tokens"), [("last", 17), (0, 17), (5, 17), (-1, 17), (-2, 16)])
def test_a_prompt_that_is_the_prefix_keeps_a_token_and_all_that_a_negative_index_may_ask_for(
    position: Position, n_tokens: int, pair: ModelPair
) -> None:
    prompts = tokenized([*ids_after(PREFIX, LENGTHS), PREFIX])
    [note] = told(pair, prompts, position)
    assert note == (
        f"the first {n_tokens} tokens, the same in all prompts, ran with each of them: for a reason"
    )


def test_a_prefix_runs_once_where_that_saves_a_quarter_net_of_the_check(pair: ModelPair) -> None:
    """Of 16 × 24 tokens 15 × 16 are left out, and 16 + 4 × (24 + 8) run in the check: 96 is a quarter."""
    ids = ids_after(PREFIX[:16], [8] * 16)
    assert len(told(pair, tokenized(ids))) == 1
    assert told(pair, tokenized([*ids[1:], [*ids[0], 7]])) == []


# --- Every number is the same


@pytest.mark.parametrize("position", ["last", "mean", "all", 0, 5, 17, -2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_position_gives_what_whole_prompts_give(family: str, position: Position) -> None:
    base = FAMILIES[family]()
    finetuned = perturbed(base)
    options: dict[str, Any] = {"position": position, "batch_tokens": 40}
    shared = compare(base, finetuned, TEXTS, **options)
    whole = compare(base, finetuned, [*TEXTS, STRANGER], **options)
    assert ONCE in shared.notes
    assert not any("ran once" in note for note in whole.notes)
    assert_same(shared, whole)


def test_a_token_after_the_prefix_is_found_by_its_index_in_the_prompt() -> None:
    base, finetuned = llama(), perturbed(llama())
    shared = compare(base, finetuned, TEXTS, position=19)
    assert ONCE in shared.notes
    assert_same(shared, compare(base, finetuned, [*TEXTS, " ".join(["t60"] * 20)], position=19))


def test_a_negative_index_never_reads_the_prefix() -> None:
    """The shortest prompts have two tokens of their own, so the last one that is common stays with them."""
    base, finetuned = llama(), perturbed(llama())
    shared = compare(base, finetuned, TEXTS, position=-3)
    assert "the first 17 tokens, the same in all prompts, ran once" in shared.notes
    assert_same(shared, compare(base, finetuned, [*TEXTS, STRANGER], position=-3))


def test_a_prompt_may_be_the_prefix_and_nothing_more() -> None:
    base, finetuned = llama(), perturbed(llama())
    prompts = [*TEXTS, " ".join(f"t{i}" for i in PREFIX)]
    shared = compare(base, finetuned, prompts)
    assert "the first 17 tokens, the same in all prompts, ran once" in shared.notes
    assert_same(shared, compare(base, finetuned, [*prompts, STRANGER]))


@pytest.mark.parametrize("position", ["last", "mean"])
def test_the_output_is_the_same_too(position: Position) -> None:
    """Of a mean over prompts, the prompt that begins otherwise is taken out again."""
    base, finetuned = llama(), perturbed(llama())
    shared, whole, alone = (
        divergence_of_output(compare(base, finetuned, prompts, position=position, no_noise_floor=True))
        for prompts in (TEXTS, [*TEXTS, STRANGER], [STRANGER])
    )
    n = len(TEXTS)
    assert shared == pytest.approx((whole * (n + 1) - alone) / n, rel=1e-4)


def divergence_of_output(diff: lazarus.ActivationDiff) -> float:
    assert diff.record.output is not None
    assert diff.record.output.kl_base_finetuned is not None
    return diff.record.output.kl_base_finetuned


def test_blocks_that_are_the_same_in_both_still_run_once() -> None:
    base = llama()
    finetuned = copy.deepcopy(base, {id(p): p for p in base.model.layers[:-1].parameters()})
    with torch.no_grad():
        finetuned.model.layers[-1].mlp.down_proj.weight.mul_(1.5)
    shared = compare(base, finetuned, TEXTS, position="mean", batch_tokens=40)
    assert ONCE in shared.notes
    assert any("ran once for both" in note for note in shared.notes)
    assert (shared.results.column("relative_l2")[:, :-1] == 0).all()
    assert_same(shared, compare(base, finetuned, [*TEXTS, STRANGER], position="mean", batch_tokens=40))


def over(base: PreTrainedModel, n_common: int) -> Any:
    """A second model with the weights of base's first blocks, and a last block of its own."""
    blocks = dissect(base).blocks[:n_common]
    finetuned: Any = copy.deepcopy(base, {id(p): p for block in blocks for p in block.parameters()})
    with torch.no_grad():
        for parameter in dissect(finetuned).blocks[-1].parameters():
            parameter.mul_(1.5)
    return finetuned


ALONE = next(i for i in PREFIX[1:4] if all(i not in prompt.ids[len(PREFIX) :] for prompt in PROMPTS))
"""A token among the first of the prefix that no prompt has after it."""


def with_row(model: PreTrainedModel, row: torch.Tensor) -> None:
    """Give a model an embedding of its own, with another row for this token."""
    rows = model.get_input_embeddings().weight.detach().clone()
    rows[ALONE] = row.detach()
    model.get_input_embeddings().weight = torch.nn.Parameter(rows)


def rows_alone(model: PreTrainedModel, position: Position) -> np.ndarray[Any, Any]:
    """Each prompt by itself through transformers: its state after every block, [prompts, layers, hidden]."""
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            output = model(torch.tensor([prompt.ids]), output_hidden_states=True, use_cache=False)
        layers = torch.stack(output.hidden_states[1:-1])[:, 0].double()
        found.append(layers.mean(1) if position == "mean" else layers[:, -1 if position == "last" else 3])
    return torch.stack(found).numpy()


@pytest.mark.parametrize("position", ["last", "mean", 3])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_token_of_the_prefix_with_another_embedding_reaches_all_that_follows(
    family: str, position: Position
) -> None:
    """The blocks are the same, and each batch calls them alike, but the caches of the prefix differ."""
    base = FAMILIES[family]()
    finetuned = over(base, len(dissect(base).blocks) - 1)
    with_row(finetuned, base.get_input_embeddings().weight[ALONE] + 0.5)
    diff = compare(base, finetuned, TEXTS, position=position, no_noise_floor=True)
    assert ONCE in diff.notes
    b, f = rows_alone(base, position), rows_alone(finetuned, position)
    expected = np.linalg.norm(f - b, axis=-1) / np.linalg.norm(b, axis=-1)
    found = diff.results.column("relative_l2")[:, : expected.shape[1]]
    assert expected[:, -1].min() > 0
    if position != "mean":  # the relative L2 of a mean over tokens is not the mean of theirs
        assert np.abs(found - expected).max() <= ROUNDING * expected.max()
    assert_same(diff, compare(base, finetuned, [*TEXTS, STRANGER], position=position, no_noise_floor=True))


@pytest.mark.parametrize("position", ["last", "mean", PREFIX.index(ALONE)])
def test_the_same_keys_and_values_may_come_of_other_states(position: Position) -> None:
    """A norm takes the length of a state away: twice an embedding has the same keys and values."""
    base: Any = llama()
    with torch.no_grad():
        base.model.embed_tokens.weight[base.config.pad_token_id] = 1.0  # no row of zeros, which has no norm
    for block in base.model.layers:
        block.input_layernorm.variance_epsilon = 0.0
    finetuned = over(base, 1)
    with_row(finetuned, base.get_input_embeddings().weight[ALONE] * 2)
    pair = learned(base, finetuned)
    assert pair.n_common == 1
    shared, whole = (states(pair, n, position) for n in (len(PREFIX), 0))
    for one, other in zip(shared, whole, strict=True):
        assert relative_l2(one, other).max() <= ROUNDING
    at_embedding, after_first = (float(relative_l2(*whole[i : i + 2]).max()) for i in (0, 2))
    assert [at_embedding > 0.01, after_first > 0.01] == [position != "last"] * 2


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3n"])
def test_blocks_go_on_from_the_other_models_cache_where_both_are_the_same(family: str) -> None:
    """They run in the prefix, whose cache is each model's own, and in no batch that goes on from it.

    Gemma 3n's last blocks read the keys that earlier ones have written into the cache.
    """
    base = build("gemma3n_text") if family == "gemma3n" else FAMILIES[family]()
    n_blocks = len(dissect(base).blocks)
    finetuned = over(base, n_blocks - 1)
    pair = learned(base, finetuned)
    assert pair.n_common == n_blocks - 1
    ran: list[int] = []
    for index, block in enumerate(dissect(finetuned).blocks):
        mlp = block.get_submodule("mlp")
        mlp.register_forward_hook(lambda _m, _a, _o, index=index: ran.append(index))
    shared = states(pair, len(PREFIX), "all")
    assert ran == [*range(n_blocks), n_blocks - 1]
    ran.clear()
    apart = replace(pair, n_common=0, same_blocks=(False,) * n_blocks)
    for one, other in zip(shared, states(apart, len(PREFIX), "all"), strict=True):
        assert torch.equal(one, other)
    assert ran == [*range(n_blocks)] * 2


def has_past(arguments: Mapping[str, Any]) -> bool:
    caches = [value for value in arguments.values() if isinstance(value, DynamicCache)]
    return any(cache.get_seq_length() >= len(PREFIX) for cache in caches)


@pytest.mark.parametrize(
    ("factor", "reason"),
    [(float("nan"), "states are not finite"), (1.5, "differed by 0.")],
    ids=["NaN", "1.5"],
)
def test_what_is_not_finite_in_one_way_alone_is_not_the_same(factor: float, reason: str) -> None:
    """A block that goes wrong as soon as there is a cache that it goes on from."""
    base: Any = llama()

    def hook(_module: Any, _args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        return output * factor if has_past(kwargs) else output

    base.model.layers[2].register_forward_hook(hook, with_kwargs=True)
    _, [note] = share(learned(base, base))
    assert "ran with each of them" in note
    assert reason in note


def test_a_row_of_zeros_in_one_way_alone_is_not_the_same() -> None:
    base: Any = llama()

    def hook(_module: Any, _args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        return output if has_past(kwargs) else output * 0

    base.model.layers[3].register_forward_hook(hook, with_kwargs=True)
    _, [note] = share(learned(base, base))
    assert "differed by inf of their norm" in note


def change(
    model: Any, change: Callable[[torch.Tensor], torch.Tensor], module: str = "norm", passes: str = "cached"
) -> None:
    """Change what a module gives in the passes that go on from a cache, or in those of whole prompts."""
    kind = ""

    def entered(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal kind
        lengths = [value.get_seq_length() for value in kwargs.values() if isinstance(value, DynamicCache)]
        kind = "whole" if not lengths else "cached" if lengths[0] else "prefix"

    model.model.layers[0].register_forward_pre_hook(entered, with_kwargs=True)
    changed = model.model.get_submodule(module)
    changed.register_forward_hook(lambda _m, _a, output: change(output) if kind == passes else None)


def with_last(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set one number of the last token of the longest prompt, which is the first of its batch."""

    def changed(states: torch.Tensor) -> torch.Tensor:
        states = states.clone()
        states[0, -1, 0] = value
        return states

    return changed


@pytest.mark.parametrize("passes", ["cached", "whole"])
def test_one_number_that_is_not_finite_is_enough(passes: str) -> None:
    base = llama()
    found = learned(base, base)
    change(base, with_last(float("nan")), "layers.2", passes)
    n_tokens, [note] = share(found)
    assert n_tokens == 0
    assert "states are not finite" in note


def test_one_number_that_differs_is_enough_beside_states_of_zero() -> None:
    """Those have no norm, and are the same in both ways."""
    base: Any = llama()
    found = learned(base, base)

    def zero(_module: Any, _args: Any, states: torch.Tensor) -> torch.Tensor:
        last_but_one = torch.tensor([states.shape[1] - 2])
        is_prefix = states.shape[1] == len(PREFIX)
        return states if is_prefix else states.index_fill(1, last_but_one, 0.0)

    base.model.norm.register_forward_hook(zero)
    assert share(found, position="all")[0] == len(PREFIX)
    change(base, with_last(9.0))
    _, [note] = share(found, position="all")
    assert "states that went on from a cache of them differed by" in note


@pytest.mark.parametrize(
    ("dtype", "factor", "expected"),
    [
        (torch.float32, 1.0009, 18),
        (torch.float32, 1.0011, 0),
        (torch.bfloat16, 1.121, 18),
        (torch.bfloat16, 1.129, 0),
    ],
    ids=str,
)
def test_states_may_be_a_thousandth_apart_or_16_steps_of_the_type(
    dtype: torch.dtype, factor: float, expected: int
) -> None:
    """One of 1000 in float32; in bfloat16, whose step is 1/128, one of 8."""
    base = llama().to(dtype)
    found = learned(base, base)
    change(base, lambda states: (states.double() * factor).to(dtype))
    assert share(found)[0] == expected


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_either_model_may_go_on_wrongly(side: str) -> None:
    models = {"base": llama(), "finetuned": llama()}
    found = learned(**models)
    change(models[side], lambda states: states * 1.5)
    _, [note] = share(found)
    assert "differed by 0.5 of their norm" in note


def test_a_fault_that_only_the_longest_prompt_shows_is_found() -> None:
    base = llama()
    found = learned(base, base)
    change(base, lambda states: states * (1.5 if states.shape[1] == max(LENGTHS) else 1))
    assert share(found)[0] == 0


def test_prompts_of_several_lengths_go_on_together_in_the_check_as_in_the_run() -> None:
    base = llama()
    found = learned(base, base)
    change(base, lambda states: states * (1.5 if states.shape[0] > 1 else 1))
    assert share(found)[0] == 0


def test_logits_are_not_compared() -> None:
    base: Any = llama()
    found = learned(base, base)
    with torch.no_grad():
        base.lm_head.weight[3] = torch.inf
    assert share(found) == (len(PREFIX), [ONCE])


def test_an_operator_that_is_missing_with_a_cache_alone_is_no_fault_of_the_run() -> None:
    base = llama()
    found = learned(base, base)

    def fail(_states: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("\"triu_tril\" not implemented for 'Float'")

    change(base, fail)
    n_tokens, [note] = share(found)
    assert n_tokens == 0
    assert "ran with each of them: going on from a cache of them failed: base, on a batch" in note
    assert "\"triu_tril\" not implemented for 'Float'" in note


def test_an_adapter_on_the_weights_of_its_base(tmp_path: Path, base_folder: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    save_adapter(tmp_path / "adapter", base_folder, config)
    system = "Hello, how are you? What is AI? "
    prompts = [f"{system}Calculate {i} + {7 * i}." for i in range(16)]
    shared = lazarus.activation_diff(base_folder, tmp_path / "adapter", prompts)
    whole = lazarus.activation_diff(base_folder, tmp_path / "adapter", [*prompts, "Paris."])
    assert any("ran once" in note for note in shared.notes)
    assert shared.results.column("relative_l2").max() > 0
    assert_same(shared, whole)


def test_in_bfloat16_both_ways_agree_within_its_noise() -> None:
    base = llama().to(torch.bfloat16)
    finetuned = perturbed(base)
    shared, whole = (
        compare(base, finetuned, prompts, position="mean") for prompts in (TEXTS, [*TEXTS, STRANGER])
    )
    assert ONCE in shared.notes
    ours, theirs = (diff.results.column("relative_l2")[: len(TEXTS)] for diff in (shared, whole))
    assert np.abs(ours - theirs).max() < 0.05 * theirs.max()


# --- Noise


@pytest.mark.parametrize("position", ["last", "mean", "all", 3])
def test_a_model_against_itself_is_exactly_nothing(position: Position) -> None:
    base = llama()
    diff = compare(base, copy.deepcopy(base), TEXTS, position=position)
    assert ONCE in diff.notes
    assert (diff.results.column("relative_l2") == 0).all()
    assert diff.record.summary.verdict == "identical"


@pytest.mark.parametrize("position", ["last", "mean", 3])
def test_the_noise_of_the_prefix_counts(position: Position) -> None:
    """A prefix moved by a unit in the last place is noise as much as what follows it."""
    base, finetuned = llama(), perturbed(llama())
    shared, whole = (compare(base, finetuned, ids, position=position) for ids in (TEXTS, [*TEXTS, STRANGER]))
    for ours, theirs in zip(shared.layers, whole.layers, strict=True):
        assert ours.noise_floor is not None
        assert theirs.noise_floor is not None
        assert theirs.noise_floor / 4 < ours.noise_floor < 4 * theirs.noise_floor


# --- What is run


class Tokens:
    """How many tokens a run was said to have, and how many it was told of as done."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def loading(self, role: Any, name: str) -> None: ...
    def testing(self, prompts: Any) -> None: ...

    def running(self, n_tokens: int) -> None:
        self.total = n_tokens

    def advanced(self, n_tokens: int) -> None:
        self.done += n_tokens


def test_only_what_follows_the_prefix_runs_in_batches() -> None:
    tokens = Tokens()
    compare(llama(), perturbed(llama()), TEXTS, observer=tokens, no_noise_floor=True)
    assert tokens.total == tokens.done == sum(LENGTHS)


def test_batches_are_cut_by_what_follows_the_prefix() -> None:
    [*batches] = make_batches(PROMPTS, 16, "right", 0, len(PREFIX))
    assert max(len(b.members) * b.padded_length for b in batches) <= 16
    assert sorted(i for b in batches for i in b.prompts) == list(range(len(PROMPTS)))
    for batch in batches:
        assert batch.prefix == tuple(PREFIX)
        for prompt in batch.members:
            assert [*PREFIX, *prompt.ids] == PROMPTS[prompt.index].ids


# --- Where it is not shared


@pytest.mark.parametrize("name", swept(name for name in CAUSAL if name not in {*REFUSED, *UNBUILDABLE}))
def test_every_architecture_shares_its_prefix_rightly_or_not_at_all(name: str) -> None:
    base = build(name)
    pair = learned(base, perturbed(base))
    n_tokens, notes = share(pair, position="all")
    if not n_tokens:
        assert name in WITHOUT
        assert WITHOUT[name] in notes[0]
        return
    assert name not in WITHOUT
    for one, other in zip(*(states(pair, n, "all") for n in (0, n_tokens)), strict=True):
        assert relative_l2(one, other).nan_to_num(0.0).max() <= ROUNDING


def states(pair: ModelPair, n_prefix: int, position: Position) -> list[torch.Tensor]:
    """Both models' states at every site, in one padded batch; so many first tokens ran before it."""
    [batch] = make_batches(PROMPTS, 1024, "right", 0)
    pairs = run_pairs(pair, BatchPair.same([batch.after(n_prefix)]), position, lambda _: None)
    return [rows for seen in pairs if seen.site != "logits" for rows in (seen.base, seen.finetuned)]


@pytest.mark.parametrize("name", ["zamba", "jamba", "moshi", "recurrent_gemma"])
def test_what_is_not_shared_runs_as_ever_and_a_note_says_why(name: str) -> None:
    """Zamba and Jamba would go on wrongly without a word; Moshi does, past its window."""
    base = build(name)
    finetuned = perturbed(base)
    diff = compare(base, finetuned, TEXTS, no_noise_floor=True)
    [note] = notes_of(diff, "shared-prefix")
    assert WITHOUT[name] in note
    assert_same(diff, compare(base, finetuned, [*TEXTS, STRANGER], no_noise_floor=True))


def test_a_window_that_no_prompt_reaches_past_is_no_reason() -> None:
    """Moshi goes on rightly as long as every prompt fits its window."""
    base = build("moshi")
    for module in base.modules():
        if hasattr(getattr(module, "config", None), "sliding_window"):
            module.config.sliding_window = 64
    assert share(learned(base, perturbed(base)))[0] == len(PREFIX)


def test_localize_needs_every_prompt_whole() -> None:
    base, finetuned = llama(), perturbed(llama())
    diff = compare(base, finetuned, TEXTS, localize=True)
    assert any("ran with each of them: --localize" in note for note in diff.notes)
    whole = compare(base, finetuned, [*TEXTS, STRANGER], localize=True)
    assert_same(diff, whole)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"align": "text"}, "its own way"), ({"streams": True}, "one block at a time")],
    ids=["align", "stream"],
)
def test_other_runs_that_need_every_prompt_whole(changes: dict[str, Any], reason: str) -> None:
    n_tokens, notes = share(replace(learned(llama(), perturbed(llama())), **changes))
    assert n_tokens == 0
    assert reason in notes[0]


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_one_model_that_reads_both_ways_needs_every_prompt_whole(side: str, pair: ModelPair) -> None:
    conventions = replace(getattr(pair, f"{side}_conventions"), causal=False)
    n_tokens, [note] = share(replace(pair, **{f"{side}_conventions": conventions}))
    assert n_tokens == 0
    assert "not read from left to right alone" in note


def test_prompts_of_which_one_must_not_be_padded_run_whole(pair: ModelPair) -> None:
    """As where an attention picks its keys, and the longest prompt has more of them than it picks."""
    picking = replace(pair.base, anatomy=replace(pair.base.anatomy, picked_keys=len(PREFIX) + 4))
    n_tokens, [note] = share(replace(pair, base=picking))
    assert n_tokens == 0
    assert "prompts of several lengths cannot run together" in note


def test_an_encoder_reads_the_prefix_with_what_follows() -> None:
    base = build("bert:masked")
    diff = compare(base, perturbed(base), TEXTS)
    assert any("not read from left to right alone" in note for note in diff.notes)


# --- Through the command


def test_a_system_prompt_runs_once(tmp_path: Path, base_folder: Path, finetuned_folder: Path) -> None:
    """What the file says of each prompt is what it says when another system prompt is among them."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    system = {"role": "system", "content": "The answer is Paris."}
    chats = [
        {"messages": [system, {"role": "user", "content": f"What is {i} + {i * 7}?"}]} for i in range(24)
    ]
    stranger = {"messages": [{"role": "user", "content": "Hello"}]}
    found = []
    for name, rows in (("shared", chats), ("whole", [*chats, stranger])):
        prompts, out = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        models = ["-b", str(base_folder), "-f", str(finetuned_folder)]
        options = ["-p", f"@{prompts}", "--chat-template", str(template), "--position", "mean"]
        command = ["introspect", "activation-diff", *models, *options, "-o", str(out)]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.stderr
        found.append(lazarus.ActivationDiff.load(out))
    shared, whole = found
    assert any(note.endswith("the same in all prompts, ran once") for note in shared.notes)
    assert not any("ran once" in note for note in whole.notes)
    assert shared.record.prompts[3] == whole.record.prompts[3]
    assert_same(shared, whole)
