"""Views of stored tensors: every part of every type reads as NumPy or torch would cut it from the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lazarus.models.stored import StoredTensor, read_headers
from lazarus.names.parts import Take
from lazarus.weights.views import AddedView, MemoryView, StoredView, View, bits, open_rows, same_bits

TYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]
Store = Callable[[Tensor], StoredTensor]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Write a tensor to a file of its own, behind another so that it does not begin at 0."""
    folder = tmp_path_factory.mktemp("stored")
    written: list[Path] = []

    def save(tensor: Tensor) -> StoredTensor:
        path = folder / f"{len(written)}.safetensors"
        written.append(path)
        save_file({"before": torch.ones(8, dtype=torch.float64), "it": tensor.contiguous()}, path)
        return read_headers([str(path)])["it"]

    return save


def numbers(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Any bits at all, so NaN and infinities too."""
    n_bytes = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    random = torch.Generator().manual_seed(seed)
    made = torch.randint(high, (max(n_bytes, 1),), dtype=torch.uint8, generator=random)[:n_bytes]
    return made.view(dtype).view(shape)


def alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def as_matrix(tensor: Tensor) -> Tensor:
    """As the contract has it: all leading axes, the last axis; a vector is a column."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    columns = real.shape[-1] if real.ndim > 1 else 1
    return real.reshape(math.prod(real.shape[:-1]) if real.ndim > 1 else real.numel(), columns)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4)])
def test_every_type_reads_as_it_was_saved(store: Store, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = numbers(dtype, *shape)
    expected = as_matrix(tensor)
    for view in (StoredView(store(tensor)), MemoryView(tensor, str(dtype))):
        assert view.matrix == tuple(expected.shape)
        assert view.shape == (*shape, 2) if dtype.is_complex else view.shape == shape
        assert alike(view.read(0, len(expected)), expected)
        assert alike(view.read(1, len(expected)), expected[1:])
    assert StoredView(store(tensor)).dtype == str(dtype).removeprefix("torch.")


TAKES = {
    "q of a fused qkv": ((12, 5), Take((3, 4, 5), (0,))),
    "v of a fused qkv": ((12, 5), Take((3, 4, 5), (2,))),
    "up of an expert": ((3, 8, 5), Take((3, 8, 5), (1, slice(4, None)))),
    "gate of all experts": ((3, 8, 5), Take((3, 8, 5), (slice(None), slice(0, 4)))),
    "interleaved rows": ((2, 8, 5), Take((2, 8, 5), (1, slice(1, None, 2)))),
    "interleaved columns": ((5, 8), Take((5, 8), (slice(None), slice(0, None, 2)))),
    "columns of Conv1D": ((5, 12), Take((5, 12), (slice(None), slice(4, 8)))),
    "NeoX's heads": ((24, 5), Take((4, 3, 2, 5), (slice(None), 0))),
    "NeoX's biases": ((24,), Take((4, 3, 2), (slice(None), 1))),
    "a resized vocabulary": ((9, 5), Take((9, 5), (slice(0, 6),))),
    "a column": ((9, 50), Take((9, 50), (slice(None), 3))),
    "few of many": ((200, 30), Take((10, 20, 30), (slice(None), 3, slice(2, 4)))),
    "one number": ((4, 5), Take((4, 5), (2, 3))),
    "no row": ((4, 5), Take((4, 5), (slice(0, 0),))),
    "no column": ((4, 5), Take((4, 5), (slice(None), slice(2, 2)))),
    "another shape": ((4, 1, 5), Take((5, 4), ())),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e5m2, torch.complex64], ids=str)
@pytest.mark.parametrize(("shape", "take"), TAKES.values(), ids=TAKES)
def test_a_part_reads_as_torch_cuts_it(
    store: Store, dtype: torch.dtype, shape: tuple[int, ...], take: Take
) -> None:
    whole = numbers(dtype, *shape)
    expected = as_matrix(whole.view(take.dims)[take.index])
    views: list[View] = [StoredView(store(whole), take), MemoryView(whole, "", take)]
    for view in views:
        assert view.matrix == tuple(expected.shape)
        with open_rows(view) as rows:
            for start in range(len(expected) + 1):
                for stop in range(start, len(expected) + 1):
                    assert alike(rows.read(start, stop), expected[start:stop])


@st.composite
def takes(draw: st.DrawFn) -> Take:
    dims = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    index: list[int | slice] = []
    for length in dims[: draw(st.integers(0, len(dims)))]:
        begin, end = draw(st.integers(0, length - 1)), draw(st.integers(0, length))
        choices: list[int | slice] = [begin, slice(begin, end, draw(st.integers(1, 3))), slice(None)]
        index.append(draw(st.sampled_from(choices)))
    return Take(tuple(dims), tuple(index))


