"""Which rows of a batch are compared, with a prefix that runs before it and without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lazarus.batches import TokenBatch
from lazarus.engine import check_positions
from lazarus.engine.positions import RowPicker
from lazarus.errors import PositionError, UnsupportedModelError
from lazarus.notes import Note, Notes
from lazarus.sites import Position, compared_tokens
from lazarus.tokens import TokenizedPrompt


def noted(position: Position, lengths: list[int]) -> list[Note]:
    """What is noted of prompts of these lengths."""
    check_positions(position, lengths, notes := Notes())
    return list(notes)


def test_a_position_that_a_prompt_lacks_names_the_prompt() -> None:
    with pytest.raises(PositionError, match="Prompt 1 has 1 tokens, so none at position 2") as caught:
        check_positions(2, [5, 1, 3], Notes())
    assert caught.value.option == "position"
    with pytest.raises(PositionError, match="Prompt 2 has 3 tokens, so none at position -4"):
        check_positions(-4, [5, 4, 3], Notes())
    with pytest.raises(PositionError, match="Prompt 0 has 3 tokens, so none at position 3"):
        check_positions(3, [3], Notes())
    assert noted(2, [3]) == noted(-3, [3]) == []


def test_prompts_of_one_token_are_told_where_others_leave_the_first_out() -> None:
    positions: tuple[Position, ...] = ("mean", "all")
    for position in positions:
        [note] = noted(position, [2, 1, 3])
        assert "1 of 3 prompts have one token" in note.text
        assert (note.code, note.prompts) == ("lone-tokens", (1,))
        assert noted(position, [2, 3]) == []
    assert noted("last", [1, 2]) == []
    assert noted(0, [1, 2]) == []


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_padding_is_never_read(lengths: list[int]) -> None:
    """Padding holds NaN here: one row of it in any result would show."""
    states = torch.full((len(lengths), max(lengths), 3), float("nan"))
    for row, length in enumerate(lengths):
        states[row, :length] = torch.arange(length)[:, None] + 10.0 * row
    positions: list[Any] = ["last", "mean", "all", 0, -1]
    batch = TokenBatch([TokenizedPrompt(i, [7] * n) for i, n in enumerate(lengths)], pad_id=0)
    for position in positions:
        picker = RowPicker.of(batch, position)
        picked = picker.pick(states)
        assert picked.isfinite().all()
        assert len(picked) == len(picker.prompts)
        tokens = [t + 10.0 * r for r, n in enumerate(lengths) for t in compared_tokens(position, n)]
        if position != "mean":
            assert picked[:, 0].tolist() == tokens


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    n_prefix=st.integers(0, 4),
    position=st.sampled_from(["last", "mean", "all", 0, 1, 2, -1, -3]),
)
@settings(max_examples=150, deadline=None)
def test_the_rows_of_a_prefix_stand_before_each_prompts_own(
    lengths: list[int], n_prefix: int, position: Any
) -> None:
    """A pass over the prefix and one over what follows give the rows of a pass over all.

    A position that is counted from the end is never in a prefix: `common_prefix` leaves room for it.
    """
    wholes = [n_prefix + length for length in lengths]
    assume(not isinstance(position, int) or -min(lengths) <= position < min(wholes))
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randn(n_prefix, 3, generator=generator, dtype=torch.float64)
    own = torch.randn(len(lengths), max(lengths), 3, generator=generator, dtype=torch.float64)
    expected, owners = [], []
    for row, length in enumerate(wholes):
        states = torch.cat([prefix, own[row]])
        compared = states[list(compared_tokens(position, length))]
        expected.append(compared.mean(0, keepdim=True) if position == "mean" else compared)
        owners += [row + 10] * len(expected[-1])
    members = [TokenizedPrompt(10 + row, [7] * length) for row, length in enumerate(wholes)]
    picker = RowPicker.of(TokenBatch(members, pad_id=0).after(n_prefix), position)
    before = picker.of_prefix(n_prefix).pick(prefix[None]) if picker.in_prefix else prefix[:0]
    found = picker.whole(picker.pick(own), before)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-12)
    assert picker.prompts.tolist() == owners


@pytest.mark.parametrize("position", ["mean", "all"])
def test_rows_stay_on_the_device_of_the_states(position: Any) -> None:
    members = [TokenizedPrompt(row, [7] * length) for row, length in enumerate((5, 4))]
    picker = RowPicker.of(TokenBatch(members, pad_id=0).after(2), position)
    states = torch.zeros(2, 3, 8, device="meta")
    before = picker.of_prefix(2).pick(torch.zeros(1, 2, 8, device="meta"))
    assert picker.whole(picker.pick(states), before).device.type == "meta"


def test_states_that_are_not_one_for_each_token_are_refused() -> None:
    """Some architectures put tokens of their own before a long prompt."""
    picker = RowPicker.of(TokenBatch([TokenizedPrompt(0, [7] * 5)], pad_id=0), "last")
    with pytest.raises(UnsupportedModelError, match="a batch of 5 tokens a prompt gave states for 6"):
        picker.pick(torch.zeros(1, 6, 3))
