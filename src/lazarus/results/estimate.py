"""The estimate of a run: what it would take on this machine."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lazarus.results.rows import Record


class EstimatedPart(Record, frozen=True, kw_only=True):
    """A part of a run, and its time."""

    name: str
    seconds: float


class Estimate(Record, frozen=True, kw_only=True):
    """The cost of a run on this machine, not yet run."""

    command: str
    base: str
    finetuned: Annotated[str | None, Meta(description="null where one model runs alone, and of a series")]
    members: Annotated[list[str], Meta(description="of a series; else none")] = msgspec.field(
        default_factory=list
    )
    mode: Annotated[
        Literal["resident", "stream"], Meta(description="both models in memory, or a block of each at a time")
    ]
    dtype: str
    device: str
    n_threads: int
    n_prompts: int
    n_tokens: Annotated[int, Meta(description="of all prompts, as base reads them, without padding")]
    n_batches: int
    bytes_read: Annotated[
        int, Meta(description="of the files of the weights; what is read twice counts twice")
    ]
    bytes_written: Annotated[
        int,
        Meta(
            description="of a recording, without logits and what is inside blocks; of the compared rows of a "
            "series"
        ),
    ] = 0
    rows_read: Annotated[
        int, Meta(description="bytes of the compared rows of a series, each time that they are read")
    ] = 0
    peak_bytes: Annotated[int, Meta(description="the largest resident set of the process")]
    device_bytes: Annotated[int | None, Meta(description="the peak of a GPU's memory; null on a CPU")]
    flops: Annotated[
        int,
        Meta(description="of all passes over the prompts, in products and attention"),
    ]
    seconds: Annotated[float, Meta(description="of all parts together")]
    parts: list[EstimatedPart]
    remarks: Annotated[list[str], Meta(description="what is not in the estimate, or is in it by a rule")]
