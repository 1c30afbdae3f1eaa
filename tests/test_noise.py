"""What noise is taken for, and that it is told from a change."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedModel

import lazarus
from architectures import build
from factories import perturbed, tiny_llama, word_tokenizer
from lazarus.batches import BatchPair, Padding, TokenBatch
from lazarus.engine import NoisePlan, Work, learn_pair, one_ulp_away, pick_sample, run
from lazarus.engine.noise import Sample, nudged
from lazarus.models import wrap_model
from lazarus.sites import Position
from lazarus.tokens import TokenizedPrompt

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IDS = [[5, 17, 80, 3, 41], [9, 33], [12, 77, 31], [64, 27, 50, 23, 8, 91, 36, 70, 19]]
TEXTS = [" ".join(f"t{i}" for i in ids) for ids in IDS]
SEEDS = range(10)
Models = dict[str, PreTrainedModel]


def compare(base: PreTrainedModel, finetuned: PreTrainedModel, **options: Any) -> lazarus.ActivationDiff:
    return lazarus.activation_diff(base, finetuned, TEXTS, tokenizer=word_tokenizer(), **options)


def floors(diff: lazarus.ActivationDiff) -> list[tuple[float | None, float | None]]:
    assert diff.record.output is not None
    measured = [(m.noise_floor, m.noise_floor_divergence) for m in (*diff.layers, *diff.sites)]
    return [*measured, (diff.record.output.noise_floor, None)]


# One unit in the last place


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_moves_to_a_neighbour(dtype: torch.dtype) -> None:
    """`torch.nextafter` is the oracle where there is one, and else the distance of neighbours."""
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 4
    special = torch.tensor([1.0, -1.0, 2.0, -0.5, tiny, -tiny, huge, -huge, 0.1], dtype=torch.float64)
    normal = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).flatten()
    states = torch.cat([special, normal]).to(dtype).reshape(-1, 17).repeat(1, 4)
    moved = one_ulp_away(states, torch.Generator().manual_seed(3))
    assert moved.dtype == dtype
    assert moved.shape == states.shape
    up, down = neighbours(states)
    assert ((moved == up) | (moved == down)).all()
    assert 0.4 < (moved == up).double().mean() < 0.6
    assert (up > states).all()
    assert (down < states).all()


def neighbours(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next larger and the next smaller number of the type."""
    if states.dtype in (torch.float32, torch.float64):
        infinity = torch.tensor(torch.inf, dtype=states.dtype)
        return torch.nextafter(states, infinity), torch.nextafter(states, -infinity)
    # Of the narrow types, float64 holds every number: a step is ε 2^e, and half of it below a power of two.
    wide = states.double()
    fraction, exponent = torch.frexp(wide)
    step = torch.finfo(states.dtype).eps * torch.exp2(exponent.double() - 1)
    towards_zero = torch.where(
        (fraction.abs() == 0.5) & (wide.abs() > torch.finfo(states.dtype).tiny), 0.5, 1
    )
    up = wide + step * torch.where(wide < 0, towards_zero, 1)
    down = wide - step * torch.where(wide > 0, towards_zero, 1)
    assert (up.to(states.dtype).double() == up).all()
    assert (down.to(states.dtype).double() == down).all()
    return up.to(states.dtype), down.to(states.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_infinity_and_nan_stay(dtype: torch.dtype) -> None:
    states = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype).repeat(20)
    moved = one_ulp_away(states, torch.Generator().manual_seed(0))
    assert torch.equal(moved.nan_to_num(nan=7.0), states.nan_to_num(nan=7.0))
    assert torch.equal(moved.signbit(), states.signbit())


