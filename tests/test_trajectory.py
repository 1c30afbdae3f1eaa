"""What distances and steps of a series show: copies, members out of order, changes of the training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lazarus.errors import UsageError
from lazarus.facts import Site
from lazarus.results import natural, steps_of
from lazarus.trajectory.change import find_change
from lazarus.trajectory.distances import Distances, Floats, squared_distance, step_products, turns
from lazarus.trajectory.findings import Seen, find
from lazarus.trajectory.members import expand
from lazarus.trajectory.order import find_order, progress

SITES: list[Site] = ["embedding", 0, 1, 2, 3, "final_norm"]


def walk(n_models: int, seed: int, *, width: int = 256, drift: float = 0.3) -> Floats:
    """The states of a base and of members that walk away from it, [models, sites, width]."""
    steps = np.random.default_rng(seed).normal(size=(n_models, len(SITES), width)) + drift
    steps[0] *= 10
    return steps.cumsum(0)


def jitter(n_models: int, seed: int, *, width: int = 256) -> Floats:
    """The states of members that go a way, and then stay around one place."""
    way = np.minimum(np.arange(n_models), n_models // 2)[:, None, None]
    return way + np.random.default_rng(seed).normal(size=(n_models, len(SITES), width))


def distances(states: Floats) -> Distances:
    """The distances of models by their states."""
    found = Distances.empty(SITES, len(states))
    for place, site in enumerate(SITES):
        rows = states[:, place]
        found.scale[place] = squared_distance(rows[0], np.zeros(1))
        for one in range(len(rows)):
            for other in range(one):
                found.put(site, (one, other), squared_distance(rows[one], rows[other]))
    return found


def seen(states: Floats, sizes: Floats | None = None) -> Seen:
    """What findings are made of, for models without outputs."""
    names = [f"step-{100 * (i + 1)}" for i in range(len(states) - 1)]
    members: Any = [
        SimpleNamespace(
            model=SimpleNamespace(id=name),
            step=step,
            output=None,
            summary=SimpleNamespace(verdict="identical"),
        )
        for name, step in zip(names, steps_of(names), strict=True)
    ]
    return Seen("base", members, distances(states), sizes)


def kinds(states: Floats) -> list[tuple[str, Sequence[int]]]:
    return [(found.kind, found.members) for found in find(seen(states))]


def test_distances_are_euclidean_and_relative_to_base() -> None:
    states = walk(5, 0)
    found = distances(states).relative()
    expected = np.sqrt(
        np.mean([np.sum((states[2, s] - states[4, s]) ** 2) / np.sum(states[0, s] ** 2) for s in range(1, 5)])
    )
    assert found[2, 4] == pytest.approx(expected, rel=1e-12)


def test_products_and_turns_are_those_of_the_steps() -> None:
    states = walk(6, 1)[:, 1]
    squares = np.array([[np.sum((a - b) ** 2) for b in states] for a in states])
    steps = np.diff(states, axis=0)
    np.testing.assert_allclose(step_products(squares), steps @ steps.T, rtol=1e-9)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairwise(steps)]
    np.testing.assert_allclose(turns(squares), cosines, rtol=1e-9)


def test_progress_is_1_of_a_walk_3_of_a_line_and_0_of_jitter() -> None:
    def of(states: Floats) -> float:
        return float(np.median(progress(distances(states).relative() ** 2)))

    assert of(walk(12, 2, drift=0.0)) == pytest.approx(1, abs=0.15)
    assert of(walk(12, 2, drift=100.0)) == pytest.approx(3, abs=0.01)
    rng = np.random.default_rng(0)
    assert of(rng.normal(size=(12, len(SITES), 256))) == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize("seed", range(10))
def test_neither_a_walk_nor_jitter_has_findings(seed: int) -> None:
    assert kinds(walk(8 + seed, seed)) == []
    assert kinds(jitter(8 + seed, seed)) == []


@pytest.mark.parametrize("seed", range(10))
def test_swapped_neighbours_are_out_of_order(seed: int) -> None:
    states, place = walk(10, seed), 1 + seed % 7
    states[[place, place + 1]] = states[[place + 1, place]]
    ((kind, members),) = kinds(states)
    assert kind == "out_of_order"
    assert set(members) <= {place - 1, place}


def test_a_member_in_a_place_far_away_is_out_of_order() -> None:
    states = walk(10, 3)[[0, 1, 2, 8, 3, 4, 5, 6, 7, 9]]
    assert kinds(states) == [("out_of_order", [2])]
    found = find_order(distances(states), range(1, 10))
    assert found is not None
    assert found.order == [1, 2, 4, 5, 6, 7, 8, 3, 9]
    assert "step-300 comes after step-800" in find(seen(states))[0].text


def test_of_five_members_no_order_is_told() -> None:
    assert kinds(walk(6, 0)[[0, 1, 3, 2, 4, 5]]) == []


def test_copies_are_told_apart_by_what_they_copy() -> None:
    states = walk(10, 4)
    states[3] = states[2]
    assert kinds(states) == [("duplicate", [1, 2])]
    states[3] = states[-1]
    assert kinds(states) == [("same_as_last", [2])]
    states[3] = states[0]
    assert kinds(states) == [("same_as_base", [2])]


def test_outputs_that_differ_are_no_copies() -> None:
    states = walk(8, 5)
    states[3] = states[2]
    with_outputs = seen(states)
    setattr(with_outputs.members[2], "output", "another head")  # noqa: B010 - read-only in the record
    assert [found.kind for found in find(with_outputs)] == []


def test_what_is_not_finite_is_no_copy() -> None:
    states = walk(8, 6)
    states[3] = states[2]
    states[3, 2, 0] = states[2, 2, 0] = np.nan
    assert kinds(states) == []


def test_first_blocks_of_another_member_are_told() -> None:
    states = walk(9, 7)
    states[5, :4] = states[4, :4]
    assert kinds(states) == [("same_first_blocks", [3, 4])]
    assert "the first 3 blocks of step-500" in find(seen(states))[0].text


def test_blocks_that_are_not_trained_are_no_finding() -> None:
    frozen = walk(9, 8)
    frozen[:, :3] = frozen[0, :3]
    assert kinds(frozen) == []
    frozen = walk(9, 8)
    frozen[:4, :3] = frozen[0, :3]  # not trained at first
    assert kinds(frozen) == []


def sizes(seed: int, *, change: int | None = None, n_steps: int = 12) -> Floats:
    """Sizes of steps, [steps, prompts, blocks], that fade; from a step on other prompts move."""
    rng = np.random.default_rng(seed)
    prompts, others = rng.normal(size=(2, 16, 1))
    logs = np.where((np.arange(n_steps) < (change or n_steps))[:, None, None], prompts, others)
    fading = -0.1 * np.arange(n_steps)[:, None, None]
    found: Floats = np.exp(logs + fading + 0.2 * rng.normal(size=(n_steps, 16, 4)))
    return found


@pytest.mark.parametrize("seed", range(10))
def test_a_change_of_the_training_is_found_where_it_is(seed: int) -> None:
    steps = list(range(100, 1300, 100))
    assert find_change(sizes(seed), steps) is None
    change = 4 + seed % 5
    found = find_change(sizes(seed, change=change), steps)
    assert found is not None
    assert found.step == change
    assert found.interval[0] <= change <= found.interval[1]


def test_a_change_is_told_with_the_member_after_which_it_is() -> None:
    found = find(seen(walk(13, 0), sizes(0, change=6)))
    assert [(each.kind, each.members) for each in found] == [("change_point", [5])]
    assert "after step-600" in found[0].text


def test_of_few_steps_or_prompts_no_change_is_told() -> None:
    assert find_change(sizes(0, change=3, n_steps=6), [1, 2, 3, 4, 5, 6]) is None
    assert find_change(sizes(0, change=6)[:, :7], list(range(12))) is None


def test_names_sort_by_their_numbers_and_tell_steps() -> None:
    names = ["run/checkpoint-1000", "run/checkpoint-200", "run/checkpoint-30"]
    assert sorted(names, key=natural) == names[::-1]
    assert steps_of(names) == [1000, 200, 30]
    assert steps_of(["org/model-7b@step10", "org/model-7b@step20"]) == [10, 20]
    assert steps_of(["model-7b", "model-7b-chat"]) == [None, None]


def test_globs_and_braces_are_expanded_and_names_on_disk_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("step-9", "step-10", "odd{a,b}*"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-11.log").touch()
    monkeypatch.chdir(tmp_path)
    assert expand(["step-*"]) == ["step-9", "step-10"]
    assert expand(["odd{a,b}*"]) == ["odd{a,b}*"]
    assert expand(["org/m@{s1,s2}", "step-{9,10}"]) == ["org/m@s1", "org/m@s2", "step-9", "step-10"]
    with pytest.raises(UsageError, match=r"step-11\*.*only step-11.log"):
        expand(["step-11*"])
