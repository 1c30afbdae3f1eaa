"""What waits between two blocks: in memory up to a budget, beyond it in files, and always as it was put."""

from __future__ import annotations

import resource
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lazarus.engine.spill import SpillBuffer, check_room
from lazarus.errors import SaveError

NESTED = (
    torch.arange(6.0).reshape(2, 3),
    [(tuple, None, (torch.tensor([True, False]), "relu", 7)), (Tensor, None, ())],
    [{"keys": torch.arange(4), 3: (torch.ones(2, 2, dtype=torch.bfloat16), torch.tensor(2.5))}, {}],
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert torch.equal(found.contiguous().view(-1).view(torch.uint8), as_bytes(expected))
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_same(list(found.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def as_bytes(states: Tensor) -> Tensor:
    return states.contiguous().view(-1).view(torch.uint8)


# What comes back


@pytest.mark.parametrize("budget", [0, 10**6], ids=["file", "memory"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int64], ids=str
)
def test_tensors_come_back_bit_for_bit(folder: Path, dtype: torch.dtype, budget: int) -> None:
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(3, 5, generator=generator) * 3).to(dtype)
    with SpillBuffer(budget) as kept:
        kept.put("states", states)
        assert bool(list(folder.iterdir())) == (budget == 0)
        assert_same(kept.take("states"), states.clone())


@pytest.mark.parametrize("budget", [0, 10**6], ids=["file", "memory"])
def test_values_come_back_in_their_structure(folder: Path, budget: int) -> None:
    with SpillBuffer(budget) as kept:
        kept.put("nested", NESTED)
        for _ in range(2):  # it stays there
            assert_same(kept.take("nested"), NESTED)


@pytest.mark.parametrize("value", [[], (None, 3), {}, (torch.zeros(0, 4), torch.tensor(7))], ids=repr)
def test_values_with_hardly_a_tensor_in_them_come_back(folder: Path, value: Any) -> None:
    with SpillBuffer(0) as kept:
        kept.put("full", torch.ones(3))
        kept.put("slight", value)
        assert_same(kept.take("slight"), value)


def test_what_is_not_finite_and_what_is_not_contiguous_come_back(folder: Path) -> None:
    odd = torch.tensor([[float("nan"), -0.0, float("inf")], [-float("inf"), 1e-45, 0.0]])
    views = (odd, odd.T, odd[:, 1], odd[:1].expand(4, 3))
    with SpillBuffer(0) as kept:
        kept.put("views", views)
        assert_same(kept.take("views"), views)


def test_a_value_that_was_in_a_file_is_apart_from_it(folder: Path) -> None:
    """Otherwise it would change, or be gone, with the next block's."""
    with SpillBuffer(0) as kept:
        kept.put("a", torch.zeros(1000))
        first = kept.take("a")
        kept.put("a", torch.ones(1000))
        assert torch.equal(first, torch.zeros(1000))
        assert torch.equal(kept.take("a"), torch.ones(1000))
    assert torch.equal(first, torch.zeros(1000))


# The budget

PUTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60)), max_size=30)


@given(puts=PUTS, budget=st.integers(0, 600))
@settings(max_examples=60, deadline=None)
def test_what_stays_in_memory_never_exceeds_the_budget(puts: list[tuple[int, int]], budget: int) -> None:
    """Counted on the tensors that are still alive, and every value comes back whichever way it went."""
    expected: dict[int, Tensor] = {}
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    with SpillBuffer(budget) as kept:
        for key, size in puts:
            expected[key] = torch.full((size,), float(key * 100 + size))
            states = expected[key].clone()
            alive.add(states)
            kept.put(key, states)
            del states
            in_memory = sum(t.nbytes for t in alive)
            assert in_memory <= budget
            assert in_memory + kept.spilled_bytes == sum(t.nbytes for t in expected.values())
            assert key in kept
        for key, states in expected.items():
            assert torch.equal(kept.take(key), states)
        assert all((key in kept) == (key in expected) for key in range(6))


