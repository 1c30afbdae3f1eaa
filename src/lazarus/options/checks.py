"""What an option may be, whichever command it belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields

from lazarus.errors import UsageError

DTYPES = ("auto", "float32", "bfloat16", "float16")
EXPECTATIONS = ("identical", "changed")


def check_known(kind: type, given: Iterable[str]) -> None:
    """Refuse the name of an option that a record of options does not have.

    Raises:
        UsageError: it names the first one, and those that there are.
    """
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r}. The options are {', '.join(known)}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices.

    Raises:
        UsageError: it names them.
    """
    if value not in choices:
        raise UsageError(f"--{name} {value}: not a choice. Write {_either(choices)}.")


def _either(choices: Sequence[str]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def check_gates(fail_above: float | None, expect: str | None) -> None:
    """Refuse what is no gate.

    Raises:
        UsageError: it names the gate.
    """
    if fail_above is not None:
        check_bound("fail-above", fail_above)
    if expect is not None:
        check_choice("expect", expect, EXPECTATIONS)


def check_bound(name: str, value: float) -> None:
    """Refuse what is no divergence.

    Raises:
        UsageError: it is not a number from 0 to 2.
    """
    if not 0 <= value <= 2:
        raise UsageError(f"--{name} {value}: give a divergence, a number from 0 to 2.")


def check_change(name: str, value: float) -> None:
    """Refuse what is no relative change.

    Raises:
        UsageError: it is not a number of at least 0.
    """
    if not 0 <= value < math.inf:
        raise UsageError(f"--{name} {value}: give a relative change, a number of at least 0.")


def check_device(device: str) -> None:
    """Refuse what is the name of no device.

    Raises:
        UsageError: it is neither auto, cpu, cuda, cuda:N nor mps.
    """
    name, _, index = device.partition(":")
    valid = name in ("auto", "cpu", "cuda", "mps") and (not index or (name == "cuda" and index.isdigit()))
    if not valid or device.endswith(":"):
        raise UsageError(f"--device {device}: not a device. Write auto, cpu, cuda, cuda:N or mps.")
