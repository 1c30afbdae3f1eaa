"""The record of series and its parts: many models against one base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, field

from lazarus.results.measured import LayerRecord, Output, SiteRecord
from lazarus.results.records import (
    Environment,
    ModelInfo,
    PromptRecord,
    Settings,
    Summary,
    Tool,
    Verdict,
)
from lazarus.results.rows import Layer, Record
from lazarus.results.series_glossary import SERIES_METRICS

Distance = Annotated[float, SERIES_METRICS["distance"].meta]
FindingKind = Literal[
    "duplicate", "same_as_base", "same_as_last", "same_first_blocks", "out_of_order", "change_point"
]


class Predecessor(Record, frozen=True, kw_only=True):
    """A member against the member before it, which stands in base's place."""

    divergence: Annotated[float | None, Meta(description="that of the most divergent layer")]
    layer: Annotated[Layer | None, Meta(description="the most divergent layer")]
    kl: Annotated[
        float | None, Meta(description="KL(predecessor‖member) of the next token in nats, mean over prompts")
    ]
    verdict: Verdict | None
    distance: Annotated[float | None, SERIES_METRICS["distance"].meta]


class SeriesMember(Record, frozen=True, kw_only=True):
    """One model of the series, against base."""

    model: ModelInfo
    step: Annotated[
        int | None, Meta(description="the step of training, read from the last number in its name")
    ]
    summary: Summary
    layers: list[LayerRecord]
    sites: list[SiteRecord]
    output: Output | None
    distance: Annotated[float | None, SERIES_METRICS["distance"].meta]
    turn: Annotated[float | None, SERIES_METRICS["turn"].meta]
    previous: Annotated[
        Predecessor | None, Meta(description="against the member before it; null of the first one")
    ]


class SeriesFinding(Record, frozen=True, kw_only=True):
    """A finding on the series as a whole."""

    kind: FindingKind
    members: Annotated[list[int], Meta(description="the places of the members that it is about, from 0")]
    text: str
    interval: Annotated[
        tuple[int, int] | None,
        Meta(description="of a change point: the first and the last member after which it may be"),
    ] = None
    strength: Annotated[
        float | None, Meta(description="of a change point: how strong it is; from 1 on it is told")
    ] = None


class SeriesRecord(Record, frozen=True, kw_only=True):
    """The whole result of series: the object that JSON holds."""

    schema_version: Literal["1.0"]
    command: Literal["series"]
    tool: Tool
    created: Annotated[str, Meta(description="ISO 8601, UTC")]
    base: ModelInfo
    settings: Settings
    environment: Environment
    prompts: list[PromptRecord]
    members: list[SeriesMember]
    distances: Annotated[
        list[list[Distance | None]], Meta(description="between any two members, [members, members]")
    ]
    findings: list[SeriesFinding]
    notes: list[str]
    note_codes: list[str] = field(default_factory=list)


_STEP = re.compile(r"(?P<before>.*?)0*(?P<step>\d+)\D*$", re.DOTALL)
_GGUF_TYPE = re.compile(r"(?i)(?<![a-z0-9])(?:(?:i?q|tq)\d\w*|b?f(?:16|32|64)|mxfp4\w*)(?![a-z0-9])")
"""what a quantised file has in its name"""


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts names by the numbers in them.

    >>> sorted(["step1000", "step200", "step30"], key=natural)
    ['step30', 'step200', 'step1000']
    """
    parts = [(part.lstrip("0"), part) for part in re.split(r"(\d+)", name)]
    # Of two numbers the one with more digits is larger. Python reads none of more than 4,300.
    return [(1, len(number), number) if part.isdecimal() else (0, 0, part) for number, part in parts]


def steps_of(names: Sequence[str]) -> list[int | None]:
    """Return the step of training in each name: the last number of its last part.

    Only where all have one, all of them differ, and what stands before it is the same in all but for numbers:
    other names are of models that are no steps of one run. A type of GGUF, such as q4_0, is no number.

    >>> steps_of(["run/checkpoint-100", "run/checkpoint-200"]), steps_of(["a-7b", "b-7b"])
    ([100, 200], [None, None])
    >>> steps_of(["m-f16.gguf", "m-q8_0.gguf", "m-q8_1.gguf"]), steps_of(["llama-3", "gemma-4"])
    ([None, None, None], [None, None])
    """
    found = [_STEP.match(_GGUF_TYPE.sub("", _last_part(name))) for name in names]
    texts = {re.sub(r"\d+", "", match["before"]) for match in found if match}
    steps = [int(match["step"]) for match in found if match]
    is_run = len(texts) == 1 and len({*steps}) == len(names)
    return list(steps) if is_run else [None] * len(names)


def _last_part(name: str) -> str:
    tail = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return tail.rpartition("@")[2]
