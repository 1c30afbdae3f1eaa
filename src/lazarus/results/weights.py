"""The record of weight-diff and its parts: one row a tensor."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from lazarus.results.outside import NotCompared, ReadFile
from lazarus.results.records import Environment, Tool
from lazarus.results.rows import Layer, Record
from lazarus.results.weight_glossary import WEIGHT_METRICS

WeightVerdict = Literal["identical", "rounding", "changed"]
RelativeChange = Annotated[float | None, WEIGHT_METRICS["relative_change"].meta]


class CheckpointInfo(Record, frozen=True, kw_only=True):
    """One of the two checkpoints."""

    id: Annotated[str, Meta(description="as the user named it")]
    revision: Annotated[str | None, Meta(description="the Hub commit, null for local files")]
    kind: Literal["hub", "folder", "gguf", "adapter"]
    family: Annotated[str, Meta(description="the configuration's model_type")]
    architecture: Annotated[str, Meta(description="the transformers class")]
    n_layers: Annotated[int, Meta(ge=0, description="blocks; 0 where they cannot be found")]
    n_tensors: Annotated[int, Meta(ge=0, description="tensors in the files")]
    n_parameters: Annotated[int, Meta(ge=0, description="numbers in them")]
    stored_dtype: Annotated[str | None, Meta(description="type of most of the stored numbers")]
    adapter: Annotated[str | None, Meta(description="adapter, and its type, if there is one")]
    not_compared: Annotated[
        list[NotCompared], Meta(description="what it holds besides what was compared")
    ] = field(default_factory=list)
    files: Annotated[list[ReadFile], Meta(description="what it was read from")] = field(default_factory=list)


class WeightSettings(Record, frozen=True, kw_only=True):
    """Every option that the run used."""

    threshold: float
    spectrum: bool
    fail_above: float | None
    expect: Literal["identical", "changed"] | None
    only_compared: bool = False
    layers_path: str | None
    seed: int
    allow_pickle: bool
    trust_remote_code: bool
    no_digests: bool = False
    anonymous: bool = False


class Spectrum(Record, frozen=True, kw_only=True):
    """The singular values σ₁ ≥ σ₂ ≥ … of one matrix's update f − b."""

    method: Annotated[
        Literal["exact", "randomised"],
        Meta(description="all singular values, or the largest by a randomised SVD"),
    ]
    n_singular_values: Annotated[int, Meta(ge=1, description="how many were computed, of min(rows, columns)")]
    spectral_norm: Annotated[float, WEIGHT_METRICS["spectral_norm"].meta]
    stable_rank: Annotated[float, WEIGHT_METRICS["stable_rank"].meta]
    effective_rank: Annotated[float | None, WEIGHT_METRICS["effective_rank"].meta]
    rank_90: Annotated[int | None, WEIGHT_METRICS["rank_90"].meta]
    share_computed: Annotated[float, WEIGHT_METRICS["share_computed"].meta]
    rounding_norm: Annotated[float | None, WEIGHT_METRICS["rounding_norm"].meta]
    adapter_rank: Annotated[int | None, WEIGHT_METRICS["adapter_rank"].meta]
    singular_values: Annotated[list[float], Meta(description="the 32 largest")]


class Quantisation(Record, frozen=True, kw_only=True):
    """The quantisation of one of the two tensors, where the other is not quantised: q against w."""

    role: Annotated[Literal["base", "finetuned"], Meta(description="which of the two is quantised")]
    scheme: Annotated[str, Meta(description="the method and the kind of its codes, such as `gptq int4`")]
    bits: Annotated[int, Meta(ge=1, description="of one code")]
    block: Annotated[list[int], Meta(description="rows and columns that have one scale in common")]
    relative_error: Annotated[float | None, WEIGHT_METRICS["relative_error"].meta]
    nearest_relative_error: Annotated[float | None, WEIGHT_METRICS["nearest_relative_error"].meta]
    error_ratio: Annotated[float | None, WEIGHT_METRICS["error_ratio"].meta]
    outlier_share: Annotated[float | None, WEIGHT_METRICS["outlier_share"].meta]


