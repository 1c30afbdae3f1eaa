"""One block at a time over all batches: bit for bit what both models in memory give, and each block once."""

from __future__ import annotations

import copy
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import psutil
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from architectures import CAUSAL, ENCODER_DECODERS, ENCODERS, MULTIMODAL, REFUSED, UNBUILDABLE, build, swept
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from lazarus.batches import BatchPair, TokenBatch, make_batches
from lazarus.engine import ModelPair, NoisePlan, Work, learn_pair, run
from lazarus.engine.streamed import KEPT_SHARE, run_streamed
from lazarus.errors import SaveError
from lazarus.models import (
    LoadOptions,
    Pager,
    dissect,
    layout,
    load_paged,
    parse_model,
    shared_blocks,
    wrap_model,
)
from lazarus.models.adapters import share_storage
from lazarus.sites import Position, StatePair
from lazarus.tokens import TokenizedPrompt

NOT_STREAMED = ("albert:masked", "dory", "hrm_text", "inkling2_loop_text", "inkling2_text")
"""Architectures whose pass does not go on after a block (tests/test_replay.py says why)."""
STREAMED = [
    name
    for name in (*CAUSAL, *ENCODERS, *ENCODER_DECODERS, *MULTIMODAL)
    if name not in UNBUILDABLE and name not in REFUSED and name not in NOT_STREAMED
]
IDS = [5, 17, 80, 3, 41, 9, 64, 27, 50]
LENGTHS = (5, 1, 9)

Key = tuple[int | None, Any, tuple[int, ...]]
Pairs = dict[Key, list[StatePair]]


def work_for(
    pair: ModelPair, position: Position, n_sampled: int = 2, lengths: Sequence[int] = LENGTHS
) -> Work:
    """Batches of random prompts, and the first of them to measure the noise on."""
    generator = torch.Generator().manual_seed(1)
    prompts = [
        TokenizedPrompt(i, torch.randint(0, 99, (n,), generator=generator).tolist())
        for i, n in enumerate(lengths)
    ]
    padding = pair.padding(max(lengths))
    batches = BatchPair.same(make_batches(prompts, 20, padding, 0))
    sample = make_batches(prompts[:n_sampled], 20, padding, 0)
    noise = NoisePlan(max(1, n_sampled), 20, position, padding, 0)
    return Work(batches, sample, noise, position, pair.same_shape)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Gives the machine so much free memory that waiting states may take so many bytes of it."""

    def keep(n_bytes: int) -> None:
        free = SimpleNamespace(available=KEPT_SHARE * n_bytes)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)

    return keep


def bytes_of_first(pair: ModelPair, work: Work) -> int:
    """So much memory that both models' states of the first batch stay there, and the others wait in files."""
    batch = work.batches[0].base
    return 2 * len(batch.members) * batch.padded_length * pair.base_conventions.width * 4


def streamed(pair: ModelPair, work: Work) -> Pairs:
    return by_site(run_streamed(pair, work, lambda _: None))


def resident(pair: ModelPair, work: Work) -> Pairs:
    return by_site(run(pair, work, lambda _: None))


def by_site(pairs: Iterable[StatePair]) -> Pairs:
    """Each trial's pairs at each site of each batch, whatever the order in which they come."""
    found: Pairs = {}
    for states in pairs:
        found.setdefault((states.trial, states.site, tuple(states.prompts.tolist())), []).append(states)
    return found


def assert_same_bits(found: Pairs, expected: Pairs) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        for f, e in zip(found[key], expected[key], strict=True):
            for name in ("base", "finetuned", "local"):
                assert bits(getattr(f, name)) == bits(getattr(e, name)), (key, name)


def bits(states: Tensor | None) -> bytes | None:
    return None if states is None else states.contiguous().view(torch.uint8).numpy().tobytes()


