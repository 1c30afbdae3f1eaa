"""Blocks that need not run: what two models have in common runs once, and every number stays as it was."""

from __future__ import annotations

from collections import Counter, UserDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import BatchEncoding, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicIndexedLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import lazarus
from architectures import CAUSAL, ENCODER_DECODERS, ENCODERS, MULTIMODAL, REFUSED, UNBUILDABLE, build, swept
from factories import perturbed, tiny_llama, word_tokenizer
from lazarus.batches import BatchPair, make_batches
from lazarus.engine import ModelPair, learn_pair, run_pairs
from lazarus.engine.arguments import Arguments, contents, write_again, written
from lazarus.engine.probe import passes_go_on
from lazarus.engine.recorder import Recorder, RowSelection
from lazarus.engine.replay import (
    Passed,
    Returned,
    UnlikeError,
    can_replay,
    recording,
    replaying,
    stopping_after,
    stopping_before,
)
from lazarus.errors import UnsupportedModelError
from lazarus.models import Equality, dissect, wrap_model
from lazarus.models.adapters import share_storage
from lazarus.notes import Notes
from lazarus.sites import StatePair
from lazarus.tokens import TokenizedPrompt

IDS = [[5, 17, 80, 3, 41], [9], [12, 77, 31], [64, 27, 50, 23, 8, 91, 36, 70, 19]]
TEXTS = [" ".join(f"t{i}" for i in ids) for ids in IDS]
COMPARED = [
    name
    for name in (*CAUSAL, *ENCODERS, *ENCODER_DECODERS, *MULTIMODAL)
    if name not in UNBUILDABLE and name not in REFUSED
]
NOT_REPLAYED = {
    "albert:masked": "one block runs several times",
    "dory": "one block runs several times",
    "hrm_text": "one block runs several times",
    "inkling2_loop_text": "later blocks read what earlier ones returned",
    "inkling2_text": "later blocks read what earlier ones returned",
}
"""Architectures whose pass does not go on from its last block's states alone, and why."""


def twin_of(base: PreTrainedModel, changed: Sequence[int] = ()) -> PreTrainedModel:
    """A second model over base's weights, some of its blocks with weights of their own."""
    twin = share_storage(base).eval()
    for index in changed:
        block: Any = dissect(twin).blocks[index]
        block.load_state_dict(perturbed(block, 0.3).state_dict(), assign=True)
    return twin


def pair_of(base: PreTrainedModel, finetuned: PreTrainedModel) -> ModelPair:
    models = wrap_model(base, "base"), wrap_model(finetuned, "finetuned")
    return learn_pair(*models, (IDS[3], IDS[3]), (0, 0))


def apart(pair: ModelPair) -> ModelPair:
    """The same pair, each of its models run whole."""
    return replace(pair, n_common=0, same_blocks=(False,) * len(pair.same_blocks))


def batches_for(pair: ModelPair, batch_tokens: int, n_prompts: int = len(IDS)) -> list[BatchPair]:
    prompts = [TokenizedPrompt(i, ids) for i, ids in enumerate(IDS[:n_prompts])]
    return BatchPair.same(make_batches(prompts, batch_tokens, pair.padding(9), 0))


def states_of(pair: ModelPair, batch_tokens: int = 12, localize: bool = True) -> list[StatePair]:
    batches = batches_for(pair, batch_tokens)
    return list(run_pairs(pair, batches, "all", lambda _: None, localize=localize))


def bits(states: Tensor | None) -> bytes | None:
    return None if states is None else states.contiguous().view(torch.uint8).numpy().tobytes()


