"""Every option of series, with its default and what it may be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, TypedDict

from lazarus.options.activation import (
    BatchTokens,
    ChatTemplate,
    Memory,
    NoNoiseFloor,
    NoSplit,
    Options,
    Position,
    Threshold,
    Truncate,
)
from lazarus.options.checks import check_bound, check_named
from lazarus.options.common import (
    Anonymous,
    Dequantize,
    Device,
    Dtype,
    Expectation,
    LayersPath,
    NoDigests,
    OnlyCompared,
    Seed,
    TrustRemoteCode,
    check_expectation,
)
from lazarus.options.option import COMPARE, RUN, Checked, Option

FailAbove = Annotated[
    float | None,
    Option(
        "Exit 3 where a layer's divergence of any member is above X.",
        COMPARE,
        "X",
        shown_default="off",
        check=check_bound,
    ),
]
Expect = Annotated[
    Expectation | None,
    Option(
        "Exit 3 where any member is not that, beyond the noise.",
        COMPARE,
        "identical|changed",
        shown_default="off",
        check=check_expectation,
    ),
]
ExpectPath = Annotated[
    bool,
    Option(
        "Exit 3 where members are copies of one another, of base, or out of order.",
        COMPARE,
    ),
]
WorkDir = Annotated[
    str | None,
    Option(
        "Keep the members that are done in this folder, so that an interrupted run goes on where it was.",
        RUN,
        "DIR",
        shown_default="off",
        check=partial(check_named, advice="Name a folder."),
    ),
]


@dataclass(frozen=True)
class SeriesOptions(Checked):
    """The options of `series`, named as on the command line, checked when they are made.

    Raises:
        UsageError: a value that the option does not take.
    """

    position: Position = "auto"
    threshold: Threshold = 0.1
    no_noise_floor: NoNoiseFloor = False
    fail_above: FailAbove = None
    expect: Expect = None
    expect_path: ExpectPath = False
    only_compared: OnlyCompared = False
    chat_template: ChatTemplate = "none"
    no_split: NoSplit = False
    truncate: Truncate = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    batch_tokens: BatchTokens = None
    memory: Memory = "auto"
    dequantize: Dequantize = "auto"
    layers_path: LayersPath = None
    seed: Seed = 0
    trust_remote_code: TrustRemoteCode = False
    no_digests: NoDigests = False
    anonymous: Anonymous = False
    work_dir: WorkDir = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.of_pair()

    def of_pair(self) -> Options:
        """Return the options of activation-diff for each member against base.

        Raises:
            UsageError: as of activation-diff.
        """
        own = {name: value for name, value in vars(self).items() if name not in ("expect_path", "work_dir")}
        return Options(**own, token_prompts="none")


class SeriesArguments(TypedDict, total=False):
    """The same as keyword arguments, for editors and type checkers (a test keeps the two equal)."""

    position: Position
    threshold: Threshold
    no_noise_floor: NoNoiseFloor
    fail_above: FailAbove
    expect: Expect
    expect_path: ExpectPath
    only_compared: OnlyCompared
    chat_template: ChatTemplate
    no_split: NoSplit
    truncate: Truncate
    dtype: Dtype
    device: Device
    batch_tokens: BatchTokens
    memory: Memory
    dequantize: Dequantize
    layers_path: LayersPath
    seed: Seed
    trust_remote_code: TrustRemoteCode
    no_digests: NoDigests
    anonymous: Anonymous
    work_dir: WorkDir