def pair_of(
    base: PreTrainedModel, finetuned: PreTrainedModel, align: Literal["ids", "text"] = "ids"
) -> ModelPair:
    models = wrap_model(base, "base"), wrap_model(finetuned, "finetuned")
    return learn_pair(*models, (IDS, IDS), (0, 0), align)


def twin_of(base: PreTrainedModel, changed: Sequence[int] = ()) -> PreTrainedModel:
    """A second model over base's weights, some of its blocks with weights of their own."""
    twin = share_storage(base).eval()
    for index in changed:
        block: Any = dissect(twin).blocks[index]
        block.load_state_dict(perturbed(block, 0.3).state_dict(), assign=True)
    return twin


# The same numbers, bit for bit


@pytest.mark.parametrize("name", swept(STREAMED))
def test_every_architecture_gives_what_it_gives_in_memory(name: str, keeping: Callable[[int], None]) -> None:
    """Every site, each block's own change, and every trial of the noise."""
    base = build(name)
    pair = pair_of(base, perturbed(base))
    work = work_for(pair, "all")
    keeping(bytes_of_first(pair, work))
    expected = resident(pair, work)
    assert_same_bits(streamed(pair, work), expected)
    assert {trial for trial, _, _ in expected} >= {None, 0, 1}
    assert {site for _, site, _ in expected} >= set(pair.sites)


def n_spilled(folder: Path) -> int:
    """Return how many files wait in a run's folder, beside its lock."""
    return sum(path.is_file() and path.name != "lock" for path in folder.rglob("*"))


@pytest.mark.parametrize("position", ["last", "mean", "all", 0, -1])
@pytest.mark.parametrize("kept_bytes", [0, 3000, 10**9])
def test_every_position_with_any_memory(
    kept_bytes: int, position: Position, keeping: Callable[[int], None], folder: Path
) -> None:
    """All of what waits in files, some of it, and none."""
    keeping(kept_bytes)
    base = tiny_llama()
    pair = pair_of(base, perturbed(base))
    work = work_for(pair, position)
    n_files: list[int] = []
    tagged = run_streamed(pair, work, lambda _: n_files.append(n_spilled(folder)))
    assert_same_bits(by_site(tagged), resident(pair, work))
    n_passes = 2 * len(work.batches) + 2 * len(work.sample)
    waiting = n_files[len(work.batches) + len(work.sample) - 1]  # after the first block
    if kept_bytes == 3000:
        assert 0 < waiting < n_passes
    else:
        assert waiting == (0 if kept_bytes else n_passes)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert:masked", "gemma3n_text", "mamba2"])
def test_every_architecture_s_states_wait_in_bfloat16_too(name: str, keeping: Callable[[int], None]) -> None:
    base = build(name).to(torch.bfloat16)
    pair = pair_of(base, perturbed(base))
    work = work_for(pair, "mean")
    expected = resident(pair, work)
    for kept_bytes in (0, 10**9):
        keeping(kept_bytes)
        assert_same_bits(streamed(pair, work), expected)