def assert_same_bits(found: Sequence[StatePair], expected: Sequence[StatePair]) -> None:
    assert [(f.site, f.prompts.tolist()) for f in found] == [(e.site, e.prompts.tolist()) for e in expected]
    for f, e in zip(found, expected, strict=True):
        for name in ("base", "finetuned", "local"):
            assert bits(getattr(f, name)) == bits(getattr(e, name)), (f.site, name)


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """While it lasts: of each block that computes, its index and the number of tokens in a row."""
    calls: list[tuple[int, int]] = []
    with ExitStack() as stack:
        for index, block in enumerate(dissect(model).blocks):

            def hook(_m: nn.Module, _a: Any, states: Tensor, index: int = index) -> None:
                calls.append((index, states.shape[1]))

            stack.callback(block.get_submodule("mlp").register_forward_hook(hook).remove)
        yield calls


def runs(calls: Sequence[tuple[int, int]]) -> dict[int, int]:
    """How often each block ran."""
    return dict(Counter(index for index, _ in calls))


# Which passes go on without their first blocks


@pytest.mark.parametrize("name", swept(COMPARED))
def test_a_pass_goes_on_after_any_of_its_blocks_or_is_known_not_to(name: str) -> None:
    model = wrap_model(build(name), name)
    counts = range(len(model.anatomy.blocks))
    assert passes_go_on(model, IDS[3], 0, counts) == (name not in NOT_REPLAYED)


def test_a_pass_whose_later_blocks_read_earlier_states_does_not_go_on() -> None:
    """Found on a model that no list names: its third block adds what left the first."""
    model = tiny_llama()
    blocks = model.model.layers
    left: list[Tensor] = []
    blocks[0].register_forward_hook(lambda _m, _a, output: left.append(output))
    blocks[2].register_forward_pre_hook(lambda _m, args: (args[0] + left[-1], *args[1:]))
    assert not passes_go_on(wrap_model(model, "m"), IDS[3], 0, range(4))


# Blocks that both models have in common


