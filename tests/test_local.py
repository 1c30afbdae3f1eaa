"""What each block itself changes: exactly 0 where it is the same, and F(b) − B(b) in the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import lazarus
from architectures import CAUSAL, REFUSED, UNBUILDABLE, build, swept
from factories import perturbed, tiny_llama, word_tokenizer
from lazarus.engine import learn_pair
from lazarus.engine.local import beside
from lazarus.engine.recorder import Recorder, RowSelection
from lazarus.errors import ShapeMismatchError, UnsupportedModelError
from lazarus.models import dissect, wrap_model
from reference import States, as_rows, run_whole

IDS = [[5, 17, 80, 3, 41], [9], [12, 77, 31], [64, 27, 50, 23, 8, 91, 36, 70, 19]]
TEXTS = [" ".join(f"t{i}" for i in ids) for ids in IDS]
LONG = [[64, 27, 50, 23, 8, 91, 36, 70, 19], [21, 88, 4, 63, 39, 15, 97, 52, 30]]
COMPARED = [name for name in CAUSAL if name not in UNBUILDABLE and name not in REFUSED]
SHARES_KEYS = ("gemma3n_text", "gemma4_text")
"""Blocks of these write keys and values into a mapping that later blocks read."""


def localized(base: PreTrainedModel, finetuned: PreTrainedModel, **options: Any) -> lazarus.ActivationDiff:
    options = {"localize": True, "no_noise_floor": True, **options}
    return lazarus.activation_diff(base, finetuned, TEXTS, tokenizer=word_tokenizer(), **options)


def local_changes(diff: lazarus.ActivationDiff) -> list[float | None]:
    return [layer.local.relative_l2 if layer.local else None for layer in diff.layers]


@dataclass(frozen=True)
class Call:
    """One call of a block of base: B(b) and F(b), each [tokens, features]."""

    block: int
    base: States
    finetuned: States

    def relative_l2(self, position: str | int = "all") -> float:
        b, f = compared(self.base, position), compared(self.finetuned, position)
        return float(np.mean(np.linalg.norm(f - b, axis=1) / np.linalg.norm(b, axis=1)))


def compared(states: States, position: str | int) -> States:
    others: States = states[min(1, len(states) - 1) :]
    if position == "all":
        return others
    if position == "mean":
        mean: States = others.mean(0, keepdims=True)
        return mean
    return states[[-1 if position == "last" else int(position)]]


def calls_of(base: PreTrainedModel, finetuned: PreTrainedModel, ids: Sequence[int]) -> list[Call]:
    """The oracle: one prompt alone, unpadded; the other model's block is called by a wrapper of base's."""
    blocks, others = dissect(base).blocks, dissect(finetuned).blocks
    calls: list[Call] = []

    def wrapped(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            theirs = others[index](*map(apart, args), **{name: apart(v) for name, v in kwargs.items()})
            ours = forward(*args, **kwargs)
            states = [o if isinstance(o, torch.Tensor) else o[0] for o in (ours, theirs)]
            calls.append(Call(index, *(as_rows(s, len(ids)) for s in states)))
            return ours

        return call

    originals = [block.forward for block in blocks]
    try:
        for index, forward in enumerate(originals):
            blocks[index].forward = wrapped(index, forward)
        run_whole(base, ids)
    finally:
        for block in blocks:
            del block.forward
    return calls


def apart(argument: Any) -> Any:
    return copy.copy(argument) if isinstance(argument, Mapping) else argument


def with_block_changed(model: PreTrainedModel, index: int, amount: float = 0.1) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    block: Any = dissect(changed).blocks[index]
    block.load_state_dict(perturbed(block, amount).state_dict())
    return changed


def lone_block(blocks: Sequence[nn.Module]) -> int:
    """The block nearest to the middle that shares no weight with another (those of Zamba do)."""
    weights = [{id(p) for p in block.parameters()} for block in blocks]
    order = sorted(range(len(blocks)), key=lambda i: abs(i - (len(blocks) - 1) / 2))
    return next(i for i in order if all(weights[i].isdisjoint(w) for j, w in enumerate(weights) if j != i))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", ["last", "mean", "all"])
@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_only_the_changed_block_has_a_local_change(part: str, position: str, dtype: torch.dtype) -> None:
    """And raw divergence makes every later layer look guilty."""
    base = tiny_llama().to(dtype)
    finetuned = copy.deepcopy(base)
    changed: Any = getattr(finetuned.model.layers[2], part)
    changed.load_state_dict(perturbed(changed, 0.5).state_dict())
    for batch_tokens in (1, 12, 10_000) if position == "all" else (12,):
        diff = localized(base, finetuned, position=position, batch_tokens=batch_tokens)
        assert [local == 0.0 for local in local_changes(diff)] == [True, True, False, True]
        assert (local_changes(diff)[2] or 0.0) > 0.01
        assert [layer.local.cosine_similarity == 1.0 for layer in diff.layers if layer.local] == [
            True,
            True,
            False,
            True,
        ]
        assert diff.summary.most_changed_block == 2
        assert [layer.divergence == 0.0 for layer in diff.layers] == [True, True, False, False]


@pytest.mark.parametrize("position", ["last", "mean", "all", 0])
@pytest.mark.parametrize("name", ["llama", "gpt2", *SHARES_KEYS])
def test_the_local_change_is_that_of_the_two_blocks_called_by_hand(name: str, position: str | int) -> None:
    base = build(name).double()
    finetuned = perturbed(base)
    found = localized(base, finetuned, position=position).results
    for prompt, ids in enumerate(IDS):
        calls = calls_of(base, finetuned, ids)
        expected = [call.relative_l2(position) for call in calls]
        np.testing.assert_allclose(found.column("local_relative_l2")[prompt], expected, rtol=1e-6)
        rows = [(compared(c.base, position), compared(c.finetuned, position)) for c in calls]
        cosines = [
            np.mean((b * f).sum(1) / np.linalg.norm(b, axis=1) / np.linalg.norm(f, axis=1)) for b, f in rows
        ]
        np.testing.assert_allclose(found.column("local_cosine_similarity")[prompt], cosines, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "hrm_text", *SHARES_KEYS])
def test_the_divergence_is_bit_for_bit_that_without_localize(name: str) -> None:
    base = build(name)
    finetuned = perturbed(base)
    with_it, without = (localized(base, finetuned, localize=on, position="all") for on in (True, False))
    assert local_changes(without) == [None] * len(without.layers)
    assert without.summary.most_changed_block is None
    for metric in ("divergence", "relative_l2", "norm_ratio"):
        np.testing.assert_array_equal(with_it.results.column(metric), without.results.column(metric))
    assert with_it.record.output == without.record.output


@pytest.mark.parametrize("name", swept(COMPARED))
def test_every_architecture_has_a_local_change_in_the_changed_block_alone(name: str) -> None:
    """A looped block has one in each of its calls. Base's own states are those that it has by itself."""
    base = build(name)
    index = lone_block(dissect(base).blocks)
    finetuned = with_block_changed(base, index)
    states, local = outputs_beside(base, finetuned)
    calls = calls_of(base, finetuned, LONG[0])
    assert len(states) == len(local) == len(calls)
    for b, f, call in zip(states, local, calls, strict=True):
        assert torch.equal(b, f) == (call.block != index)
        assert f.isfinite().all()
        b_row, f_row = of_first(b), of_first(f)
        np.testing.assert_allclose(b_row, call.base, rtol=0, atol=1e-4 * np.abs(b_row).max())
        np.testing.assert_allclose(f_row, call.finetuned, rtol=0, atol=1e-4 * np.abs(b_row).max())


