"""What comes back: frozen records, their JSON, and the JSON Schema that documents them.

A record is data and nothing else; no torch here. The result's rows (one a prompt and layer) are kept
as columns, because a run of 20,000 prompts through 80 layers has 1.6 million of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Annotated, Any, Literal, overload

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from lazarus.errors import SaveError

SCHEMA_VERSION: Literal["1.0"] = "1.0"


@dataclass(frozen=True)
class Metric:
    """How one number is named, printed and explained, wherever it is shown."""

    name: str
    heading: str
    unit: str
    range: str
    format: str
    formula: str
    source: str


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "cosine_similarity",
            "Avg Cos Sim",
            "1",
            "-1 to 1",
            ".4f",
            "1 − divergence",
            "cosine of the angle between the two states",
        ),
        Metric(
            "divergence",
            "Divergence",
            "1",
            "0 to 2",
            ".4f",
            "½‖b̂ − f̂‖², which is 1 − cos without the cancellation",
            "law of cosines on unit vectors",
        ),
        Metric(
            "relative_l2",
            "Rel. L2",
            "1",
            "0 to ∞",
            ".4f",
            "‖f − b‖ / ‖b‖",
            "relative error in the Euclidean norm",
        ),
        Metric("norm_ratio", "Norm Ratio", "1", "0 to ∞", ".4f", "‖f‖ / ‖b‖", "ratio of lengths"),
        Metric(
            "centered_cosine_similarity",
            "Centred Cos",
            "1",
            "-1 to 1",
            ".4f",
            "cosine after each state's own feature mean is taken off",
            "what a LayerNorm reads (Ba et al. 2016, arXiv 1607.06450)",
        ),
    )
}

Layer = Annotated[int, Meta(ge=0, description="the block, counted from 0")]
Cosine = Annotated[float, Meta(description="cosine similarity, -1 to 1, mean over prompts")]
Divergence = Annotated[float, Meta(description="1 - cosine similarity, 0 to 2, mean over prompts")]


class Record(Struct, frozen=True, forbid_unknown_fields=True):
    """The base of every record: immutable, and without a field that the schema does not know."""


class Tool(Record, frozen=True, kw_only=True):
    """Which program made the result."""

    name: str
    version: str


class ModelInfo(Record, frozen=True, kw_only=True):
    """One of the two models, as it was run."""

    id: Annotated[str, Meta(description="as the user named it")]
    revision: Annotated[str | None, Meta(description="the Hub commit, null for local files")]
    kind: Literal["hub", "folder", "gguf", "adapter", "loaded"]
    architecture: Annotated[str, Meta(description="the transformers class")]
    n_layers: Annotated[int, Meta(ge=1, description="blocks, in the order in which they run")]
    hidden_size: Annotated[int, Meta(ge=1, description="width of the residual stream")]
    stored_dtype: Annotated[str | None, Meta(description="type of most of the stored weights")]
    run_dtype: Annotated[str, Meta(description="type in which the model ran")]
    attention: Annotated[str | None, Meta(description="attention implementation")]
    adapter: Annotated[str | None, Meta(description="adapter, and its type, if there is one")]


class Settings(Record, frozen=True, kw_only=True):
    """Every option that the run used; `auto` is replaced by what it came to."""

    position: str
    threshold: float
    dtype: str
    device: str
    batch_tokens: Annotated[int, Meta(description="tokens in one batch, padding included")]
    chat_template: str
    memory: Literal["resident", "stream"]
    align: Literal["ids", "text"]
    localize: bool
    noise_floor: bool
    fail_above: float | None
    expect: Literal["identical", "changed"] | None
    no_split: bool
    truncate: bool
    layers_path: str | None
    seed: int
    trust_remote_code: bool


class Environment(Record, frozen=True, kw_only=True):
    """The software and hardware of the run."""

    python: str
    platform: str
    torch: str
    transformers: str
    device_name: str
    n_threads: int


class PromptRecord(Record, frozen=True, kw_only=True):
    """One prompt. `text` is what the user gave; `rendered` is what a chat template made of it."""

    index: int
    text: str
    group: str | None
    n_tokens: Annotated[int, Meta(ge=1)]
    rendered: str | None


class LocalChange(Record, frozen=True, kw_only=True):
    """What a block's own weights change, apart from what it inherits (null until measured)."""

    relative_l2: float | None
    cosine_similarity: float | None