@pytest.mark.parametrize("name", swept(COMPARED))
def test_every_architecture_gives_what_it_gives_without_sharing(name: str) -> None:
    """The last block changed: all before it run once, where the architecture lets them.

    Some products take another kernel where a weight requires gradients; a twin's never do, so base's do not.
    """
    base = build(name).requires_grad_(False)
    last = len(dissect(base).blocks) - 1
    pair = pair_of(base, twin_of(base, [last]))
    assert pair.n_common == (0 if name in NOT_REPLAYED else pair.same_blocks.index(False))
    batches = batches_for(pair, batch_tokens=24, n_prompts=2)
    found, expected = (
        list(run_pairs(p, batches, "all", lambda _: None, localize=True)) for p in (pair, apart(pair))
    )
    assert_same_bits(found, expected)
    common = {"embedding", *range(pair.n_common)}
    assert all((bits(s.base) == bits(s.finetuned)) or s.site not in common for s in found)
    assert any(bits(s.base) != bits(s.finetuned) for s in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_tokens", [1, 12, 10_000])
@pytest.mark.parametrize("changed", [1, 2, 3])
def test_blocks_before_the_first_changed_one_run_once(
    changed: int, batch_tokens: int, dtype: torch.dtype
) -> None:
    base = tiny_llama().to(dtype)
    pair = pair_of(base, finetuned := twin_of(base, [changed]))
    n_batches = len(batches_for(pair, batch_tokens))
    with counted(base) as ours, counted(finetuned) as theirs:
        found = states_of(pair, batch_tokens, localize=False)
    assert runs(ours) == dict.fromkeys(range(4), n_batches)
    assert runs(theirs) == dict.fromkeys(range(changed, 4), n_batches)
    assert_same_bits(found, states_of(apart(pair), batch_tokens, localize=False))


def test_a_changed_first_block_leaves_nothing_to_share() -> None:
    base = tiny_llama()
    pair = pair_of(base, finetuned := twin_of(base, [0]))
    with counted(finetuned) as theirs:
        states_of(pair, 10_000, localize=False)
    assert runs(theirs) == dict.fromkeys(range(4), len(batches_for(pair, 10_000)))
    pair.note_run(9, notes := Notes())
    assert notes.texts == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert:masked", "gemma3n_text", "mamba"])
def test_a_model_against_its_twin_is_exactly_0_and_does_not_run_twice(name: str) -> None:
    base = build(name)
    pair = pair_of(base, finetuned := twin_of(base))
    called: list[nn.Module] = []
    for block in dissect(finetuned).blocks:
        for part in block.children():
            part.register_forward_hook(lambda module, _a, _o: called.append(module))
    found = states_of(pair)
    assert called == []
    sites = {s.site for s in found}
    assert {"embedding", *range(pair.base_conventions.n_layers)} <= sites
    for states in found:
        assert bits(states.base) == bits(states.finetuned)
        assert states.local is None or bits(states.base) == bits(states.local)


def test_one_model_against_itself_runs_each_block_once() -> None:
    base = tiny_llama()
    pair = pair_of(base, base)
    with counted(base) as calls:
        found = states_of(pair)
    assert runs(calls) == dict.fromkeys(range(4), len(batches_for(pair, 12)))
    assert all(bits(states.base) == bits(states.finetuned) for states in found)


def test_localize_calls_no_block_that_is_the_same() -> None:
    """Block 2 alone runs on base's states; blocks 2 and 3 run on the fine-tuned model's own."""
    base = tiny_llama()
    pair = pair_of(base, finetuned := twin_of(base, [2]))
    n_batches = len(batches_for(pair, 12))
    with counted(finetuned) as theirs:
        found = states_of(pair)
    assert runs(theirs) == {2: 2 * n_batches, 3: n_batches}
    local = {s.site: bits(s.local) == bits(s.base) for s in found if isinstance(s.site, int)}
    assert local == {0: True, 1: True, 2: False, 3: True}
    assert_same_bits(found, states_of(apart(pair)))


# What enters the blocks must be the same too


def lengths_run_whole(pair: ModelPair, finetuned: PreTrainedModel) -> set[int]:
    """The lengths of the prompts, each in a batch of its own, on which the second model's block 0 ran."""
    with counted(finetuned) as theirs:
        found = states_of(pair, batch_tokens=1, localize=False)
    assert_same_bits(found, states_of(apart(pair), batch_tokens=1, localize=False))
    assert {length for index, length in theirs if index == 3} == {5, 1, 3, 9}
    return {length for index, length in theirs if index == 0}


@pytest.mark.parametrize(("token", "lengths"), [(77, {3}), (9, {1}), (19, {9}), (99, set())])
def test_batches_with_a_token_of_another_embedding_run_whole(token: int, lengths: set[int]) -> None:
    """And only those: a token that no prompt has changes none."""
    base = tiny_llama()
    finetuned = twin_of(base, [3])
    rows = base.model.embed_tokens.weight.detach().clone()
    rows[token] += 0.1
    finetuned.get_input_embeddings().weight = nn.Parameter(rows)
    pair = pair_of(base, finetuned)
    assert pair.n_common == 3
    assert lengths_run_whole(pair, finetuned) == lengths


def test_other_rotations_are_other_arguments() -> None:
    """The first token's position is 0 and turns nothing, so a prompt of it alone is still shared."""
    base = tiny_llama()
    finetuned: Any = twin_of(base, [3])
    finetuned.model.rotary_emb.inv_freq = base.model.rotary_emb.inv_freq * 0.5
    assert lengths_run_whole(pair_of(base, finetuned), finetuned) == {3, 5, 9}


def test_another_configuration_shares_nothing() -> None:
    base = tiny_llama()
    finetuned = twin_of(base, [3])
    finetuned.config.rms_norm_eps = 1e-3
    pair = pair_of(base, finetuned)
    assert pair.n_common == 0
    assert lengths_run_whole(pair, finetuned) == {1, 3, 5, 9}


def test_two_readings_of_the_prompts_share_nothing() -> None:
    """Where each model has a tokenizer of its own, a batch of one is no batch of the other."""
    base = tiny_llama()
    pair = pair_of(base, finetuned := twin_of(base, [3]))
    same = batches_for(pair, 12)
    others = [BatchPair(batch.base, replace(batch.base)) for batch in same]
    with counted(finetuned) as theirs:
        found = list(run_pairs(pair, others, "mean", lambda _: None))
    assert runs(theirs) == dict.fromkeys(range(4), len(same))
    assert_same_bits(found, list(run_pairs(pair, same, "mean", lambda _: None)))


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        (
            1,
            "block 0 is the same in both models, bit for bit, and ran once for both where the same states "
            "entered them",
        ),
        (
            3,
            "blocks 0 to 2 are the same in both models, bit for bit, and ran once for both where the same "
            "states entered them",
        ),
    ],
)
def test_a_note_tells_which_blocks_ran_once(changed: int, note: str) -> None:
    base = tiny_llama()
    diff = lazarus.activation_diff(base, twin_of(base, [changed]), TEXTS, tokenizer=word_tokenizer())
    assert note in diff.notes
    assert [layer.divergence == 0.0 for layer in diff.layers] == [i < changed for i in range(4)]


