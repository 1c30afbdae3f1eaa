"""Checks of options, whichever command they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lazarus.errors import UsageError
from lazarus.messages import option

DEQUANTIZE = ("auto", "always", "never")
DTYPES = ("auto", "float32", "bfloat16", "float16")
EXPECTATIONS = ("identical", "changed")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices.

    Raises:
        UsageError: it names them.
    """
    if value not in choices:
        raise UsageError(f"{option(name, value)}: not a choice. Write {_either(choices)}.", option=name)


def _either(choices: Sequence[str]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def check_bound(name: str, value: float | None) -> None:
    """Refuse what is no divergence.

    Raises:
        UsageError: it is not a number from 0 to 2.
    """
    if value is None or not 0 <= value <= 2:
        raise UsageError(f"{option(name, value)}: give a divergence, a number from 0 to 2.", option=name)


def check_change(name: str, value: float | None) -> None:
    """Refuse what is no relative change.

    Raises:
        UsageError: it is not a number of at least 0.
    """
    if value is None or not 0 <= value < math.inf:
        raise UsageError(
            f"{option(name, value)}: give a relative change, a number of at least 0.", option=name
        )


def check_device(name: str, device: str | None) -> None:
    """Refuse what is the name of no device.

    Raises:
        UsageError: it is neither auto, cpu, cuda, cuda:N nor mps.
    """
    kind, _, index = str(device).partition(":")
    valid = kind in ("auto", "cpu", "cuda", "mps") and (not index or (kind == "cuda" and index.isdigit()))
    if not valid or str(device).endswith(":"):
        raise UsageError(
            f"{option(name, device)}: not a device. Write auto, cpu, cuda, cuda:N or mps.", option=name
        )


def check_named(name: str, value: str, *, advice: str) -> None:
    """Refuse an empty name.

    Raises:
        UsageError: it is empty, with the advice.
    """
    if value == "":
        raise UsageError(f"{option(name)} is empty. {advice}", option=name)


def check_seed(name: str, value: int) -> None:
    """Refuse a seed that torch or NumPy does not take.

    Raises:
        UsageError: it is negative, or has more than 63 bits.
    """
    if value is None or not 0 <= value < 2**63:
        raise UsageError(f"{option(name, value)}: give a whole number from 0 to 2**63 - 1.", option=name)


def check_count(name: str, value: int | None) -> None:
    """Refuse what is no count of at least 1.

    Raises:
        UsageError: it is below 1, or a bool.
    """
    if value is None or isinstance(value, bool) or value < 1:
        raise UsageError(f"{option(name, value)}: give a number of at least 1.", option=name)