def test_the_budget_is_used(folder: Path) -> None:
    with SpillBuffer(1000) as kept:
        for key in range(2):
            kept.put(key, torch.zeros(125))
        assert list(folder.iterdir()) == []
        kept.put(2, torch.zeros(1))
        assert kept.spilled_bytes == 4
        kept.put(0, torch.zeros(1))
        kept.put(3, torch.zeros(124))
        assert kept.spilled_bytes == 4


def test_not_a_byte_goes_beyond_the_budget(folder: Path) -> None:
    with SpillBuffer(3) as kept:
        for key in range(3):
            kept.put(key, torch.zeros(1, dtype=torch.uint8))
        assert kept.spilled_bytes == 0
        kept.put(3, torch.zeros(1, dtype=torch.uint8))
        assert kept.spilled_bytes == 1
        kept.put(2, torch.zeros(0, dtype=torch.uint8))
        kept.put(4, torch.zeros(1, dtype=torch.uint8))
        assert kept.spilled_bytes == 1
        kept.put(5, torch.zeros(1, dtype=torch.uint8))
        assert kept.spilled_bytes == 2


def test_a_value_that_grows_beyond_the_budget_moves_to_a_file(folder: Path) -> None:
    with SpillBuffer(400) as kept:
        kept.put("grows", torch.zeros(100))
        kept.put("grows", torch.ones(101))
        assert kept.spilled_bytes == 404
        assert torch.equal(kept.take("grows"), torch.ones(101))
        kept.put("other", torch.zeros(100))
        assert kept.spilled_bytes == 404


# The files


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


class _StopError(Exception):
    pass


def test_no_file_is_left_behind(folder: Path) -> None:
    with SpillBuffer(8) as kept:
        for key in range(4):
            kept.put(key, torch.zeros(2))
        assert len(files(folder)) == 3
    assert list(folder.iterdir()) == []


def test_no_file_is_left_behind_by_an_exception(folder: Path) -> None:
    def fail() -> None:
        with SpillBuffer(0) as kept:
            kept.put("a", torch.zeros(2))
            assert len(files(folder)) == 1
            raise _StopError

    with pytest.raises(_StopError):
        fail()
    assert list(folder.iterdir()) == []


def test_files_that_are_gone_already_are_no_error_at_the_end(folder: Path) -> None:
    with SpillBuffer(0) as kept:
        kept.put("a", torch.zeros(2))
        for path in folder.iterdir():
            shutil.rmtree(path)
        assert list(folder.iterdir()) == []
    assert list(folder.iterdir()) == []  # and nothing was raised on the way out


def test_nothing_is_written_before_something_has_to_be(folder: Path) -> None:
    with SpillBuffer(100) as kept:
        kept.put("a", torch.zeros(2))
        assert kept.spilled_bytes == 0
        assert list(folder.iterdir()) == []


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may be longer than 10 kB: to the one who writes, a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_says_what_to_do(folder: Path) -> None:
    def fill() -> None:
        with SpillBuffer(0) as kept:
            kept.put("small", torch.zeros(2))
            with small_disk():
                kept.put("large", torch.zeros(10_000))

    with pytest.raises(SaveError, match=r"hidden states cannot be written to .*(?i:too large|space).*TMPDIR"):
        fill()
    assert list(folder.iterdir()) == []


class _Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_states_that_memory_and_disk_do_not_hold_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Disk(10**12, 0, 10**10))
    check_room(n_bytes=3 * 10**10, budget_bytes=2 * 10**10)
    check_room(n_bytes=0, budget_bytes=2 * 10**10)
    with pytest.raises(
        SaveError, match=r"30\.1 GB, of which 20\.0 GB fit into memory, and .* has 10\.0 GB free.*TMPDIR"
    ) as caught:
        check_room(n_bytes=30_100_000_000, budget_bytes=2 * 10**10)
    assert str(folder) in str(caught.value)
