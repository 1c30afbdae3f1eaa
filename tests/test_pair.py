"""What two models have in common, asked of pairs that are made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from factories import tiny_llama
from lazarus.batches import Padding
from lazarus.engine import ModelPair, learn_pair
from lazarus.engine.probe import Conventions
from lazarus.models import LoadedModel, LoadOptions, load_paged, parse_model, wrap_model
from lazarus.notes import Note, Notes

KNOWN = Conventions(
    n_layers=4,
    width=32,
    axes=(0, 1),
    causal=True,
    padding="right",
    has_final_norm=True,
    head_reads=BaseModelOutputWithPast,
)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return wrap_model(tiny_llama(num_hidden_layers=1), "model")


@pytest.fixture(scope="module")
def paged(base_folder: Path) -> tuple[LoadedModel, LoadedModel]:
    """One checkpoint twice, read block by block."""
    reference, options = parse_model(str(base_folder)), LoadOptions(torch.float32, torch.device("cpu"))
    return load_paged(reference, reference, options, lambda role, name: None)


def pair_of(models: tuple[LoadedModel, LoadedModel], base: Any, finetuned: Any, **changes: Any) -> ModelPair:
    """A pair whose models behave as it is `KNOWN`, but for what is given of each."""
    return ModelPair(*models, replace(KNOWN, **base), replace(KNOWN, **finetuned), **changes)


def run_notes(pair: ModelPair, longest: int = 5) -> list[Note]:
    notes = Notes()
    pair.note_run(longest, notes)
    return list(notes)


def common_notes(pair: ModelPair) -> list[Note]:
    notes = Notes()
    pair.note_common(notes)
    return list(notes)


@pytest.mark.parametrize("norms", [(True, True), (True, False), (False, True), (False, False)])
def test_a_final_norm_is_a_site_where_both_models_have_one(
    norms: tuple[bool, bool], model: LoadedModel
) -> None:
    pair = pair_of((model, model), *({"has_final_norm": norm} for norm in norms))
    assert pair.have_final_norm is all(norms)
    assert ("final_norm" in pair.sites) is all(norms)


@pytest.mark.parametrize("heads", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("align", ["ids", "text"])
def test_logits_are_compared_where_both_heads_run_alone_over_the_same_ids(
    heads: tuple[bool, bool], align: str, model: LoadedModel
) -> None:
    sides = ({} if head else {"head_reads": None} for head in heads)
    assert pair_of((model, model), *sides, align=align).shares_vocabulary is (all(heads) and align == "ids")


@pytest.mark.parametrize(
    ("paddings", "align", "picked", "expected"),
    [
        (("right", "right"), "ids", (None, None), "right"),
        (("equal_lengths", "right"), "ids", (None, None), "equal_lengths"),
        (("right", "equal_lengths"), "ids", (None, None), "equal_lengths"),
        (("one_by_one", "equal_lengths"), "ids", (None, None), "one_by_one"),
        (("right", "one_by_one"), "ids", (None, None), "one_by_one"),
        (("right", "right"), "text", (None, None), "right"),
        (("equal_lengths", "right"), "text", (None, None), "one_by_one"),
        (("equal_lengths", "equal_lengths"), "text", (None, None), "one_by_one"),
        (("right", "right"), "ids", (5, None), "right"),
        (("right", "right"), "ids", (4, None), "equal_lengths"),
        (("right", "right"), "ids", (None, 4), "equal_lengths"),
        (("right", "right"), "text", (None, 4), "one_by_one"),
    ],
)
def test_prompts_are_batched_as_the_more_demanding_model_needs_it(
    paddings: tuple[Padding, Padding],
    align: str,
    picked: tuple[int | None, int | None],
    expected: Padding,
    model: LoadedModel,
) -> None:
    models = [replace(model, anatomy=replace(model.anatomy, picked_keys=n_keys)) for n_keys in picked]
    sides = ({"padding": padding} for padding in paddings)
    assert pair_of((models[0], models[1]), *sides, align=align).padding(longest=5) == expected


def test_two_types_to_run_in_are_told(model: LoadedModel) -> None:
    narrow = wrap_model(tiny_llama(num_hidden_layers=1).bfloat16(), "narrow")
    assert run_notes(pair_of((model, model), {}, {})) == []
    [note] = run_notes(pair_of((model, narrow), {}, {}))
    assert note.code == "run-dtypes"
    assert note.text.startswith("model ran in float32, narrow in bfloat16")


@pytest.mark.parametrize("known", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("padding", "how"), [("one_by_one", "one at a time"), ("equal_lengths", "with others of their length")]
)
def test_why_prompts_ran_without_padding_is_told(
    padding: Padding, how: str, known: tuple[bool, bool], model: LoadedModel
) -> None:
    sides = ({"padding": padding, "padding_is_known": each} for each in known)
    [note] = run_notes(pair_of((model, model), *sides))
    why = (
        "padding changes the states of this architecture"
        if all(known)
        else "too few states were finite to see whether padding changes them"
    )
    assert (note.code, note.text) == ("no-padding", f"{why}, so prompts ran {how}")


@pytest.mark.parametrize("streams", [True, False])
def test_weights_that_each_batch_reads_are_told_of_models_that_do_not_stream(
    streams: bool, model: LoadedModel, paged: tuple[LoadedModel, LoadedModel]
) -> None:
    codes = [note.code for note in run_notes(pair_of(paged, {}, {}, streams=streams))]
    assert codes == ([] if streams else ["batches-read-weights"])
    assert run_notes(pair_of((model, model), {}, {})) == []


@pytest.mark.parametrize(
    ("n_common", "which"), [(0, None), (1, "block 0 is"), (2, "blocks 0 to 1 are"), (4, "blocks 0 to 3 are")]
)
def test_the_blocks_that_ran_once_are_named(n_common: int, which: str | None, model: LoadedModel) -> None:
    found = common_notes(pair_of((model, model), {}, {}, n_common=n_common))
    assert [note.text.partition(" the same in both models")[0] for note in found] == (
        [which] if which else []
    )
    assert [note.layers for note in found] == ([tuple(range(n_common))] if which else [])


@pytest.mark.parametrize(
    ("changes", "expected"), [({}, True), ({"align": "text"}, False), ({"same_design": False}, False)]
)
def test_blocks_that_are_read_from_disk_run_once_for_one_design_and_the_same_ids(
    changes: dict[str, Any], expected: bool, model: LoadedModel, paged: tuple[LoadedModel, LoadedModel]
) -> None:
    asked = {"streams": True, "same_design": True, **changes}
    found = common_notes(pair_of(paged, {}, {}, **asked))
    assert [note.layers for note in found] == ([(0, 1, 2, 3)] if expected else [])
    assert common_notes(pair_of((model, model), {}, {}, **asked)) == []


# --- What is learnt of each model


def sized(n_tokens: int) -> LoadedModel:
    return wrap_model(tiny_llama(num_hidden_layers=1, vocab_size=n_tokens), str(n_tokens))


@pytest.mark.parametrize("n_tokens", [(20, 300), (300, 20)])
def test_each_model_is_tried_on_its_own_ids_and_padding(n_tokens: tuple[int, int]) -> None:
    """The last ids of the larger vocabulary are none of the smaller one."""
    ids = [list(range(n - 9, n - 1)) for n in n_tokens]
    pad_ids = n_tokens[0] - 1, n_tokens[1] - 1
    pair = learn_pair(sized(n_tokens[0]), sized(n_tokens[1]), (ids[0], ids[1]), pad_ids, "text")
    assert not pair.same_design
    assert pair.same_blocks == (False,)
    assert pair.n_common == 0
    for learnt in (pair.base_conventions, pair.finetuned_conventions):
        assert (learnt.n_layers, learnt.width, learnt.padding, learnt.causal) == (1, 32, "right", True)


def test_of_models_that_are_read_block_by_block_no_block_is_known_to_be_the_same_before_it_is_read(
    paged: tuple[LoadedModel, LoadedModel],
) -> None:
    pair = learn_pair(*paged, ([5, 17, 80], [5, 17, 80]), (0, 0))
    assert pair.streams
    assert pair.same_design
    assert pair.same_blocks == (False,) * 4
    assert pair.n_common == 0