class Measures(Record, frozen=True, kw_only=True):
    """The numbers of one layer or site: means over prompts of each prompt's own mean over tokens."""

    cosine_similarity: Cosine | None
    divergence: Divergence | None
    flagged: Annotated[bool, Meta(description="divergence above settings.threshold")]
    n_prompts: Annotated[int, Meta(ge=0, description="prompts with at least one finite pair")]
    relative_l2: Annotated[float | None, Meta(description="‖f − b‖ / ‖b‖")]
    norm_ratio: Annotated[float | None, Meta(description="‖f‖ / ‖b‖")]
    centered_cosine_similarity: Annotated[
        float | None, Meta(description="feature-mean-centred cosine; null without LayerNorm")
    ]
    noise_floor: Annotated[float | None, Meta(description="numerical noise, in relative L2")] = None
    unrelated_similarity: Annotated[float | None, Meta(description="mean cosine of unrelated prompts")] = None
    normalized_divergence: Annotated[
        float | None, Meta(description="divergence over 1 - unrelated_similarity")
    ] = None
    interval: Annotated[
        tuple[float, float] | None, Meta(description="95 % interval of the divergence: low, high")
    ] = None
    top1_share: float | None = None
    top3_share: float | None = None
    cka: Annotated[float | None, Meta(description="debiased linear CKA")] = None
    local: LocalChange | None = None


class LayerRecord(Measures, frozen=True, kw_only=True):
    """One block: the residual stream after it, before the final norm."""

    layer: Layer


class SiteRecord(Measures, frozen=True, kw_only=True):
    """A site outside the blocks: what enters the first one, and what leaves the final norm."""

    name: Literal["embedding", "final_norm"]


class ResultRow(Record, frozen=True, kw_only=True):
    """One prompt at one layer: the mean over the prompt's compared tokens; null if none is finite."""

    prompt_index: int
    prompt: str
    layer: Layer
    cosine_similarity: float | None
    divergence: float | None
    relative_l2: float | None
    norm_ratio: float | None
    centered_cosine_similarity: float | None
    local_relative_l2: float | None = None
    local_cosine_similarity: float | None = None


class Output(Record, frozen=True, kw_only=True):
    """The effect on the next-token distribution at the compared position (null until measured)."""

    kl_base_finetuned: float | None
    kl_finetuned_base: float | None
    js: float | None
    top1_agreement: float | None
    base_rank_of_finetuned_top1: float | None


class ReadoutToken(Record, frozen=True, kw_only=True):
    """A token that the mean difference promotes or suppresses."""

    token: str
    token_id: int
    score: float


class Readout(Record, frozen=True, kw_only=True):
    """The mean difference at a layer, read through each model's own head (null until measured)."""

    layer: Layer
    base_promoted: list[ReadoutToken]
    base_suppressed: list[ReadoutToken]
    finetuned_promoted: list[ReadoutToken]
    finetuned_suppressed: list[ReadoutToken]
    static_share: float | None


class GroupCurve(Record, frozen=True, kw_only=True):
    """The divergence per layer of one group of prompts (null until measured)."""

    group: str
    n_prompts: int
    divergence: list[float | None]


class GroupContrast(Record, frozen=True, kw_only=True):
    """Mean log divergence of group a less that of group b, per layer, and its test."""

    group_a: str
    group_b: str
    log_ratio: list[float | None]
    p_value: float | None
    layer: Layer | None


class Groups(Record, frozen=True, kw_only=True):
    """What the prompts' groups show."""

    curves: list[GroupCurve]
    contrasts: list[GroupContrast]


class Summary(Record, frozen=True, kw_only=True):
    """The few numbers that a reader looks for first; null where there is none."""

    most_divergent_layer: Layer | None
    max_divergence: float | None
    first_flagged_layer: Layer | None
    n_flagged_layers: int
    verdict: Literal["identical", "within_noise", "changed"] | None = None
    weights_identical: bool | None = None
    onset_layer: Layer | None = None
    most_changed_block: Layer | None = None


