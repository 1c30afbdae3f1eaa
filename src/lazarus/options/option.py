"""The description of an option, once: its help, its values, its check.

The type and the default stand beside it, in a frozen record for each command. The command line, its help and
the reference in the docs are made from these records (`described`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from pathlib import PurePath
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from lazarus.errors import UsageError
from lazarus.messages import flag, option

RUN, COMPARE, READ = "How it runs", "What is compared", "How prompts are read"
"""the panels of the help"""


@dataclass(frozen=True)
class Option:
    """The help of an option, and the check of its values."""

    help: str
    panel: str
    metavar: str | None = None
    """what is typed after it; None for a switch"""
    shown_default: str | None = None
    """what the help shows for the default, where that is None"""
    check: Callable[[str, Any], None] | None = None
    """takes the option's name and its value, and raises UsageError"""


@dataclass(frozen=True)
class Described:
    """An option with its name as a keyword, its type and its default."""

    name: str
    type: Any
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return flag(self.name)


@cache
def described(kind: type) -> dict[str, Described]:
    """Return the options of a record by their names, in its order."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        field.name: Described(field.name, *_parts(hints[field.name], field.default)) for field in fields(kind)
    }


def _parts(hint: Any, default: Any) -> tuple[Any, Any, Option]:
    kind, option = get_args(hint)
    return kind, default, option


def check(kind: type, **given: Any) -> None:
    """Check values of options of a record; None is refused where the option does not take it.

    Raises:
        UsageError: an option that the record does not have, or a value that it does not take.
    """
    known = described(kind)
    if unknown := sorted(given.keys() - known.keys()):
        raise UsageError(
            f"unknown option {unknown[0]!r}. The options are {', '.join(known)}.", option=unknown[0]
        )
    for name, value in given.items():
        found = known[name]
        if value is None and type(None) in get_args(found.type):
            continue
        # Of None a check of its own says more; without one a switch would take it, or any text, as an answer.
        if value is not None or found.option.check is None:
            _check_type(name, value, found.type)
        if found.option.check is not None:
            found.option.check(name, value)


_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((Integral,), "a whole number"),
    float: ((Real,), "a number"),
    str: ((str, PurePath), "a text"),
    Sequence: ((list, tuple), "a list of texts"),
}
"""what a type of an option takes, and how that is said"""


def _check_type(name: str, value: Any, kind: Any) -> None:
    """Refuse a value of another type than an option's.

    Raises:
        UsageError: it says which types the option takes.
    """
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    # The values of a Literal are texts, and the option's own check names them.
    origins = [str if get_origin(member) is Literal else get_origin(member) or member for member in members]
    known = [_KINDS[origin] for origin in origins if origin in _KINDS]
    is_switch = isinstance(value, bool)
    if not any(isinstance(value, types) and (not is_switch or bool in types) for types, _ in known):
        told = " or ".join(said for _, said in known)
        raise UsageError(f"{option(name)}: {value!r:.60} is of the wrong type. Give {told}.", option=name)


class Checked:
    """A record of options: each is checked when the record is made."""

    def __post_init__(self) -> None:
        check(type(self), **vars(self))

    @classmethod
    def make(cls, **given: Any) -> Self:
        """Return options from keyword arguments.

        Raises:
            UsageError: an unknown option, or a value that it does not take.
        """
        check(cls, **given)
        return cls(**given)
