"""The locks agree with pyproject.toml and constraints.txt, and hold every file by its hash."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import locks

PROJECT = locks.PROJECT["project"]
CONSTRAINTS = locks.pins(locks.CONSTRAINTS.read_text(encoding="utf-8"))
TEXTS = {name: (locks.FOLDER / f"{name}.txt").read_text(encoding="utf-8") for name in locks.LOCKS}
OF_THE_ENVIRONMENT = {name: TEXTS[name] for name in locks.OF_THE_ENVIRONMENT}
AGAIN = "`make lock` writes the locks again"


def wanted(name: str) -> list[Requirement]:
    """What a lock is for, with the extras that an extra names."""
    if name in locks.LISTS:
        return [Requirement(each) for each in locks.LISTS[name]]
    extras = PROJECT["optional-dependencies"]
    found = [Requirement(each) for each in PROJECT["dependencies"]]
    left = [Requirement(each) for extra in locks.EXTRAS[name] for each in extras[extra]]
    while left:
        each = left.pop()
        if each.name == PROJECT["name"]:
            left += [Requirement(of) for extra in each.extras for of in extras[extra]]
        else:
            found.append(each)
    return [each for each in found if each.name != "torch"]


@pytest.mark.parametrize("name", locks.LOCKS)
def test_a_lock_has_all_that_it_is_for(name: str) -> None:
    there = locks.pins(TEXTS[name])
    found = {str(each): (each, there.get(canonicalize_name(each.name))) for each in wanted(name)}
    missing = [told for told, (each, has) in found.items() if has is None or has not in each.specifier]
    assert missing == [], AGAIN


def test_the_constraints_are_what_is_locked_and_torch() -> None:
    locked = {name: v for text in OF_THE_ENVIRONMENT.values() for name, v in locks.pins(text).items()}
    assert locked | {"torch": CONSTRAINTS["torch"]} == CONSTRAINTS, AGAIN
    differ = {n: v for n, v in locks.pins(TEXTS["audit"]).items() if CONSTRAINTS.get(n, v) != v}
    assert differ == {}, AGAIN


@pytest.mark.parametrize("name", locks.LOCKS)
def test_every_package_of_a_lock_has_hashes_and_no_address(name: str) -> None:
    lines = TEXTS[name].replace(" \\\n", "").splitlines()
    assert len(lines) == len(locks.pins(TEXTS[name]))
    unhashed = [line for line in lines if not re.search(r"(?:    --hash=sha256:[0-9a-f]{64})+$", line)]
    assert unhashed == []
    assert not re.search(r"//|--index|--find", TEXTS[name])


@pytest.mark.parametrize("name", locks.LOCKS)
def test_no_lock_decides_which_torch_there_is(name: str) -> None:
    named = [n for n in locks.pins(TEXTS[name]) if re.match(r"(?:torch|triton|nvidia-.*|cuda-.*)$", n)]
    assert named == []