# One pass, replaced and put back


class _Pass:
    """A tiny Llama on one prompt."""

    def __init__(self) -> None:
        self.model = tiny_llama()
        self.blocks = tuple(self.model.model.layers)
        self.recorder = Recorder(wrap_model(self.model, "m"))

    def run(self, ids: Sequence[int] = IDS[0]) -> Tensor:
        rows = torch.tensor([ids])
        take = RowSelection(torch.Tensor.detach, torch.Tensor.clone)
        final = self.recorder.run(rows, torch.ones_like(rows), take).final
        assert final is not None
        return final

    def first(self, n_blocks: int) -> Passed:
        passed = Passed()
        with recording(self.blocks[:n_blocks], passed.add):
            self.run()
        return passed


def is_as_it_was(blocks: Sequence[nn.Module]) -> bool:
    untouched = all("forward" not in vars(block) for block in blocks)
    return untouched and not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 4])
def test_replayed_blocks_do_not_run_and_the_end_is_the_same(n_blocks: int) -> None:
    one = _Pass()
    end, passed = one.run(), one.first(n_blocks)
    with counted(one.model) as calls, replaying(one.blocks[:n_blocks], passed, verify=True):
        assert torch.equal(one.run(), end)
    assert runs(calls) == dict.fromkeys(range(n_blocks, 4), 1)
    assert is_as_it_was(one.blocks)


def test_a_record_goes_through_plain_parts() -> None:
    one = _Pass()
    end, passed = one.run(), one.first(2)
    with replaying(one.blocks[:2], Passed.of_parts(passed.parts()), verify=False):
        assert torch.equal(one.run(), end)


def test_a_call_with_other_arguments_is_told_and_the_blocks_are_put_back() -> None:
    one = _Pass()
    end, passed = one.run(), one.first(2)
    for other in (IDS[3], [6, *IDS[0][1:]]):
        with pytest.raises(UnlikeError), replaying(one.blocks[:2], passed, verify=True):
            one.run(other)
        assert is_as_it_was(one.blocks)
    assert torch.equal(one.run(), end)