class ResultRows(Sequence[ResultRow]):
    """The rows, prompt by prompt and layer by layer, held as columns of shape [prompts, layers].

    A value that could not be measured is NaN in a column and None in a row.
    """

    COLUMNS = (
        "cosine_similarity",
        "divergence",
        "relative_l2",
        "norm_ratio",
        "centered_cosine_similarity",
        "local_relative_l2",
        "local_cosine_similarity",
    )

    def __init__(self, prompts: Sequence[str], columns: Mapping[str, NDArray[np.float64]]) -> None:
        self.prompts = list(prompts)
        self.columns = dict(columns)
        first = next(iter(self.columns.values()))
        self.n_prompts: int = first.shape[0]
        self.n_layers: int = first.shape[1]

    def __len__(self) -> int:
        return self.n_prompts * self.n_layers

    @overload
    def __getitem__(self, index: int) -> ResultRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[ResultRow]: ...
    def __getitem__(self, index: int | slice) -> ResultRow | list[ResultRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        prompt, layer = divmod(index % len(self), self.n_layers)
        values = {name: finite_or_none(column[prompt, layer]) for name, column in self.columns.items()}
        return ResultRow(
            prompt_index=prompt,
            prompt=self.prompts[prompt],
            layer=layer,
            **{name: values.get(name) for name in self.COLUMNS},
        )

    def __iter__(self) -> Iterator[ResultRow]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ResultRows):
            return NotImplemented
        return self.prompts == other.prompts and all(
            np.array_equal(self.column(name), other.column(name), equal_nan=True) for name in self.COLUMNS
        )

    __hash__ = None  # type: ignore[assignment]

    def column(self, name: str) -> NDArray[np.float64]:
        """One metric for every prompt and layer, [prompts, layers]; NaN where not measured."""
        if name in self.columns:
            return self.columns[name]
        return np.full((self.n_prompts, self.n_layers), np.nan)

    @classmethod
    def from_rows(cls, rows: Sequence[ResultRow]) -> ResultRows:
        """Columns out of rows that were read from a file, which must be complete and in order."""
        n_layers = max((row.layer for row in rows), default=-1) + 1
        places = [(row.prompt_index, row.layer) for row in rows]
        if not rows or places != [divmod(i, n_layers) for i in range(len(rows))]:
            raise SaveError("results: the rows are not one a prompt and layer, in order")
        columns = {
            name: np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in cls.COLUMNS
        }
        shape = (len(rows) // n_layers, n_layers)
        return cls(
            [row.prompt for row in rows[::n_layers]],
            {name: column.reshape(shape) for name, column in columns.items()},
        )


class ActivationDiffRecord(Record, frozen=True, kw_only=True):
    """The whole result of activation-diff: the object that JSON holds."""

    schema_version: Literal["1.0"]
    command: Literal["activation-diff"]
    tool: Tool
    created: Annotated[str, Meta(description="ISO 8601, UTC")]
    base: ModelInfo
    finetuned: ModelInfo
    settings: Settings
    environment: Environment
    prompts: list[PromptRecord]
    layers: list[LayerRecord]
    sites: list[SiteRecord]
    results: ResultRows
    summary: Summary
    output: Output | None = None
    readout: list[Readout] | None = None
    groups: Groups | None = None
    notes: list[str] = []


def finite_or_none(value: float) -> float | None:
    """The value as a Python float, or None where it is NaN or infinite.

    >>> finite_or_none(0.5), finite_or_none(float("nan"))
    (0.5, None)
    """
    number = float(value)
    return number if np.isfinite(number) else None


def write_json(record: ActivationDiffRecord, stream: IO[bytes]) -> None:
    """Write the record as JSON, one row a line, without ever holding the whole text."""
    encoder = msgspec.json.Encoder()
    separator = b"{\n"
    for name in record.__struct_fields__:
        value = getattr(record, name)
        stream.write(separator + b"  " + encoder.encode(name) + b": ")
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            for position, item in enumerate(value):
                stream.write(b"[\n    " if position == 0 else b",\n    ")
                stream.write(encoder.encode(_labelled(item)))
            stream.write(b"\n  ]")
        else:
            stream.write(encoder.encode(value))
        separator = b",\n"
    stream.write(b"\n}\n")


def read_json(text: bytes) -> ActivationDiffRecord:
    """Read a record back, checking every field.

    Raises:
        SaveError: it is not JSON, or not a result of this schema version.
    """
    try:
        return _DECODER.decode(text)
    except msgspec.DecodeError as error:
        raise SaveError(
            f"not an activation-diff result of schema version {SCHEMA_VERSION}: {error}. "
            "Save it again with this version of lazarus."
        ) from error


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `-o FILE.json` writes."""
    (reference,), components = msgspec.json.schema_components(
        [ActivationDiffRecord], schema_hook=_rows_schema, ref_template="#/$defs/{name}"
    )
    _, rows = msgspec.json.schema_components([ResultRow], ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lazarus activation-diff",
        **reference,
        "$defs": {**components, **rows},
    }


def _labelled(item: object) -> object:
    """The record with its layer or name in front, where a reader's eye looks for it."""
    if isinstance(item, LayerRecord):
        return {"layer": item.layer, **msgspec.structs.asdict(item)}
    if isinstance(item, SiteRecord):
        return {"name": item.name, **msgspec.structs.asdict(item)}
    return item


def _rows_schema(kind: type) -> dict[str, Any]:
    assert kind is ResultRows, kind
    return {"type": "array", "items": {"$ref": "#/$defs/ResultRow"}}


def _rows_from_json(kind: type, rows: Any) -> ResultRows:
    assert kind is ResultRows, kind
    return ResultRows.from_rows(msgspec.convert(rows, list[ResultRow]))


_DECODER = msgspec.json.Decoder(ActivationDiffRecord, dec_hook=_rows_from_json)
