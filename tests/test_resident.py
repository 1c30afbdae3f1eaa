"""Both models in memory: what runs once, what a prefix changes, and what is told of the progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from factories import perturbed, tiny_llama
from lazarus.batches import BatchPair, make_batches
from lazarus.engine import ModelPair, NoisePlan, Work, learn_pair, run, run_pairs
from lazarus.engine.local import beside
from lazarus.engine.recorder import Recorder, RowSelection
from lazarus.engine.runner import Runner, logit_pairs
from lazarus.models import wrap_model
from lazarus.models.adapters import share_storage
from lazarus.sites import StatePair
from lazarus.tokens import TokenizedPrompt

PREFIX = [5, 17, 80]
IDS = [[*PREFIX, *rest] for rest in ([3, 41], [9], [12, 77, 31])]


def twin_of(base: Any, changed: int) -> Any:
    """A second model over base's weights, with one block of its own."""
    twin: Any = share_storage(base).eval()
    block = twin.model.layers[changed]
    block.load_state_dict(perturbed(block, 0.3).state_dict(), assign=True)
    return twin


def pair_of(base: Any, finetuned: Any, align: Any = "ids") -> ModelPair:
    models = wrap_model(base, "base"), wrap_model(finetuned, "finetuned")
    return learn_pair(*models, (IDS[0], IDS[0]), (0, 0), align)


def batches(n_prefix: int = 0) -> list[BatchPair]:
    prompts = [TokenizedPrompt(i, ids) for i, ids in enumerate(IDS)]
    return BatchPair.same(make_batches(prompts, 8, "right", 0, n_prefix))


def rows(pairs: Iterator[StatePair], site: Any, part: str) -> dict[int, torch.Tensor]:
    return {p: getattr(s, part)[i] for s in pairs if s.site == site for i, p in enumerate(s.prompts.tolist())}


@contextmanager
def counted(block: nn.Module) -> Iterator[list[None]]:
    """While it lasts: one entry each time that a block computes."""
    calls: list[None] = []
    handle = block.get_submodule("mlp").register_forward_hook(lambda *_: calls.append(None))
    yield calls
    handle.remove()


def test_the_blocks_before_the_first_that_differs_run_once() -> None:
    base = tiny_llama(num_hidden_layers=2)
    pair = pair_of(base, finetuned := twin_of(base, 1))
    assert pair.n_common == 1
    told: list[int] = []
    with counted(finetuned.model.layers[0]) as first, counted(finetuned.model.layers[1]) as second:
        list(run_pairs(pair, batches(), "last", told.append))
    assert (len(first), len(second)) == (0, len(batches()))
    assert told == [batch.base.n_tokens for batch in batches()]
    assert sum(told) == sum(map(len, IDS))


def test_two_readings_of_the_same_ids_share_no_block() -> None:
    """The first block differs: what base's made of the same ids is not what the other's makes of them."""
    base = tiny_llama(num_hidden_layers=2)
    pair = pair_of(base, twin_of(base, 0), "text")
    assert pair.n_common == 0
    readings = [BatchPair(batch.base, replace(batch.base)) for batch in batches()]
    found, expected = (list(run_pairs(pair, each, "last", lambda _: None)) for each in (readings, batches()))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.finetuned, theirs.finetuned)
        assert torch.equal(ours.base, ours.finetuned) is (ours.site == "embedding")


def test_a_prefix_that_runs_before_the_batches_changes_no_state_and_not_what_runs_once() -> None:
    base = tiny_llama(num_hidden_layers=2)
    pair = pair_of(base, finetuned := twin_of(base, 1))
    n_batches = len(batches(len(PREFIX)))
    whole = list(run_pairs(pair, batches(), "last", lambda _: None))
    with counted(finetuned.model.layers[0]) as first, counted(finetuned.model.layers[1]) as second:
        after = list(run_pairs(pair, batches(len(PREFIX)), "last", lambda _: None))
    assert (len(first), len(second)) == (1, 1 + n_batches), "the prefix runs through both blocks"
    for site, part in ((site, part) for site in (0, 1) for part in ("base", "finetuned")):
        found, expected = (rows(iter(pairs), site, part) for pairs in (after, whole))
        assert found.keys() == expected.keys() == {0, 1, 2}
        for prompt, states in expected.items():
            torch.testing.assert_close(found[prompt], states, rtol=1e-4, atol=1e-5)


def test_common_blocks_run_again_where_other_states_enter_them() -> None:
    base = tiny_llama(num_hidden_layers=2)
    finetuned = twin_of(base, 1)
    finetuned.model.embed_tokens = perturbed(base.model.embed_tokens, 0.3)
    pair = pair_of(base, finetuned)
    assert pair.n_common == 1
    found, expected = (
        list(run_pairs(each, batches(), "last", lambda _: None)) for each in (pair, replace(pair, n_common=0))
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.finetuned, theirs.finetuned)
        assert not torch.equal(ours.base, ours.finetuned)