def test_the_blocks_are_put_back_when_a_pass_fails() -> None:
    one = _Pass()
    end, passed = one.run(), one.first(2)

    def fail(_module: nn.Module, _args: Any) -> None:
        raise RuntimeError("no room")

    handle = one.blocks[3].register_forward_pre_hook(fail)
    with (
        pytest.raises(UnsupportedModelError, match="no room"),
        replaying(one.blocks[:2], passed, verify=True),
    ):
        one.run()
    handle.remove()
    assert is_as_it_was(one.blocks)
    assert torch.equal(one.run(), end)


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_a_forward_of_the_module_s_own_is_put_back(fails: bool) -> None:
    """Libraries that move a block between devices put one there."""
    one = _Pass()
    plain = one.blocks[0].forward

    def halved(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = plain(states * 0.5, *args, **kwargs)
        return output

    one.blocks[0].forward = halved
    end, passed = one.run(), one.first(2)
    if fails:
        with pytest.raises(UnlikeError), replaying(one.blocks[:2], passed, verify=True):
            one.run(IDS[3])
    else:
        with replaying(one.blocks[:2], passed, verify=True):
            assert torch.equal(one.run(), end)
    assert vars(one.blocks[0])["forward"] is halved
    assert is_as_it_was(one.blocks[1:])
    assert torch.equal(one.run(), end)


def test_a_pass_ends_before_or_after_a_block() -> None:
    one = _Pass()
    end = one.run()
    received: list[Arguments] = []
    with counted(one.model) as calls, stopping_before(one.blocks[2], received):
        one.run()
    assert runs(calls) == {0: 1, 1: 1}
    assert torch.equal(received[0].args[0].tensor, _states_of(one.first(2)))
    with counted(one.model) as calls, stopping_after(one.blocks[2]):
        one.run()
    assert runs(calls) == {0: 1, 1: 1, 2: 1}
    assert is_as_it_was(one.blocks)
    assert torch.equal(one.run(), end)


def _states_of(passed: Passed) -> Tensor:
    assert passed.states is not None
    return passed.states


@pytest.mark.parametrize(
    "make",
    [
        lambda states: states,
        lambda states: (states, None, 7),
        lambda states: [states, torch.arange(3)],
        lambda states: {"states": states, "router": torch.arange(3)},
        lambda states: BaseModelOutput(last_hidden_state=states, attentions=(torch.arange(3),)),
    ],
    ids=["tensor", "tuple", "list", "dict", "output"],
)
def test_whatever_a_block_returns_is_made_again(make: Any) -> None:
    output, others = make(torch.zeros(2)), make(torch.ones(2))
    found = Returned.of(output).whole(torch.ones(2))
    assert type(found) is type(output)
    assert repr(found) == repr(others)


# What is the same call


def call_of(*args: Any, **kwargs: Any) -> Arguments:
    return Arguments.of(args, kwargs)


def is_same(one: Arguments, other: Arguments, n_layers: int | None = None) -> bool:
    answer = one.same_as(other, Equality(), n_layers)
    assert other.same_as(one, Equality(), n_layers) is answer
    return answer


def cache_of(*values: float) -> DynamicCache:
    """A KV cache with one token, of this value, in each layer."""
    cache = DynamicCache()
    for layer, value in enumerate(values):
        cache.update(torch.full((1, 1, 1, 2), value), torch.full((1, 1, 1, 2), -value), layer)
    return cache


def mask_of(length: int, window: int = 4) -> BlockMask:
    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return create_block_mask(sees, None, None, length, length, device="cpu", BLOCK_SIZE=16)


@dataclass
class Shared:
    """What blocks might pass on in an object of their own."""

    keys: Tensor
    n_tokens: int = 1


@pytest.mark.parametrize(
    "make",
    [
        lambda value: torch.full((2,), value),
        lambda value: value,
        lambda value: (None, [torch.full((2,), value)]),
        lambda value: {"sliding": torch.full((2,), value), "full": None},
        lambda value: UserDict(sliding=torch.full((2,), value)),
        lambda value: BatchEncoding({"ids": torch.full((2,), value)}),
        lambda value: BaseModelOutput(last_hidden_state=torch.full((2,), value)),
        lambda value: Shared(torch.full((2,), value)),
        lambda value: Shared(torch.ones(2), n_tokens=value),
        lambda value: cache_of(1.0, value),
        lambda value: mask_of(64, int(value)),
        lambda value: torch.float16 if value > 2 else torch.bfloat16,
        lambda value: partial(torch.clamp, min=value),
    ],
    ids=[
        *("tensor", "float", "tuple", "dict", "mapping", "encoding", "output"),
        *("dataclass", "count", "cache", "mask", "dtype", "partial"),
    ],
)
def test_a_call_is_the_same_where_all_of_it_is(make: Callable[[float], Any]) -> None:
    assert is_same(call_of(make(2.0)), call_of(make(2.0)))
    assert not is_same(call_of(make(2.0)), call_of(make(3.0)))
    assert is_same(call_of(None, past=make(2.0)), call_of(None, past=make(2.0)))
    assert not is_same(call_of(None, past=make(2.0)), call_of(None, past=make(3.0)))
    assert not is_same(call_of(make(2.0)), call_of(make(2.0), more=None))


def test_not_a_number_is_the_same_argument_as_itself() -> None:
    nan = float("nan")
    assert is_same(call_of(nan, torch.tensor([nan])), call_of(float("nan"), torch.tensor([nan])))
    assert not is_same(call_of(0.0), call_of(-0.0))


@pytest.mark.parametrize("make", [object, lambda: iter([1]), StaticLayer, tiny_llama])
def test_what_cannot_be_looked_into_is_not_the_same_though_it_be_one_object(make: Any) -> None:
    one = make() if make is not StaticLayer else StaticLayer(max_cache_len=4)
    assert not is_same(call_of(one), call_of(one))
    assert not is_same(call_of([1, {"a": one}]), call_of([1, {"a": one}]))


@pytest.mark.parametrize(
    "values",
    [
        (torch.ones(2), [1.0, 1.0]),
        ((1, 2), [1, 2]),
        ({"a": 1}, UserDict(a=1)),
        (cache_of(1.0), None),
        (Shared(torch.ones(2)), torch.ones(2)),
        (1, 1.0),
        (object(), None),
    ],
    ids=["tensor", "tuple", "dict", "cache", "dataclass", "int", "unknown"],
)
def test_values_of_two_kinds_are_not_the_same(values: tuple[Any, Any]) -> None:
    one, other = values
    assert not is_same(call_of(one), call_of(other))


def test_the_hidden_states_alone_can_be_left_out_of_a_call() -> None:
    states, others = torch.ones(2), torch.zeros(2)
    assert is_same(call_of(states, 1).without_states(), call_of(others, 1).without_states())
    assert not is_same(call_of(states, 1).without_states(), call_of(states, 2).without_states())
    assert not is_same(call_of(states, a=1).without_states(), call_of(states, a=2).without_states())


def test_the_same_bits_on_another_device_are_another_argument() -> None:
    """The kernels of another device round otherwise. A tensor without memory stands for one on a GPU."""

    class Alike(Equality):
        def same(self, one: Any, other: Any) -> bool:
            return True

    here, again, there = (call_of(torch.ones(2, device=place)) for place in ("cpu", "cpu", "meta"))
    assert here.same_as(again, Alike())
    assert not here.same_as(there, Alike())


def test_a_cache_with_more_layers_is_another_unless_the_others_alone_are_read() -> None:
    one, other = cache_of(1.0), cache_of(1.0, 2.0)
    assert not is_same(call_of(one), call_of(other))
    assert is_same(call_of(one), call_of(other), 1)


def test_a_layer_of_a_cache_that_holds_more_is_another() -> None:
    one, other = cache_of(1.0), cache_of(1.0)
    other.layers[0].more = 1
    assert not is_same(call_of(one), call_of(other))


def test_a_cache_of_another_kind_is_not_looked_into() -> None:
    one, other = cache_of(1.0), cache_of(1.0)
    assert is_same(call_of(one), call_of(other))
    for cache in (one, other):
        cache.layers[0].__class__ = DynamicIndexedLayer
    assert not is_same(call_of(one), call_of(other))


@pytest.mark.parametrize(("n_layers", "expected"), [(None, False), (3, False), (2, True), (1, True)])
def test_what_later_layers_of_a_cache_hold_is_not_read(n_layers: int | None, expected: bool) -> None:
    one, other = cache_of(1.0, 2.0, 3.0), cache_of(1.0, 2.0, 4.0)
    assert is_same(call_of(one), call_of(other), n_layers) is expected


class Labelled(UserDict[str, Any]):
    """A mapping that says more than its items do."""


class Owned(dict[str, Any]):
    """The same, and its items are not in an attribute."""


@pytest.mark.parametrize(("kind", "name"), [(Labelled, "label"), (Owned, "label"), (Owned, "data")])
def test_what_a_mapping_holds_beside_its_items_counts(kind: Any, name: str) -> None:
    one, other = kind(a=1), kind(a=1)
    assert is_same(call_of(one), call_of(other))
    setattr(other, name, 1)
    assert not is_same(call_of(one), call_of(other))


@pytest.mark.parametrize(("layer", "n_layers"), [(0, 2), (1, 2), (3, 4)])
def test_as_many_layers_of_a_cache_are_compared_as_there_are_blocks_or_as_they_write_to(
    layer: int, n_layers: int
) -> None:
    """A block need not write into the layer of its own number."""
    one, passed = _Pass(), Passed()
    attention: Any = one.blocks[0].self_attn
    attention.layer_idx = layer
    rows = torch.tensor([IDS[0]])
    with recording(one.blocks[:2], passed.add), torch.no_grad():
        one.model(rows, use_cache=True)
    assert passed.n_layers == n_layers


def written_tensor() -> tuple[Any, Callable[[], Any]]:
    tensor = torch.ones(2)
    return tensor, lambda: tensor.add_(1)


def written_list() -> tuple[Any, Callable[[], Any]]:
    items: list[Any] = []
    return items, lambda: items.append(torch.ones(1))


def written_mapping() -> tuple[Any, Callable[[], Any]]:
    items: dict[str, Any] = {}
    return items, lambda: items.update(keys=torch.ones(1))


def written_cache() -> tuple[Any, Callable[[], Any]]:
    cache = cache_of(1.0)
    return cache, lambda: cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)


