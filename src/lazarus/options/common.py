"""The options that several commands have."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from lazarus.options.checks import (
    DEQUANTIZE,
    DTYPES,
    EXPECTATIONS,
    check_choice,
    check_device,
    check_named,
    check_seed,
)
from lazarus.options.option import COMPARE, RUN, Option

Dtype = Annotated[
    str,
    Option(
        "What the models run in; auto is float32 on a CPU, the stored type on a GPU.",
        RUN,
        "auto|float32|bfloat16|float16",
        check=partial(check_choice, choices=DTYPES),
    ),
]
Device = Annotated[str, Option("Where the models run.", RUN, "auto|cpu|cuda[:N]|mps", check=check_device)]
Dequantize = Annotated[
    str,
    Option(
        "Run a quantised checkpoint on its dequantised weights; auto: where its kernels are not available "
        "here.",
        RUN,
        "auto|always|never",
        check=partial(check_choice, choices=DEQUANTIZE),
    ),
]
LayersPath = Annotated[
    str | None,
    Option(
        "Where the blocks are, such as model.layers, when they cannot be found.",
        RUN,
        "PATH",
        shown_default="found",
        check=partial(check_named, advice="Give a path such as model.layers."),
    ),
]
Seed = Annotated[int, Option("Of every random choice.", RUN, "N", check=check_seed)]
Anonymous = Annotated[
    bool,
    Option(
        "Leave the machine's paths and the user's name out of what is saved and printed: of a path the last "
        "part stays.",
        RUN,
    ),
]
TrustRemoteCode = Annotated[bool, Option("Allow a model's own Python code.", RUN)]
NoDigests = Annotated[
    bool, Option("Do not compute the SHA-256 of the models' files, which the result lists.", RUN)
]
OnlyCompared = Annotated[
    bool,
    Option("Gates look at what was compared, and not at what else the two checkpoints hold.", COMPARE),
]
Expectation = Literal["identical", "changed"]
check_expectation = partial(check_choice, choices=EXPECTATIONS)