def test_the_moves_are_seeded_and_leave_what_they_were_given() -> None:
    states = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).T  # not contiguous
    before = states.clone()
    first, second, other = (one_ulp_away(states, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(states, before)


def test_the_first_run_of_a_block_is_nudged_and_no_other() -> None:
    """A block that runs several times in a pass, as in ALBERT, must not be given more noise each time."""
    block, states = torch.nn.Identity(), torch.ones(3, 4)
    with nudged(block, torch.Generator().manual_seed(0)):
        assert (block(states) != states).all()
        assert torch.equal(block(states), states)
    assert torch.equal(block(states), states)


def test_a_nudge_moves_the_states_and_no_other_argument() -> None:
    class Block(torch.nn.Module):
        def forward(self, states: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return states, *others

    states = torch.ones(3, 4)
    block = Block()
    with nudged(block, torch.Generator().manual_seed(0)):
        moved, *others = block(states, states, states)
    assert (moved != states).all()
    assert len(others) == 2
    assert all(torch.equal(other, states) for other in others)


def test_a_pass_that_fails_leaves_no_nudge_behind() -> None:
    block, states = torch.nn.Identity(), torch.ones(3, 4)
    with pytest.raises(KeyError), nudged(block, torch.Generator()):
        raise KeyError
    assert torch.equal(block(states), states)


@given(n_prompts=st.integers(1, 3000), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_sample_is_small_sorted_and_seeded(n_prompts: int, seed: int) -> None:
    sample = pick_sample(n_prompts, seed)
    assert 1 <= len(sample) <= 8
    assert sample == sorted(set(sample))
    assert set(sample) <= set(range(n_prompts))
    assert sample == pick_sample(n_prompts, seed)
    if n_prompts >= 50:
        assert len(sample) == min(8, n_prompts // 10)
    else:
        assert len(sample) == min(8, n_prompts)


def test_another_seed_is_another_sample() -> None:
    assert len({tuple(pick_sample(100, seed)) for seed in range(10)}) > 5


@pytest.mark.parametrize(("n_prompts", "expected"), [(8, 8), (9, 8), (49, 8), (50, 5), (79, 7), (80, 8)])
def test_the_sample_is_a_tenth_from_50_prompts_on(n_prompts: int, expected: int) -> None:
    assert len(pick_sample(n_prompts, 0)) == expected


def test_a_sample_waits_for_every_prompt_of_a_batch() -> None:
    batch = batch_of(2, 2)
    sample = Sample([batch])
    for prompt in (1, 0):
        assert not sample.holds("logits", batch)
        sample.take("logits", torch.tensor([prompt, 7]), torch.tensor([[1.0 + prompt], [9.0]]))
    assert sample.holds("logits", batch)
    assert sample.give("logits", batch).tolist() == [[1.0], [2.0]]


# The batches of the trials


def batch_of(*lengths: int, n_prefix: int = 0) -> TokenBatch:
    """Prompts of so many tokens, after a prefix."""
    members = [TokenizedPrompt(i, [7 + i] * length) for i, length in enumerate(lengths)]
    return TokenBatch(members, 0, prefix=(5,) * n_prefix)


def plan_for(n_prompts: int, batch_tokens: int = 512, padding: Padding = "right") -> NoisePlan:
    return NoisePlan(n_prompts, batch_tokens, "last", padding, 0)


def trials(plan: NoisePlan, batch: TokenBatch, context: int | None = None) -> list[list[tuple[Any, int]]]:
    """Whose rows the batches of each trial have, and how much more padding."""
    return [[(b.prompts, b.extra_padding) for b in parts] for parts in plan.recomposed(batch, context)]


@pytest.mark.parametrize(
    ("plan", "batch", "n_copies"),
    [
        (plan_for(1), batch_of(5), 8),
        (plan_for(2), batch_of(5, 4), 4),
        (plan_for(3), batch_of(5, 4, 3), 3),  # nine rows: at least eight
        (plan_for(5), batch_of(5, 4), 2),
        (plan_for(8), batch_of(5), 1),
        (plan_for(9), batch_of(5), 1),
        (plan_for(1, 12), batch_of(5), 2),  # 10 of 12 tokens; a third copy would not fit
        (plan_for(1, 15), batch_of(5), 3),
        (plan_for(2, 20), batch_of(5, 1), 2),  # padding counts
        (plan_for(1, 3), batch_of(5), 1),
        (plan_for(1, padding="equal_lengths"), batch_of(5), 8),
        (plan_for(1, padding="one_by_one"), batch_of(5), 1),
    ],
)
def test_few_prompts_run_several_times_within_the_tokens_of_a_batch(
    plan: NoisePlan, batch: TokenBatch, n_copies: int
) -> None:
    """Eight rows at least over all batches: one prompt's noise is a poor guess."""
    assert plan.copies(batch) == n_copies
    if n_copies > 1:
        extra = 8 if plan.padding == "right" else 0
        assert trials(plan, batch) == [[(batch.prompts * n_copies, 0)], [(batch.prompts * n_copies, extra)]]


def test_many_prompts_run_in_two_halves_and_with_more_padding() -> None:
    plan = plan_for(8)
    assert trials(plan, batch_of(5, 5, 4, 4, 2)) == [[([0, 1], 0), ([2, 3, 4], 0)], [([0, 1, 2, 3, 4], 8)]]
    assert trials(plan, batch_of(5, 4)) == [[([0], 0), ([1], 0)], [([0, 1], 8)]]
    assert trials(plan, batch_of(5)) == [[([0], 8)], [([0], 8)]]


def test_a_sample_of_more_prompts_runs_twice_in_one_batch_where_there_is_room() -> None:
    """Base has run them in other batches, so that these are others already."""
    plan = replace(plan_for(8), among_others=True)
    assert trials(plan, batch_of(5, 4, 2)) == [[([0, 1, 2, 0, 1, 2], 0)]]
    assert plan.copies(batch_of(5, 4, 2)) == 2
    tight = replace(plan, batch_tokens=29)  # of 30
    assert trials(tight, batch_of(5, 4, 2)) == trials(plan_for(8), batch_of(5, 4, 2))
    few = replace(plan_for(5), among_others=True)
    assert trials(few, batch_of(5, 4)) == trials(plan_for(5), batch_of(5, 4))


@pytest.mark.parametrize(
    ("context", "n_prefix", "extra"),
    [
        (None, 0, 8),
        (None, 3, 8),
        (64, 0, 8),
        (13, 0, 8),
        (12, 0, 7),
        (16, 4, 7),
        (6, 0, 1),
        (5, 0, 0),
        (4, 0, 0),
    ],
)
def test_more_padding_ends_where_the_context_does(context: int | None, n_prefix: int, extra: int) -> None:
    batch = batch_of(5, 2, n_prefix=n_prefix)
    assert trials(plan_for(8), batch, context)[1] == [([0, 1], extra)]


@pytest.mark.parametrize("padding", ["equal_lengths", "one_by_one"])
def test_there_is_no_more_padding_where_padding_changes_the_numbers(padding: Padding) -> None:
    assert trials(plan_for(8, padding=padding), batch_of(5, 5), 64)[1] == [([0, 1], 0)]


def without_attention() -> LlamaForCausalLM:
    """Each token's states are of that token alone."""
    model = tiny_llama(vocab_size=100)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
    return model


@pytest.mark.parametrize("position", [1, "last"], ids=["prefix", "own"])
def test_in_each_trial_every_token_is_nudged_before_the_first_block(position: Position) -> None:
    """Those of a prefix that runs once as well. No token takes the noise of another over, in this model."""
    wrapped = wrap_model(without_attention(), "tiny")
    pair = learn_pair(wrapped, wrapped, (IDS[0], IDS[0]), (0, 0))
    prompts = [TokenizedPrompt(i, [5, 17, 80, *ids]) for i, ids in enumerate(IDS)]
    batches = [TokenBatch(prompts[:3], 0).after(3), TokenBatch(prompts[3:], 0).after(3)]
    plan = NoisePlan(8, 512, position, "right", 0)
    passed: list[int] = []
    work = Work(BatchPair.same(batches), batches, plan, position, localize=False)
    found = list(run(pair, work, passed.append))
    assert passed == [sum(batch.lengths) for batch in batches for _ in ("both models", "the noise")]
    after_first = [states for states in found if states.site == 0 and states.trial is not None]
    assert [states.trial for states in after_first] == [0, 1, 0, 1]
    assert [states.prompts.tolist() for states in after_first] == [[0, 1, 2]] * 2 + [[3]] * 2
    for states in after_first:
        assert (states.base != states.finetuned).any(dim=1).all()
        torch.testing.assert_close(states.base, states.finetuned, rtol=1e-5, atol=1e-5)


# The floor


def test_the_floor_is_measured_without_changing_a_weight_or_leaving_a_hook() -> None:
    base, finetuned = tiny_llama(), perturbed(tiny_llama())
    before = copy.deepcopy(base.state_dict())
    storages = [parameter.data_ptr() for parameter in base.parameters()]
    diff = compare(base, finetuned)
    assert all((floor or 0.0) > 0 for floor, _ in floors(diff))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert [parameter.data_ptr() for parameter in base.parameters()] == storages
    for module in (*base.modules(), *finetuned.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_floor_is_seeded_and_does_not_depend_on_the_finetuned_model() -> None:
    base = tiny_llama()
    found = floors(compare(base, perturbed(base), seed=3))
    assert found == floors(compare(base, perturbed(base), seed=3))
    assert found == floors(compare(base, perturbed(base, 0.5, seed=9), seed=3))
    assert found != floors(compare(base, perturbed(base), seed=4))


@pytest.mark.parametrize("n_tokens", [120, 127, 128])
def test_the_floor_needs_no_positions_that_a_model_lacks(n_tokens: int) -> None:
    """The padding that is tried out must end where GPT-2's table of positions ends."""
    base = build("gpt2")
    assert base.config.n_positions == 128
    text = " ".join(f"t{(7 * i) % 97 + 1}" for i in range(n_tokens))
    for texts in ([text], [text, "t4 t5"]):
        diff = lazarus.activation_diff(base, perturbed(base), texts, tokenizer=word_tokenizer())
        assert diff.summary.verdict == "changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_is_of_the_size_of_the_rounding(dtype: torch.dtype) -> None:
    """And so a bfloat16 run has one that is thousands of times higher."""
    base = tiny_llama().to(dtype)
    epsilon = torch.finfo(dtype).eps
    for floor, divergence in floors(compare(base, base))[:-1]:
        assert 0.51 * epsilon < (floor or 0.0) < 100 * epsilon  # half an ε is the least that a floor can be
        assert 0.0 < (divergence or 0.0) < (100 * epsilon) ** 2


def test_without_the_floor_there_is_no_verdict_but_identical() -> None:
    base = tiny_llama()
    diff = compare(base, perturbed(base), no_noise_floor=True)
    assert diff.summary.verdict is None
    assert floors(diff) == [(None, None)] * 6 + [(None, None)]
    assert diff.summary.onset_layer is None
    note = "the noise floor was not measured: no verdict but identical can be given, and no onset"
    assert note in diff.notes
    assert "Verdict" not in str(diff)
    same = compare(base, copy.deepcopy(base), no_noise_floor=True)
    assert same.summary.verdict == "identical"


# The verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_against_itself_is_identical(dtype: torch.dtype) -> None:
    base = tiny_llama().to(dtype)
    for position in ("last", "mean", "all"):
        assert compare(base, copy.deepcopy(base), position=position).summary.verdict == "identical"


def with_neurons_permuted(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy that computes the same: the neurons of every MLP in another order."""
    permuted = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    mlps: list[Any] = [m for m in permuted.modules() if hasattr(m, "down_proj") or hasattr(m, "c_fc")]
    for mlp in mlps:
        with torch.no_grad():
            _permute(mlp, generator)
    return permuted


def _permute(mlp: Any, generator: torch.Generator) -> None:
    if hasattr(mlp, "c_fc"):  # GPT-2's Conv1D holds [in, out]
        order = torch.randperm(mlp.c_proj.weight.shape[0], generator=generator)
        mlp.c_fc.weight.copy_(mlp.c_fc.weight[:, order])
        mlp.c_fc.bias.copy_(mlp.c_fc.bias[order])
        mlp.c_proj.weight.copy_(mlp.c_proj.weight[order])
        return
    order = torch.randperm(mlp.down_proj.in_features, generator=generator)
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.copy_(linear.weight[order])
    mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_copy_that_computes_the_same_is_never_called_changed(name: str, dtype: torch.dtype) -> None:
    """A bfloat16 product is summed in float32, so a model this small may even stay the same bit for bit."""
    base = build(name).to(dtype)
    seeds = SEEDS if dtype == torch.float32 else SEEDS[:3]
    verdicts = {compare(base, with_neurons_permuted(base, seed), seed=seed).summary.verdict for seed in seeds}
    if dtype == torch.float32:
        assert verdicts == {"within_noise"}
    assert verdicts <= {"within_noise", "identical"}


def test_neither_is_a_wide_one_in_bfloat16() -> None:
    """Wide enough for the order of the sum to show."""
    base = tiny_llama(hidden_size=64, intermediate_size=1024).to(torch.bfloat16)
    diffs = [compare(base, with_neurons_permuted(base, seed), seed=seed, position="all") for seed in SEEDS]
    assert "changed" not in {diff.summary.verdict for diff in diffs}
    for diff in diffs:
        assert diff.summary.verdict == "identical" or "Verdict: WITHIN NOISE" in str(diff)


def test_the_copies_differ_in_their_weights() -> None:
    """Otherwise the tests above would prove nothing."""
    for name in ("llama", "gpt2", "gemma2"):
        base = build(name)
        copied = with_neurons_permuted(base, 0)
        differing = [n for n, p in base.named_parameters() if not torch.equal(p, copied.get_parameter(n))]
        assert len(differing) == 6  # three in each of two blocks
        assert compare(base, copied).summary.weights_identical is False


@pytest.mark.parametrize(
    "path", ["layers.1.mlp.down_proj", "layers.3.self_attn.q_proj", "layers.2.input_layernorm", "norm"]
)
def test_a_small_change_of_one_weight_is_a_change(path: str) -> None:
    """Of one matrix, of a norm's scale alone, and even of the final norm's, which no block shows."""
    base = tiny_llama()
    finetuned = copy.deepcopy(base)
    with torch.no_grad():
        finetuned.model.get_submodule(path).weight.mul_(1 + 1e-3)
    diff = compare(base, finetuned)
    assert diff.summary.verdict == "changed"
    assert "Verdict: changed" in str(diff)
    if path == "norm":
        assert [layer.divergence for layer in diff.layers] == [0.0] * 4


def test_a_change_of_scale_is_a_change_though_no_cosine_shows_it() -> None:
    base = tiny_llama()
    finetuned = copy.deepcopy(base)
    with torch.no_grad():
        finetuned.model.norm.weight.mul_(2)
        finetuned.lm_head.weight.div_(2)
    diff = compare(base, finetuned)
    assert max(site.divergence or 0.0 for site in diff.sites) < 1e-15
    assert [site.norm_ratio for site in diff.sites] == [1.0, pytest.approx(2.0)]
    assert diff.record.output is not None
    assert diff.record.output.logits_relative_l2 == 0.0
    assert diff.summary.verdict == "changed"


def test_the_noise_is_that_of_the_compared_tokens() -> None:
    """A mean over tokens is less noisy than one token: the floor is measured where the comparison is made."""
    base = tiny_llama()
    last, mean = (floors(compare(base, base, position=position))[3][0] for position in ("last", "mean"))
    assert (mean or 0.0) < (last or 0.0)
    assert np.isfinite([last or 0.0, mean or 0.0]).all()