def written_object() -> tuple[Any, Callable[[], Any]]:
    shared = Shared(torch.ones(1))
    return shared, lambda: setattr(shared, "n_tokens", 2)


@pytest.mark.parametrize(
    "make", [written_tensor, written_list, written_mapping, written_cache, written_object]
)
def test_one_object_that_was_written_to_since_is_another_argument(
    make: Callable[[], tuple[Any, Callable[[], Any]]],
) -> None:
    value, write = make()
    before, again = call_of(value), call_of(value)
    assert is_same(before, again)
    write()
    assert not is_same(before, call_of(value))


def test_a_tensor_of_inference_mode_does_not_tell_whether_it_was_written_to() -> None:
    with torch.inference_mode():
        one = torch.ones(2)
    assert not is_same(call_of(one), call_of(one))


TENSOR = torch.ones(1)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, TENSOR),
        (TENSOR, torch.zeros(1)),
        (TENSOR, {"keys": TENSOR}),
        ({"keys": TENSOR}, TENSOR),
        ({"keys": TENSOR}, {"keys": TENSOR, "values": TENSOR}),
        ({"keys": TENSOR, "values": TENSOR}, {"keys": TENSOR}),
        ({"keys": TENSOR, "values": TENSOR}, {"keys": TENSOR, "values": torch.zeros(1)}),
    ],
)
def test_what_a_block_writes_into_a_mapping_is_written_into_another(before: Any, after: Any) -> None:
    shared, another = {"entry": before, "kept": 1}, {"entry": before, "kept": 2}
    held = contents((shared,), {})
    shared["entry"] = after
    items = written(held, contents((shared,), {}))
    write_again((), {"shared": another}, items)
    assert Equality().same(another, {"entry": after, "kept": 2})


