"""Both models in memory: what runs once, what a prefix changes, and what is told of the progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from factories import perturbed, tiny_llama
from lazarus.batches import BatchPair, make_batches
from lazarus.engine import ModelPair, learn_pair, run_pairs
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