class TensorRecord(Record, frozen=True, kw_only=True):
    """One tensor of both checkpoints, or the part of a fused one that is one component."""

    layer: Annotated[Layer | None, Meta(description="the block; null outside the blocks")]
    component: Annotated[str, Meta(description="its standard name, such as attn_q or attn_q.bias")]
    name: Annotated[str, Meta(description="the parameter's or the file's name for it, in base")]
    shape: Annotated[list[int], Meta(description="what was compared")]
    base_dtype: str
    finetuned_dtype: str
    relative_change: RelativeChange
    flagged: Annotated[bool, Meta(description="relative_change above settings.threshold")]
    cosine_similarity: Annotated[float | None, WEIGHT_METRICS["cosine_similarity"].meta]
    max_abs_change: Annotated[float | None, WEIGHT_METRICS["max_abs_change"].meta]
    share_changed: Annotated[float, WEIGHT_METRICS["share_changed"].meta]
    n_changed: Annotated[int, Meta(ge=0)]
    base_norm: Annotated[float | None, WEIGHT_METRICS["base_norm"].meta]
    change_norm: Annotated[float | None, WEIGHT_METRICS["change_norm"].meta]
    spectrum: Annotated[Spectrum | None, Meta(description="of a changed matrix, with spectrum")] = None
    rounding: Annotated[
        bool | None,
        Meta(
            description="whether all of the change is rounding: one is the other, with an adapter's update "
            "or without, rounded to the type it is stored in"
        ),
    ] = None
    merged_share: Annotated[
        float | None,
        Meta(
            description="share of an adapter's update that the other's tensor holds: 1 of a right merge, "
            "0 where it was left out, 2 where it was added twice"
        ),
    ] = None
    quantisation: Annotated[
        Quantisation | None, Meta(description="where one of the two is quantised: how, and its error")
    ] = None


class WeightLayerRecord(Record, frozen=True, kw_only=True):
    """One block: all of its tensors together."""

    layer: Layer
    relative_change: RelativeChange
    n_tensors: Annotated[int, Meta(ge=0)]
    n_changed_tensors: Annotated[int, Meta(ge=0)]


class UnmatchedTensor(Record, frozen=True, kw_only=True):
    """A tensor that only one of the two has, or of which they have other shapes."""

    layer: Layer | None
    component: str
    name: str
    base_shape: Annotated[list[int] | None, Meta(description="null where base has none")]
    finetuned_shape: Annotated[list[int] | None, Meta(description="null where the fine-tuned one has none")]
    rows_alone: Annotated[
        tuple[int, int] | None,
        Meta(
            description="of a vocabulary's tensor that was compared in part: how many rows only base has, "
            "and how many only fine-tuned"
        ),
    ] = None


class CopiedLayers(Record, frozen=True, kw_only=True):
    """Layers of fine-tuned that are as many layers of base, one after the other, bit for bit."""

    base: Annotated[Layer, Meta(description="the first of these layers in base")]
    finetuned: Annotated[Layer, Meta(description="the first of them in fine-tuned")]
    n_layers: Annotated[int, Meta(ge=1, description="how many they are")]


class WeightSummary(Record, frozen=True, kw_only=True):
    """The few numbers that a reader looks for first; null where there is none."""

    verdict: Annotated[
        WeightVerdict,
        Meta(
            description="identical: the same tensors with the same bits; rounding: every tensor that differs "
            "is the other's, with an adapter's update or without, rounded to the type it is stored in; "
            "changed: anything else"
        ),
    ]
    causes: Annotated[
        list[str],
        Meta(description="where nothing but rounding changed: what was found that may explain it"),
    ]
    relative_change: Annotated[
        float | None, Meta(description="of all matched tensors together, ‖f − b‖ / ‖b‖")
    ]
    n_tensors: Annotated[int, Meta(ge=0, description="rows")]
    n_changed_tensors: Annotated[int, Meta(ge=0, description="rows with at least one other bit")]
    n_flagged_tensors: Annotated[int, Meta(ge=0)]
    n_unmatched: Annotated[int, Meta(ge=0)]
    most_changed: Annotated[
        list[int], Meta(description="indices into results of the largest relative changes, at most 5, not 0")
    ]
    first_changed_layer: Annotated[Layer | None, Meta(description="the first block with another bit")]
    n_moved_tokens: Annotated[
        int, Meta(ge=0, description="tokens with another id, whose rows were compared with each other")
    ] = 0
    n_matrices: Annotated[int | None, Meta(description="changed matrices with a spectrum")] = None
    n_low_rank: Annotated[int | None, Meta(description="of these, how many look like an adapter's")] = None
    adapter_rank: Annotated[
        int | None, Meta(description="the largest adapter_rank, where every changed matrix has one")
    ] = None


class WeightDiffRecord(Record, frozen=True, kw_only=True):
    """The whole result of weight-diff: the object that JSON holds."""

    schema_version: Literal["1.0"]
    command: Literal["weight-diff"]
    tool: Tool
    created: Annotated[str, Meta(description="ISO 8601, UTC")]
    base: CheckpointInfo
    finetuned: CheckpointInfo
    settings: WeightSettings
    environment: Environment
    layers: list[WeightLayerRecord]
    results: list[TensorRecord]
    unmatched: list[UnmatchedTensor]
    summary: WeightSummary
    notes: list[str]
    note_codes: list[str] = field(default_factory=list)
    copied_layers: Annotated[
        list[CopiedLayers],
        Meta(description="where the depths differ: which layers of fine-tuned are copies of base's"),
    ] = field(default_factory=list)