def test_a_layer_that_a_block_adds_to_a_cache_is_known_to_be_written() -> None:
    cache = cache_of(1.0)
    held = contents((), {"past": cache})
    states = torch.full((1, 1, 1, 2), 3.0)
    cache.update(states, -states, 1)
    (items,) = written(held, contents((), {"past": cache}))
    assert items.keys() == {1}
    assert torch.equal(items[1]["keys"], states)


class Handing(LlamaDecoderLayer):  # type: ignore[misc]  # transformers does not say what it is
    """A block that scales by what stands in a mapping, and writes there for the next one."""

    def forward(self, *args: Any, shared: dict[str, Tensor], **kwargs: Any) -> Tensor:
        shared["scale"] = shared["scale"] + 0.5
        states: Tensor = super().forward(*args, **kwargs)
        return states * shared["scale"]


def handing(scale: float, model: PreTrainedModel) -> PreTrainedModel:
    """The model with such blocks, which get a mapping with this scale in each pass."""

    def begin(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "shared": {"scale": torch.tensor(scale)}}

    model.base_model.register_forward_pre_hook(begin, with_kwargs=True)
    for block in dissect(model).blocks:
        block.__class__ = Handing
    return model


def test_what_stood_in_a_mapping_before_the_blocks_is_an_argument() -> None:
    """Base's blocks were handed 1.0, and the fine-tuned model's 2.0, beside the same hidden states."""
    base = handing(1.0, tiny_llama())
    finetuned = handing(2.0, twin_of(base, [3]))
    pair = pair_of(base, finetuned)
    assert pair.n_common == 3
    assert lengths_run_whole(pair, finetuned) == {1, 3, 5, 9}


