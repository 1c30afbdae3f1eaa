"""Whatever the Hub does: one message that helps, no endless wait, and a cache that a later run can trust."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from hub_ground import OUTPUT, PAIR, Ground, Outcome, numbers
from hub_page import page
from hub_situations import SITUATIONS, Situation
from lazarus.demo import BASE, FINETUNED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="commands run in forks of one process")

ALL = {situation.title: situation for group in SITUATIONS.values() for situation in group}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with Ground(tmp_path_factory.mktemp("hub")) as found:
        yield found


@pytest.fixture(scope="module")
def expected(ground: Ground) -> dict[str, Any]:
    """The numbers of the pair, read from its folders."""
    folders = {"org/base": str(BASE), "org/arithmetic": str(FINETUNED)}
    found: dict[str, Any] = numbers(ground.run(*(folders.get(each, each) for each in PAIR), *OUTPUT).result)
    return found


@pytest.fixture(scope="module")
def outcome_of(ground: Ground) -> Callable[[Situation], Outcome]:
    """What comes of a situation; each is run once, for its own test and for the page."""

    @cache
    def run(title: str) -> Outcome:
        found = ALL[title]
        ground.well()
        found.prepare(ground)
        return ground.run(*found.argv, *OUTPUT, faults=found.faults, env=found.env, before=found.before)

    return lambda situation: run(situation.title)


def test_every_title_is_used_once() -> None:
    assert len(ALL) == sum(len(group) for group in SITUATIONS.values()) >= 50


@pytest.mark.parametrize("title", ALL)
def test_a_situation_is_told_in_one_message_and_does_no_harm(
    title: str,
    ground: Ground,
    expected: dict[str, Any],
    outcome_of: Callable[[Situation], Outcome],
) -> None:
    situation, outcome = ALL[title], outcome_of(ALL[title])
    assert outcome.code == situation.code, outcome.err
    assert outcome.waited <= situation.most_wait
    assert not any(seen.token for seen in outcome.seen if seen.host == "localhost"), "a token went elsewhere"
    if situation.code:
        assert outcome.result is None
        assert [part for part in situation.says if part not in outcome.err] == [], outcome.err
        assert outcome.err.startswith("Error: ")
        assert outcome.err.splitlines(keepends=True) == [outcome.err]
        assert "unexpected" not in outcome.err
        assert not re.search("HTTPError|Client Error|Request ID|huggingface.co/docs", outcome.err)
    else:
        assert numbers(outcome.result) == expected
        notes = "\n".join(outcome.result["notes"])
        assert [part for part in situation.says if part not in notes] == [], notes
    assert ground.faults_of_the_cache() == []
    ground.well()
    if situation.code and any("/resolve/" in line for line in outcome.asked):
        after = ground.run(*PAIR, *OUTPUT)
        assert (after.code, after.err) == (0, "")
        assert numbers(after.result) == expected


def test_the_page_on_the_hub_is_what_the_command_says(
    golden: Callable[[str, str], None], ground: Ground, outcome_of: Callable[[Situation], Outcome]
) -> None:
    golden("../../docs/hub.md", page(SITUATIONS, outcome_of, ground))