def test_the_head_reads_the_last_token_where_the_states_are_averaged() -> None:
    base = tiny_llama(num_hidden_layers=2)
    pairs = list(run_pairs(pair_of(base, perturbed(base)), batches(), "mean", lambda _: None))
    logits, final = (rows(iter(pairs), site, "base") for site in ("logits", "final_norm"))
    assert logits.keys() == final.keys() == {0, 1, 2}
    for prompt, ids in enumerate(IDS):
        with torch.no_grad():
            output = base(torch.tensor([ids]), output_hidden_states=True)
        torch.testing.assert_close(logits[prompt], output.logits[0, -1], rtol=1e-4, atol=1e-4)
        mean = output.hidden_states[-1][0, 1:].double().mean(0)
        torch.testing.assert_close(final[prompt], mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("most", "n_rows"), [(10, 1), (600, 2), (2**24, 100)])
def test_few_logits_are_held_at_once_and_all_of_them_come(
    most: int, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazarus.engine.runner.MOST_LOGITS", most)
    base = tiny_llama(num_hidden_layers=2)
    pairs = [
        s for s in run_pairs(pair_of(base, perturbed(base)), batches(), "all", print) if s.site == "logits"
    ]
    n_seen = [len(s.prompts) for s in pairs]
    assert sum(n_seen) == sum(len(ids) - 1 for ids in IDS)
    assert max(n_seen) <= n_rows
    prompts, logits = torch.cat([s.prompts for s in pairs]), torch.cat([s.base for s in pairs])
    for prompt, ids in enumerate(IDS):
        with torch.no_grad():
            expected = base(torch.tensor([ids])).logits[0, 1:]
        torch.testing.assert_close(logits[prompts == prompt], expected, rtol=1e-4, atol=1e-4)


def test_there_are_no_logits_unless_both_models_have_a_head() -> None:
    model = tiny_llama(num_hidden_layers=2)
    pair = pair_of(model, model)
    runner = Runner(pair.base, pair.base_conventions)
    states = runner.run(batches()[0].base, "last")
    assert len(list(logit_pairs(runner.head, runner.head, states, states))) == 1
    assert not list(logit_pairs(runner.head, None, states, states))
    assert not list(logit_pairs(None, runner.head, states, states))


def test_progress_is_told_of_every_batch() -> None:
    model = tiny_llama(num_hidden_layers=2)
    told: list[int] = []
    plan = NoisePlan(1, 20, "last", "right", 0)
    assert list(run(pair_of(model, perturbed(model)), Work(batches(), [], plan, "last", False), told.append))
    assert told == [batch.base.n_tokens for batch in batches()]


def test_a_block_that_is_the_same_in_both_does_not_run_beside_itself() -> None:
    base = tiny_llama(num_hidden_layers=2)
    pair = pair_of(base, finetuned := twin_of(base, 1))
    with counted(finetuned.model.layers[0]) as first, counted(finetuned.model.layers[1]) as second:
        found = list(run_pairs(pair, batches(), "last", lambda _: None, localize=True))
    assert (len(first), len(second)) == (0, 2 * len(batches()))
    for states in found:
        if states.site == 0:
            assert states.local is not None
            assert torch.equal(states.local, states.base)


def test_one_block_alone_can_run_beside_bases() -> None:
    model = tiny_llama(num_hidden_layers=2)
    pair, local = pair_of(model, perturbed(model)), list[torch.Tensor]()
    recorder, ids = Recorder(pair.base), torch.tensor(IDS[:1])
    take = RowSelection(torch.Tensor.clone, torch.Tensor.clone)
    with beside(pair, torch.Tensor.clone, local):
        recorder.run(ids, torch.ones_like(ids), take)
    alone: list[torch.Tensor] = []
    with beside(pair, torch.Tensor.clone, alone, only=1):
        recorder.run(ids, torch.ones_like(ids), take)
    assert len(local) == 2
    assert [torch.equal(states, local[1]) for states in alone] == [True]


def test_a_block_that_both_models_hold_does_not_run_inside_itself() -> None:
    """Models of two designs are not known to have any block in common."""
    base = tiny_llama(num_hidden_layers=2)
    finetuned = tiny_llama(num_hidden_layers=2, max_position_embeddings=32)
    finetuned.model.layers[1] = base.model.layers[1]
    pair = pair_of(base, finetuned)
    assert pair.same_blocks == (False, False)
    found = run_pairs(pair, batches(), "last", lambda _: None, localize=True)
    after = [states for states in found if states.site == 1]
    assert after
    for states in after:
        assert states.local is not None
        assert torch.equal(states.local, states.base)
