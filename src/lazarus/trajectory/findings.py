"""Findings on a series as a whole: what its distances and steps show that no pair of models shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lazarus.results import SeriesFinding, SeriesMember
from lazarus.trajectory.change import Change, find_change
from lazarus.trajectory.distances import Distances, Floats
from lazarus.trajectory.identity import SharedStart, groups_of_same, shared_starts
from lazarus.trajectory.order import Reordered, find_order

MOST_NAMED = 6


@dataclass(frozen=True)
class Seen:
    """The members of a series and the distances between them, from which findings are made."""

    base: str
    """base's name"""
    members: Sequence[SeriesMember]
    distances: Distances
    sizes: Floats | None
    """‖step‖ / ‖state‖ of the step to each member, [members, prompts, blocks]; None where not known"""


def find(seen: Seen) -> list[SeriesFinding]:
    """Return the findings of a series, what is the same first, in the order of the members."""
    same = groups_of_same(seen.distances, seen.members)
    last = len(seen.members)
    copies = {place for group in same for place in group} - {_original(group, last) for group in same}
    distinct = [place for place in range(1, last + 1) if place not in copies]
    starts = shared_starts(seen.distances, distinct)
    order = find_order(seen.distances, distinct)
    found = [_of_same(seen, group) for group in same]
    found += [_of_start(seen, start) for start in starts]
    if order is not None:
        found.append(_of_order(seen, order))
    # Of steps between members that do not belong there nothing can be said.
    if order is None and not starts and not copies and seen.sizes is not None:
        change = find_change(seen.sizes, [member.step for member in seen.members])
        found += [_of_change(seen, change)] if change else []
    return found


def _original(group: Sequence[int], last: int) -> int:
    """Return which of some models that are the same is what its name says."""
    return last if last in group and group[0] else group[0]


def _of_same(seen: Seen, group: Sequence[int]) -> SeriesFinding:
    members = [place - 1 for place in group if place]
    last = len(seen.members) - 1
    has_output = all(seen.members[member].output is not None for member in members)
    told = f"the same states{' and outputs' if has_output else ''}, bit for bit"
    if group[0] == 0:
        text = f"{_names(seen, members)} {_give(members)} {told}, as base, {seen.base}"
        return SeriesFinding(kind="same_as_base", members=members, text=text)
    if last in members:
        earlier = [member for member in members if member != last]
        text = f"{_names(seen, earlier)} {_give(earlier)} {told}, as the last one, {_name(seen, last)}"
        return SeriesFinding(kind="same_as_last", members=earlier, text=text)
    text = f"{_names(seen, members)} give {told}"
    return SeriesFinding(kind="duplicate", members=members, text=text)


def _of_start(seen: Seen, start: SharedStart) -> SeriesFinding:
    member, other = start.member - 1, start.other - 1
    n_blocks = "block" if start.n_blocks == 1 else f"{start.n_blocks} blocks"
    what = f"base, {seen.base}" if other < 0 else _name(seen, other)
    text = (
        f"the first {n_blocks} of {_name(seen, member)} give the states that those of {what} give, bit for "
        "bit, and later blocks do not: a file of its weights may be a copy"
    )
    members = [member] if other < 0 else [other, member]
    return SeriesFinding(kind="same_first_blocks", members=members, text=text)


def _of_order(seen: Seen, found: Reordered) -> SeriesFinding:
    members = [place - 1 for place in found.moved]
    before = [found.order[at - 1] - 1 if at else -1 for at in map(found.order.index, found.moved)]
    places = [
        f"{_name(seen, member)} comes after {_name(seen, other) if other >= 0 else 'base'}"
        for member, other in zip(members, before, strict=True)
    ]
    listed = "; ".join(places[:MOST_NAMED])
    return SeriesFinding(
        kind="out_of_order",
        members=members,
        text=f"out of order: the way through all members is shortest where {listed}",
    )


def _of_change(seen: Seen, change: Change) -> SeriesFinding:
    after, (low, high) = change.step - 1, change.interval
    where = f"after {_name(seen, after)}"
    if low != high:
        where += f" (between {_name(seen, low - 1)} and {_name(seen, min(high, len(seen.members) - 1))})"
    return SeriesFinding(
        kind="change_point",
        members=[after],
        text=f"the training changed {where}: from there on the steps move other prompts and blocks",
        interval=(low - 1, high - 1),
        strength=round(change.strength, 3),
    )


def _names(seen: Seen, members: Sequence[int]) -> str:
    named = [_name(seen, member) for member in members[:MOST_NAMED]]
    if len(members) > MOST_NAMED:
        named.append(f"{len(members) - MOST_NAMED} more")
    *others, last = named
    return f"{', '.join(others)} and {last}" if others else last


def _name(seen: Seen, member: int) -> str:
    return seen.members[member].model.id


def _give(members: Sequence[int]) -> str:
    return "gives" if len(members) == 1 else "give"
