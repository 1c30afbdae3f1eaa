"""Every option of weight-diff, with its default and what it may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

from lazarus.errors import UsageError
from lazarus.options.checks import EXPECTATIONS, check_change, check_choice


@dataclass(frozen=True)
class WeightOptions:
    """The options of `weight_diff`, named as on the command line, checked when they are made.

    Raises:
        UsageError: a value that the option does not take.
    """

    threshold: float = 0.1
    spectrum: bool = False
    fail_above: float | None = None
    expect: Literal["identical", "changed"] | None = None
    only_compared: bool = False
    layers_path: str | None = None
    seed: int = 0
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_change("threshold", self.threshold)
        check_weight_gates(self.fail_above, self.expect)
        if self.layers_path == "":
            raise UsageError("--layers-path is empty. Give a path such as model.layers.")


class WeightArguments(TypedDict, total=False):
    """The same as keyword arguments, for editors and type checkers (a test keeps the two equal)."""

    threshold: float
    spectrum: bool
    fail_above: float | None
    expect: Literal["identical", "changed"] | None
    only_compared: bool
    layers_path: str | None
    seed: int
    allow_pickle: bool
    trust_remote_code: bool


def check_weight_gates(fail_above: float | None, expect: str | None) -> None:
    """Refuse what is no gate of weight-diff.

    Raises:
        UsageError: it names the gate.
    """
    if fail_above is not None:
        check_change("fail-above", fail_above)
    if expect is not None:
        check_choice("expect", expect, EXPECTATIONS)
