"""Every option of weight-diff, with its default and what it may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypedDict

from lazarus.options.checks import check_change
from lazarus.options.common import (
    Anonymous,
    Expectation,
    LayersPath,
    NoDigests,
    OnlyCompared,
    Seed,
    TrustRemoteCode,
    check_expectation,
)
from lazarus.options.option import COMPARE, RUN, Checked, Option

Threshold = Annotated[float, Option("The relative change that *** marks.", COMPARE, "X", check=check_change)]
Spectrum = Annotated[
    bool,
    Option("Also each update's singular values: its rank, and whether it looks like an adapter's.", COMPARE),
]
FailAbove = Annotated[
    float | None,
    Option(
        "Exit 3 where a tensor's relative change is above X.",
        COMPARE,
        "X",
        shown_default="off",
        check=check_change,
    ),
]
Expect = Annotated[
    Expectation | None,
    Option(
        "Exit 3 where the two checkpoints are not that, bit for bit.",
        COMPARE,
        "identical|changed",
        shown_default="off",
        check=check_expectation,
    ),
]
AllowPickle = Annotated[
    bool, Option("Read .bin checkpoints too, by torch's loader of plain tensors (weights_only).", RUN)
]


@dataclass(frozen=True)
class WeightOptions(Checked):
    """The options of `weight_diff`, named as on the command line, checked when they are made.

    Raises:
        UsageError: a value that the option does not take.
    """

    threshold: Threshold = 0.1
    spectrum: Spectrum = False
    fail_above: FailAbove = None
    expect: Expect = None
    only_compared: OnlyCompared = False
    layers_path: LayersPath = None
    seed: Seed = 0
    allow_pickle: AllowPickle = False
    trust_remote_code: TrustRemoteCode = False
    no_digests: NoDigests = False
    anonymous: Anonymous = False


class WeightArguments(TypedDict, total=False):
    """The same as keyword arguments, for editors and type checkers (a test keeps the two equal)."""

    threshold: Threshold
    spectrum: Spectrum
    fail_above: FailAbove
    expect: Expect
    only_compared: OnlyCompared
    layers_path: LayersPath
    seed: Seed
    allow_pickle: AllowPickle
    trust_remote_code: TrustRemoteCode
    no_digests: NoDigests
    anonymous: Anonymous