@pytest.mark.parametrize("n_layers", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("width", [32, 48])
def test_models_of_another_depth_and_width(width: int, n_layers: int, keeping: Callable[[int], None]) -> None:
    """Blocks of either that have no counterpart run too, and come to the same end."""
    pair = pair_of(tiny_llama(), tiny_llama(seed=4, num_hidden_layers=n_layers, hidden_size=width))
    work = work_for(pair, "mean")
    keeping(bytes_of_first(pair, work))
    assert_same_bits(streamed(pair, work), resident(pair, work))


def test_a_base_of_one_block_is_compared_at_every_site() -> None:
    """What enters the other model is compared too, though only its last block is base's counterpart."""
    pair = pair_of(tiny_llama(num_hidden_layers=1), tiny_llama(seed=4, num_hidden_layers=3))
    work = work_for(pair, "mean")
    found = streamed(pair, work)
    assert_same_bits(found, resident(pair, work))
    assert {site for _, site, _ in found} == {"embedding", 0, "final_norm", "logits"}


@pytest.mark.parametrize("n_layers", [2, 4, 7])
def test_each_model_s_own_reading_of_the_prompts(n_layers: int) -> None:
    """Even of blocks that are the same: those of four layers are, and read other ids."""
    base = tiny_llama()
    finetuned = twin_of(base) if n_layers == 4 else tiny_llama(seed=4, num_hidden_layers=n_layers)
    pair = pair_of(base, finetuned, align="text")
    work = work_for(pair, "mean")
    theirs = [
        TokenBatch([TokenizedPrompt(m.index, [*m.ids, 7, 11]) for m in batch.base.members], 0)
        for batch in work.batches
    ]
    pairs = [BatchPair(ours.base, other) for ours, other in zip(work.batches, theirs, strict=True)]
    apart = replace(work, batches=pairs, localize=False)
    found = streamed(pair, apart)
    assert_same_bits(found, resident(pair, apart))
    assert any(bits(s.base) != bits(s.finetuned) for key in found if key[0] is None for s in found[key])


def test_without_noise_and_without_localize_there_is_neither() -> None:
    pair = pair_of(tiny_llama(), perturbed(tiny_llama()))
    work = replace(work_for(pair, "all", n_sampled=0), localize=False)
    found = streamed(pair, work)
    assert_same_bits(found, resident(pair, work))
    assert {trial for trial, _, _ in found} == {None}
    assert all(states.local is None for pairs in found.values() for states in pairs)


@pytest.mark.parametrize("changed", [[], [0], [2], [3], [1, 3]], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3n_text", "zamba"])
def test_blocks_that_are_the_same_change_nothing(
    name: str, changed: list[int], keeping: Callable[[int], None]
) -> None:
    """Against a run that takes none of them to be the same."""
    base = (tiny_llama() if name == "llama" else build(name)).requires_grad_(False)
    n_blocks = len(dissect(base).blocks)
    pair = pair_of(base, twin_of(base, sorted({index % n_blocks for index in changed})))
    whole = replace(pair, n_common=0, same_blocks=(False,) * n_blocks)
    work = work_for(pair, "all")
    keeping(bytes_of_first(pair, work))
    assert_same_bits(streamed(pair, work), resident(whole, work))


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_keys_that_a_changed_block_writes_for_later_ones_are_its_own(name: str) -> None:
    """Block 0 changes nothing but those: states stay the same up to the block that reads them."""
    base: Any = build(name).requires_grad_(False)
    before: Any = dissect(base).blocks[0]
    before.self_attn.o_proj.weight.zero_()
    finetuned = twin_of(base)
    attention: Any = dissect(finetuned).blocks[0].self_attn
    attention.v_proj.weight = nn.Parameter(attention.v_proj.weight * 2 + 0.1, requires_grad=False)
    pair = pair_of(base, finetuned)
    whole = replace(pair, n_common=0, same_blocks=(False,) * 4)
    work = work_for(pair, "all")
    expected = resident(whole, work)
    assert_same_bits(streamed(pair, work), expected)
    assert_same_bits(resident(pair, work), expected)
    alike = dict.fromkeys(range(4), True)
    for (trial, site, _), pairs in expected.items():
        if trial is None and site in alike:
            alike[site] &= all(bits(s.base) == bits(s.finetuned) for s in pairs)
    assert alike == {0: True, 1: True, 2: False, 3: False}


# What runs, and when


@contextmanager
def watched(**models: PreTrainedModel) -> Iterator[list[tuple[str, int, tuple[int, ...]]]]:
    """While it lasts: of each block that computes, its model, its index, and the shape of its states."""
    calls: list[tuple[str, int, tuple[int, ...]]] = []
    with ExitStack() as stack:
        for name, model in models.items():
            for index, block in enumerate(dissect(model).blocks):

                def hook(_m: nn.Module, _a: Any, states: Tensor, of: Any = (name, index)) -> None:
                    calls.append((*of, tuple(states.shape[:2])))

                stack.callback(block.get_submodule("mlp").register_forward_hook(hook).remove)
        yield calls


@pytest.mark.parametrize("n_layers", [2, 4, 7])
def test_each_block_runs_each_batch_once_and_the_next_begins_after_it(n_layers: int) -> None:
    base, finetuned = tiny_llama(), tiny_llama(seed=4, num_hidden_layers=n_layers)
    pair = pair_of(base, finetuned)
    work = replace(work_for(pair, "last", n_sampled=0), localize=False)
    shapes = Counter((len(b.base.members), b.base.padded_length) for b in work.batches)
    assert len(work.batches) > 1
    with watched(base=base, finetuned=finetuned) as calls:
        streamed(pair, work)
    for name, depth in (("base", 4), ("finetuned", n_layers)):
        own = [call for call in calls if call[0] == name]
        assert [index for _, index, _ in own] == [i for i in range(depth) for _ in work.batches]
        for index in range(depth):
            assert Counter(shape for _, i, shape in own if i == index) == shapes


def test_the_noise_runs_in_the_same_turn_of_each_block() -> None:
    base, finetuned = tiny_llama(), perturbed(tiny_llama())
    pair = pair_of(base, finetuned)
    work = work_for(pair, "last")
    with watched(base=base, finetuned=finetuned) as calls:
        streamed(pair, work)
    own = [index for name, index, _ in calls if name == "base"]
    assert own == sorted(own)
    assert len(set(Counter(own).values())) == 1
    assert Counter(own)[0] > len(work.batches)
    theirs = Counter(index for name, index, _ in calls if name == "finetuned")
    assert theirs == dict.fromkeys(range(4), 2 * len(work.batches))  # on its own states, and on base's


@pytest.mark.parametrize("run_work", [resident, streamed], ids=["resident", "streamed"])
@pytest.mark.parametrize("position", ["last", "mean", "all"])
def test_the_noise_is_the_same_where_its_batches_run_through_both_models_elsewhere(
    position: Position, run_work: Callable[[ModelPair, Work], Pairs]
) -> None:
    """As where the work is shared: then base alone runs the batches with prompts of the sample again."""
    base = tiny_llama()
    pair = pair_of(base, perturbed(base))
    work = work_for(pair, position, n_sampled=8, lengths=(5, 1, 9, 7, 7, 6, 3, 8, 2, 4))
    work = replace(work, noise=replace(work.noise, among_others=True))
    again = [b.base for b in work.batches if any(prompt < 8 for prompt in b.base.prompts)]
    parts = replace(work, sample=[]), replace(work, batches=[], again=again)
    run, noise = (run_work(pair, part) for part in parts)
    assert not any(trial is not None for trial, _, _ in run)
    assert {trial for trial, _, _ in noise} == {0, 1}
    assert_same_bits({**run, **noise}, run_work(pair, work))
    assert_same_bits({**run, **noise}, resident(pair, work))


def test_blocks_that_are_the_same_and_get_the_same_run_once() -> None:
    """Block 3 is the same, but the fine-tuned model's gets what a changed block 2 made."""
    base = tiny_llama()
    finetuned = twin_of(base, [2])
    pair = pair_of(base, finetuned)
    work = replace(work_for(pair, "all"), localize=False)
    with watched(finetuned=finetuned) as calls:
        found = streamed(pair, work)
    assert Counter(index for _, index, _ in calls) == dict.fromkeys((2, 3), len(work.batches))
    assert all(states.local is None for pairs in found.values() for states in pairs)


def test_of_a_twin_the_last_block_alone_runs_and_all_is_exactly_0() -> None:
    """The last one's pass goes on to the final norm."""
    base = tiny_llama()
    finetuned = twin_of(base)
    pair = pair_of(base, finetuned)
    work = work_for(pair, "all", n_sampled=0)
    with watched(finetuned=finetuned) as calls:
        found = streamed(pair, work)
    assert Counter(index for _, index, _ in calls) == {3: len(work.batches)}
    for pairs in found.values():
        for states in pairs:
            assert bits(states.finetuned) == bits(states.base)
            assert states.local is None or bits(states.local) == bits(states.base)


def test_tokens_are_told_as_they_pass() -> None:
    for n_layers in (2, 4, 7):
        pair = pair_of(tiny_llama(), tiny_llama(seed=4, num_hidden_layers=n_layers))
        work = work_for(pair, "last")
        told: list[int] = []
        list(run_streamed(pair, work, told.append))
        n_tokens = [b.base.n_tokens for b in work.batches] + [b.n_tokens for b in work.sample]
        assert sum(told) == sum(n_tokens)
        assert len(told) == 4 * len(n_tokens)


# Blocks that are read when their turn comes


def paged_pair(base: Path, finetuned: Path) -> ModelPair:
    references = parse_model(str(base)), parse_model(str(finetuned))
    options = LoadOptions(torch.float32, torch.device("cpu"))
    models = load_paged(*references, options, lambda role, name: None)
    return learn_pair(*models, (IDS, IDS), (0, 0))


def in_memory(pair: ModelPair) -> list[list[int]]:
    """Which blocks of each model are there; the LM head is the one after the last."""
    parts = [[*m.anatomy.blocks, m.model.get_output_embeddings()] for m in (pair.base, pair.finetuned)]
    return [
        [i for i, part in enumerate(each) if not any(p.is_meta for p in part.parameters())] for each in parts
    ]


@pytest.mark.parametrize("ahead", [False, True], ids=["short of memory", "read ahead"])
def test_each_block_is_read_once_and_the_next_ahead_of_its_turn_where_four_fit(
    ahead: bool, base_folder: Path, finetuned_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two compute, and two are read meanwhile. The LM head is read once, after the blocks."""
    monkeypatch.setattr(layout, "SMALL_BYTES", 0)
    pair = paged_pair(base_folder, finetuned_folder)
    work = work_for(pair, "last")
    # The largest block of each is of 4000 bytes, and there must be more than four times that of both.
    monkeypatch.setattr(Pager, "block_bytes", lambda _pager, index: 1000 * (1 + index))
    free = SimpleNamespace(available=4 * 8000 + 4 * ahead)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    reads: list[tuple[Pager, int, bool]] = []
    read = Pager.read

    def watch(pager: Pager, index: int) -> dict[str, Tensor]:
        reads.append((pager, index, threading.current_thread() is not threading.main_thread()))
        return read(pager, index)

    monkeypatch.setattr(Pager, "read", watch)
    held: list[list[list[int]]] = []
    found = by_site(run_streamed(pair, work, lambda _: held.append(in_memory(pair))))
    assert held == [[[index], [index]] for index in range(4) for _ in (*work.batches, *work.sample)]
    for model in (pair.base, pair.finetuned):
        own = [(index, elsewhere) for pager, index, elsewhere in reads if pager is model.pager]
        assert own == [(0, False), *((index, ahead) for index in (1, 2, 3)), (4, False)]
    assert in_memory(pair) == [[], []]
    whole = pair_of(tiny_llama(), perturbed(tiny_llama()))
    assert_same_bits(found, resident(whole, work))


def test_blocks_of_a_copy_are_base_s(base_folder: Path, tmp_path: Path) -> None:
    pair = paged_pair(base_folder, shutil.copytree(base_folder, tmp_path / "copy"))
    work = work_for(pair, "last", n_sampled=0)
    # Before the hooks of `watched`, with which a block is another.
    assert shared_blocks(pair.base, pair.finetuned) == [True] * 4
    with watched(finetuned=pair.finetuned.model) as calls:
        streamed(pair, work)
    assert Counter(index for _, index, _ in calls) == {3: len(work.batches)}


@pytest.mark.parametrize("depth", [2, 7])
def test_a_deeper_models_other_blocks_are_read_once_too(
    depth: int, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_model(tmp_path / "other", tiny_llama(seed=4, num_hidden_layers=depth), tiny_tokenizer())
    pair = paged_pair(base_folder, other)
    reads = Counter[tuple[int, int]]()
    read = Pager.read

    def watch(pager: Pager, index: int) -> dict[str, Tensor]:
        reads[pager.n_blocks, index] += 1
        return read(pager, index)

    monkeypatch.setattr(Pager, "read", watch)
    list(run_streamed(pair, work_for(pair, "last", n_sampled=0), lambda _: None))
    # The part after the last block is the LM head.
    assert reads == dict.fromkeys(((n, index) for n in (4, depth) for index in range(n + 1)), 1)


# What is left behind


def is_as_it_was(*models: PreTrainedModel) -> bool:
    modules = [module for model in models for module in model.modules()]
    hooked = any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)
    return not hooked


def test_models_and_disk_are_as_they_were(folder: Path, keeping: Callable[[int], None]) -> None:
    base, finetuned = tiny_llama(), perturbed(tiny_llama())
    before = [copy.deepcopy(model.state_dict()) for model in (base, finetuned)]
    pair = pair_of(base, finetuned)
    keeping(0)
    streamed(pair, work_for(pair, "mean"))
    assert is_as_it_was(base, finetuned)
    assert list(folder.iterdir()) == []
    for model, state in zip((base, finetuned), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("site", ["embedding", 1, "final_norm"])
def test_so_they_are_when_it_is_ended_early(folder: Path, site: Any, keeping: Callable[[int], None]) -> None:
    base, finetuned = tiny_llama(), perturbed(tiny_llama())
    pair = pair_of(base, finetuned)
    work = work_for(pair, "mean")
    keeping(0)
    running: Any = run_streamed(pair, work, lambda _: None)
    next(states for states in running if states.site == site)
    assert list(folder.iterdir()) != []
    running.close()
    assert list(folder.iterdir()) == []
    assert is_as_it_was(base, finetuned)


def test_so_they_are_when_a_block_fails(folder: Path, keeping: Callable[[int], None]) -> None:
    base, finetuned = tiny_llama(), perturbed(tiny_llama())
    pair = pair_of(base, finetuned)
    work = replace(work_for(pair, "mean"), localize=False)

    keeping(0)

    def fail(_module: nn.Module, _args: Any) -> None:
        raise KeyboardInterrupt

    handle = finetuned.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        streamed(pair, work)
    handle.remove()
    assert list(folder.iterdir()) == []
    assert is_as_it_was(base, finetuned)


def test_what_fits_neither_memory_nor_disk_is_refused_before_a_block_runs(
    monkeypatch: pytest.MonkeyPatch, keeping: Callable[[int], None]
) -> None:
    base, finetuned = tiny_llama(), perturbed(tiny_llama())
    pair = pair_of(base, finetuned)
    work = work_for(pair, "last")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    keeping(0)
    with (
        watched(base=base, finetuned=finetuned) as calls,
        pytest.raises(SaveError, match="TMPDIR to a larger disk"),
    ):
        streamed(pair, work)
    assert calls == []
    keeping(10**9)
    assert_same_bits(streamed(pair, work), resident(pair, work))


def test_what_fits_the_disk_to_the_byte_runs(
    monkeypatch: pytest.MonkeyPatch, keeping: Callable[[int], None]
) -> None:
    """Both models' states of every token, padding included, of 32 numbers of 4 bytes."""
    pair = pair_of(tiny_llama(), perturbed(tiny_llama()))
    work = work_for(pair, "last", n_sampled=0)
    n_tokens = sum(len(b.base.members) * b.base.padded_length for b in work.batches)
    assert n_tokens > sum(LENGTHS)
    keeping(0)
    for free, fits in ((2 * n_tokens * 32 * 4, True), (2 * n_tokens * 32 * 4 - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with nullcontext() if fits else pytest.raises(SaveError, match="TMPDIR to a larger disk"):
            next(run_streamed(pair, work, lambda _: None))