def test_what_blocks_write_into_a_mapping_is_there_for_later_ones() -> None:
    base = handing(1.0, tiny_llama())
    finetuned = twin_of(base, [2])
    pair = pair_of(base, finetuned)
    assert pair.n_common == 2
    assert lengths_run_whole(pair, finetuned) == set()


# --- Passes made by hand


class Doubled(nn.Module):
    """A block that does not look at its step."""

    def forward(self, states: Tensor, step: int = 0) -> Tensor:
        return states * 2


def two_blocks() -> tuple[nn.Module, nn.Module]:
    return Doubled(), Doubled()


@pytest.mark.parametrize(("counts", "expected"), [([], True), ([0], False), ([1], False), ([0, 1], False)])
def test_a_pass_whose_first_block_gets_another_argument_each_time_goes_on_from_nowhere(
    counts: list[int], expected: bool
) -> None:
    first, second = two_blocks()
    steps = iter(range(9))
    states = torch.ones(1, 2, 3)
    assert can_replay((first, second), lambda: second(first(states, step=next(steps))), counts) is expected


@pytest.mark.parametrize(("n_runs", "expected"), [(1, False), (9, True)])
def test_a_pass_that_leaves_a_block_out_the_second_time_does_not_go_on(n_runs: int, expected: bool) -> None:
    first, second = two_blocks()
    runs_left = iter(range(n_runs))

    def run() -> Tensor:
        states: Tensor = first(torch.ones(1, 2, 3))
        return second(states) if next(runs_left, None) is not None else states * 2

    assert can_replay((first, second), run, [1]) is expected


class Pair(NamedTuple):
    states: Tensor
    scale: float


@pytest.mark.parametrize("kind", [Pair, BaseModelOutput, tuple, dict])
def test_what_a_block_returned_is_made_again_around_its_states(kind: Any) -> None:
    states, others = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    made = {
        Pair: Pair(states, 2.0),
        BaseModelOutput: BaseModelOutput(states, (others,)),
        tuple: (states, "more"),
        dict: {"states": states, "more": 1},
    }[kind]
    found = Returned.of(made).whole(states)
    assert type(found) is type(made)
    assert Equality().same(found, made) is True


def test_what_several_blocks_wrote_is_written_by_the_first_of_them_when_it_comes_from_parts() -> None:
    passed = Passed(
        torch.ones(1),
        [Returned(Tensor, None, ())] * 3,
        [[{"a": 1}, {}], [{"b": 2}, {}], [{"a": 3}, {"c": 4}]],
    )
    found = Passed.of_parts(passed.parts())
    assert found.returned == passed.returned
    assert found.written == [[{"a": 3, "b": 2}, {"c": 4}], [{}, {}], [{}, {}]]
