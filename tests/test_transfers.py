"""A device is waited for once a batch, and not once a site; counted on a device that stands in for a GPU."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import lazarus
from accelerator import DEVICE, Accelerator
from factories import perturbed, tiny_llama, tiny_tokenizer
from lazarus.activation.accumulation import Accumulation
from lazarus.metrics import (
    OncePerBatch,
    RowValues,
    SiteMeasures,
    SitePlan,
    Together,
    Update,
    compare_logits,
    on_device,
)
from lazarus.metrics.output import LOGITS_AT_ONCE, LOGITS_ON_DEVICE, rows_at_once
from lazarus.sites import StatePair

TEXTS = ["Hello", "What is AI?", "The answer is 42.", "Calculate 2 + 2."]

OPTIONS: dict[str, dict[str, Any]] = {
    "every token, with a readout": {"position": "all", "readout": "all"},
    "means, inside blocks": {"position": "mean", "sites": "all", "localize": True},
    "repeated prompts": {"localize": True},
    "a prefix": {},
}


def run(n_layers: int, texts: list[str], **options: Any) -> tuple[lazarus.ActivationDiff, Accelerator]:
    """Compare a tiny pair on the device; its random weights are the same for any number of layers."""
    base = tiny_llama(num_hidden_layers=n_layers, max_position_embeddings=256)
    finetuned = perturbed(base)
    with Accelerator() as device:
        device.put(base)
        device.put(finetuned)
        found = lazarus.activation_diff(base, finetuned, texts, tokenizer=tiny_tokenizer(), **options)
    return found, device


def waits_of_batches(n_layers: int, texts: list[str], **options: Any) -> int:
    """Return how often the host waits more for several batches than for one.

    What is left out is of the run as a whole, such as learning how each block behaves.
    """
    one, several = (
        sum(run(n_layers, texts, batch_tokens=n, **options)[1].waits.values()) for n in (4096, 64)
    )
    return several - one


@pytest.mark.parametrize("name", OPTIONS)
def test_waits_of_a_batch_do_not_grow_with_the_number_of_sites(name: str) -> None:
    texts = TEXTS * 2 if name == "repeated prompts" else TEXTS
    if name == "a prefix":
        texts = [f"{'You are a helpful assistant. ' * 2}{text}" for text in TEXTS]
    few, many = (waits_of_batches(n_layers, texts, **OPTIONS[name]) for n_layers in (2, 5))
    assert many == few > 0


def moved(pair: StatePair) -> StatePair:
    """The pair with its states on the device."""
    local, change = (None if rows is None else rows.to(DEVICE) for rows in (pair.local, pair.change))
    base, finetuned = pair.base.to(DEVICE), pair.finetuned.to(DEVICE)
    return replace(pair, base=base, finetuned=finetuned, local=local, change=change)


@pytest.mark.parametrize("position", ["last", "all"])
def test_states_on_a_device_add_up_to_the_numbers_of_the_cpu(position: str) -> None:
    options: dict[str, Any] = {"position": position, "localize": True, "sites": "all", "readout": "all"}
    base = tiny_llama(num_hidden_layers=3)
    pairs = lazarus.iter_state_pairs(
        base, perturbed(base), TEXTS, tokenizer=tiny_tokenizer(), with_noise=True, **options
    )
    states = list(pairs)
    here, there = (Accumulation(pairs.facts, pairs.plan) for _ in range(2))
    here.take(states)
    with Accelerator():
        there.take(map(moved, states))
    ours, theirs = here.state(), there.state()
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        # Bit for bit: its kernels are the CPU's, and bringing many sites over at once changes nothing.
        np.testing.assert_array_equal(theirs[name], array)


def test_rows_that_are_not_valid_are_left_out_on_a_device_too() -> None:
    generator = torch.Generator().manual_seed(0)
    base, finetuned = (torch.randn(6, 8, generator=generator) for _ in range(2))
    base[1], finetuned[2], base[4, 3], finetuned[5, 0] = 0, torch.nan, torch.inf, torch.nan
    base[5] = finetuned[5]
    prompts = torch.tensor([0, 0, 1, 2, 2, 3])
    plan = SitePlan(4, kept={0: 0, 2: 1}, traced=[0, 1])
    here, there = SiteMeasures(plan), SiteMeasures(plan)
    here.update(prompts, base, finetuned)
    with Accelerator():
        there.update(prompts, base.to(DEVICE), finetuned.to(DEVICE))
    ours, theirs = here.state(), there.state()
    assert here.n_unlike == 3
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(theirs[name], array)
    # What is summed up is what the valid rows give by themselves.
    alone, valid = SiteMeasures(plan), torch.tensor([0, 3])
    alone.update(prompts[valid], base[valid], finetuned[valid])
    sums = {name: array for name, array in alone.state().items() if name.startswith("directions")}
    assert len(sums) > 5
    for name, array in sums.items():
        np.testing.assert_array_equal(ours[name], array)


def test_rows_that_take_much_memory_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazarus.metrics.transfers.PENDING_BYTES", 2 * 8 * 100)
    done = []

    def update(number: int, rows: torch.Tensor) -> Update[None]:
        yield [rows.sum()]
        done.append(number)

    with Accelerator():
        rows = torch.ones(10, 5).to(DEVICE)
        together = Together()
        for number in range(5):
            together.add(update(number, rows), rows)
        assert done == [0, 1, 2]
        together.finish()
    assert done == [0, 1, 2, 3, 4]


def test_more_logits_are_compared_at_once_on_a_device() -> None:
    vocabulary = 152_000
    here = torch.empty(100, vocabulary, device="meta")
    assert rows_at_once(torch.zeros(1, vocabulary)) == 1
    assert rows_at_once(here) == LOGITS_ON_DEVICE // vocabulary == 27
    assert rows_at_once(torch.zeros(1, 2 * LOGITS_AT_ONCE)) == 1


def test_logits_that_cannot_come_are_compared_on_a_device_without_asking() -> None:
    base, finetuned = torch.randn(3, 7), torch.randn(3, 7)
    base[0, 2] = finetuned[0, 2] = base[1, 4] = -torch.inf
    here = compare_logits(base, finetuned)
    with Accelerator() as device:
        sides = base.to(DEVICE), finetuned.to(DEVICE)
        device.waits.clear()
        there = compare_logits(*sides)
        assert not device.waits
        assert isinstance(there, RowValues)
        assert torch.equal(there.values.cpu(), here.values)


def test_what_is_remembered_of_a_batch_goes_with_it() -> None:
    made = OncePerBatch(lambda prompts: prompts + 1)
    prompts = torch.arange(3)
    assert made(prompts) is made(prompts)
    assert made(prompts.clone()) is not made(prompts)
    with Accelerator():
        assert on_device(prompts, DEVICE) is on_device(prompts, DEVICE)
    assert on_device(prompts, torch.device("cpu")) is prompts
    del prompts
    gc.collect()
    assert not len(made._made)