def outputs_beside(
    base: PreTrainedModel, finetuned: PreTrainedModel
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """B(b) and F(b) of every call of a block, on two prompts of one length."""
    models = [wrap_model(model, "m") for model in (base, finetuned)]
    local: list[torch.Tensor] = []
    ids = torch.tensor(LONG)
    pair = learn_pair(models[0], models[1], (LONG[0], LONG[0]), (0, 0))
    with beside(pair, torch.Tensor.clone, local):
        seen = Recorder(models[0]).run(
            ids, torch.ones_like(ids), RowSelection(torch.Tensor.clone, torch.Tensor.clone)
        )
    return seen.blocks, local


def of_first(states: torch.Tensor) -> States:
    """The first prompt's rows, wherever the axes of the batch and of the tokens are."""
    batch = next(axis for axis, size in enumerate(states.shape[:-1]) if size == len(LONG))
    return as_rows(states.select(batch, 0), len(LONG[0]))


@pytest.mark.parametrize("name", SHARES_KEYS)
def test_the_keys_that_blocks_share_are_shared_in_the_test(name: str) -> None:
    """Otherwise it would prove nothing of them."""
    shared: list[Any] = []

    def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        shared.append(kwargs["shared_kv_states"])

    model = build(name)
    for block in dissect(model).blocks:
        block.register_forward_pre_hook(hook, with_kwargs=True)
    run_whole(model, IDS[0])
    assert len({id(mapping) for mapping in shared}) == 1
    assert len(shared[0]) > 0


def test_the_table_has_a_column_of_it() -> None:
    diff = localized(tiny_llama(), with_block_changed(tiny_llama(), 2, 2.0))
    lines = str(diff).splitlines()
    start = lines.index("Layer    Avg Cos Sim    Divergence       Local")
    assert lines[start + 1] == "-" * 47
    for line, layer in zip(lines[start + 2 :], diff.layers, strict=False):
        assert layer.local is not None
        assert layer.local.relative_l2 is not None
        cells = f"{layer.layer:<10}{layer.cosine_similarity:>8.4f}{layer.divergence:>14.4f}"
        local = f"{layer.local.relative_l2:>12.6f}"
        assert line == cells + local + (" ***" if layer.flagged else "")
    assert any(layer.flagged for layer in diff.layers)
    assert "Blocks that did it: 2 (" in str(diff)
    assert "exactly 0 in the other 3" in str(diff)


def test_it_is_refused_for_models_of_another_shape() -> None:
    with pytest.raises(
        ShapeMismatchError, match=r"4 blocks of 32 features and 3 of 32.*Leave `localize` out"
    ):
        localized(tiny_llama(), tiny_llama(num_hidden_layers=3))
    many = TEXTS * 13
    with pytest.raises(
        ShapeMismatchError, match=r"4 blocks of 32 features and 4 of 64.*Leave `localize` out"
    ):
        lazarus.activation_diff(
            tiny_llama(), tiny_llama(hidden_size=64), many, tokenizer=word_tokenizer(), localize=True
        )


def test_blocks_that_do_not_run_on_the_others_states_are_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"`localize`: block 0 of .*Leave `localize` out"
    ) as caught:
        localized(tiny_llama(), tiny_llama().to(torch.bfloat16))
    assert caught.value.option == "localize"


def test_a_model_in_memory_against_itself_has_none() -> None:
    model = tiny_llama()
    diff = localized(model, model)
    assert local_changes(diff) == [0.0] * 4
    assert diff.summary.most_changed_block is None
    assert "Blocks that did it: none, no block's own output changes" in str(diff)


def test_hooks_are_taken_off_and_no_weight_is_touched() -> None:
    base, finetuned = tiny_llama(), perturbed(tiny_llama())
    before = [copy.deepcopy(model.state_dict()) for model in (base, finetuned)]
    localized(base, finetuned)
    for model, state in zip((base, finetuned), before, strict=True):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