@given(take=takes(), dtype=st.sampled_from(TYPES), data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_part_reads_as_torch_cuts_it(
    store: Store, take: Take, dtype: torch.dtype, data: st.DataObject
) -> None:
    whole = numbers(dtype, math.prod(take.dims))
    expected = as_matrix(whole.view(take.dims)[take.index])
    view = StoredView(store(whole), take)
    assert view.matrix == tuple(expected.shape)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    assert alike(view.read(start, stop), expected[start:stop])


def test_a_part_that_is_together_reads_no_other_byte(store: Store) -> None:
    """A file that ends with the part: whoever reads one byte past it fails."""
    # Without the identity, by which a file that was cut is refused as soon as it is opened.
    stored = replace(store(numbers(torch.float32, 12, 5)), identity=None)
    view = StoredView(stored, Take((3, 4, 5), (1,)))
    path = Path(stored.path)
    path.write_bytes(path.read_bytes()[: stored.start + 2 * 80])
    assert view.read(0, 4).shape == (4, 5)
    with pytest.raises(OSError, match="cut short"):
        StoredView(stored, Take((3, 4, 5), (2,))).read(0, 1)
    with pytest.raises(OSError, match="cut short"):
        same_bits(StoredView(stored), MemoryView(numbers(torch.float32, 12, 5), "float32"))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        view.read(0, 1)


def test_wide_gaps_are_not_read(store: Store) -> None:
    """One column of 50 in the memory of one number, one of 5 in that of the gaps."""
    whole = numbers(torch.int32, 100, 50)
    with StoredView(store(whole), Take((100, 50), (slice(None), 3))).rows() as rows:
        assert alike(rows.read(0, 100), whole[:, 3:4])
        assert len(rows.across) <= 1
    with StoredView(store(whole), Take((1000, 5), (slice(None), 3))).rows() as rows:
        assert alike(rows.read(0, 1000), whole.view(1000, 5)[:, 3:4])
        assert len(rows.across) == 999 * 5 + 1


def test_what_cannot_be_read_says_so(store: Store) -> None:
    stored = store(numbers(torch.float32, 12, 5))
    with pytest.raises(ValueError, match=r"\(12, 5\) cannot be read as \(3, 5\)"):
        StoredView(stored, Take((3, 5), ()))
    with pytest.raises(ValueError, match=r"numbers of type F4 cannot be read"):
        StoredView(StoredTensor(stored.path, "F4", (2,), 0, 1))
    with pytest.raises(ValueError, match=r"\(4, 5\) does not fit"):
        AddedView(StoredView(stored), MemoryView(torch.ones(4, 5), "float64"))


def test_many_threads_read_one_view(store: Store) -> None:
    whole = numbers(torch.int16, 400, 33)
    take = Take((400, 33), (slice(None), slice(1, 20)))
    view = StoredView(store(whole), take)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: view.read(start, start + 40), list(range(0, 400, 40)) * 4))
    assert alike(torch.cat(parts), whole[:, 1:20].repeat(4, 1))


def test_an_update_is_added_in_float64(store: Store) -> None:
    base, update = torch.randn(6, 5), torch.randn(6, 5, dtype=torch.float64)
    added = AddedView(StoredView(store(base)), MemoryView(update, "float64"))
    assert (added.shape, added.dtype, added.matrix) == ((6, 5), "float64", (6, 5))
    assert torch.equal(added.read(2, 5), base[2:5].double() + update[2:5])


def changed(tensor: Tensor, place: int) -> Tensor:
    """With the lowest bit of one byte turned."""
    copy = tensor.clone()
    copy.view(torch.uint8).view(-1)[place] ^= 1
    return copy


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_one_other_bit_is_found_wherever_it_is(store: Store, dtype: torch.dtype) -> None:
    tensor = numbers(dtype, 700, 300)
    stored, n_bytes = StoredView(store(tensor)), tensor.numel() * tensor.element_size()
    assert same_bits(stored, MemoryView(tensor.clone(), ""))
    for place in (0, n_bytes // 2, n_bytes - 1):
        other = changed(tensor, place)
        assert not same_bits(stored, MemoryView(other, ""))
        assert not same_bits(StoredView(store(other)), stored)


def test_the_same_place_is_not_read(store: Store) -> None:
    stored = store(numbers(torch.float32, 4, 6))
    Path(stored.path).unlink()
    parts = [Take((4, 6), (slice(0, 2),)), Take((2, 12), (0,))]
    assert same_bits(StoredView(stored), StoredView(stored))
    assert same_bits(StoredView(stored, parts[0]), StoredView(stored, Take((2, 2, 6), (0,))))
    assert not same_bits(StoredView(stored, parts[0]), StoredView(stored, parts[1]))  # of another shape
    with pytest.raises(FileNotFoundError):
        same_bits(StoredView(stored, parts[0]), StoredView(stored, Take((4, 6), (slice(2, 4),))))


def test_other_types_are_compared_in_float64(store: Store) -> None:
    small = torch.tensor([[0.0, 1.5, -2.0, 448.0], [-0.0, 0.25, 3.0, -1.0]])
    stored = StoredView(store(small))
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        assert same_bits(stored, StoredView(store(small.to(dtype))))
        assert not same_bits(stored, StoredView(store((small + 0.25).to(dtype))))
        assert not same_bits(stored, StoredView(store(small.abs().to(dtype))))
    assert not same_bits(stored, StoredView(store(-(-small + 0.0))))  # −0.0 for 0.0
    assert not same_bits(stored, StoredView(store(small.view(-1))))
    near = torch.tensor([1 + 2.0**-40], dtype=torch.float64)
    assert not same_bits(StoredView(store(near)), StoredView(store(near.float())))
    counts = torch.arange(8).view(2, 4)
    assert same_bits(StoredView(store(counts.to(torch.int8))), StoredView(store(counts.to(torch.float16))))
