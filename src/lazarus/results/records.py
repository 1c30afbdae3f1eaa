"""Frozen records of a result. Fields of later features are there from the start, null until measured."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from lazarus.results.measured import (
    Attribution,
    ComponentRecord,
    Groups,
    LayerRecord,
    Mined,
    Output,
    Readout,
    SiteRecord,
    TokenTrace,
)
from lazarus.results.outside import NotCompared, ReadFile
from lazarus.results.rows import Layer, Record, ResultRows

SCHEMA_VERSION: Literal["1.0"] = "1.0"

Verdict = Literal["identical", "within_noise", "within_rounding", "changed"]


class Tool(Record, frozen=True, kw_only=True):
    """Program that made the result."""

    name: str
    version: str


class ModelInfo(Record, frozen=True, kw_only=True):
    """One of the two models, as it was run."""

    id: Annotated[str, Meta(description="as the user named it")]
    revision: Annotated[str | None, Meta(description="the Hub commit, null for local files")]
    kind: Literal["hub", "folder", "gguf", "adapter", "loaded", "recording"]
    architecture: Annotated[str, Meta(description="the transformers class")]
    n_layers: Annotated[int, Meta(ge=1, description="blocks, in the order in which they run")]
    hidden_size: Annotated[int, Meta(ge=1, description="width of the residual stream")]
    stored_dtype: Annotated[str | None, Meta(description="type of most of the stored weights")]
    run_dtype: Annotated[str, Meta(description="type in which the model ran")]
    attention: Annotated[str | None, Meta(description="attention implementation")]
    adapter: Annotated[str | None, Meta(description="adapter, and its type, if there is one")]
    not_compared: Annotated[
        list[NotCompared], Meta(description="what it holds besides what was compared")
    ] = field(default_factory=list)
    files: Annotated[
        list[ReadFile], Meta(description="what it was read from; empty for a model in memory")
    ] = field(default_factory=list)
    runtime: Annotated[
        str | None, Meta(description="of a recording: the software that ran it; null where it ran here")
    ] = None


class Settings(Record, frozen=True, kw_only=True):
    """Every option that the run used; `auto` is replaced by what it came to."""

    position: str
    threshold: float
    dtype: str
    device: str
    batch_tokens: Annotated[int, Meta(description="tokens in one batch, padding included")]
    chat_template: str
    memory: Literal["resident", "stream"]
    dequantize: str = "auto"
    align: Literal["ids", "text"]
    localize: bool
    sites: Literal["blocks", "all"] = "blocks"
    attribute: Literal["blocks", "tensors"] | None = None
    readout: str | None = None
    noise_floor: bool
    noise_from: str | None = None
    fail_above: float | None
    expect: Literal["identical", "changed"] | None
    only_compared: bool = False
    no_split: bool
    truncate: bool
    layers_path: str | None
    seed: int
    trust_remote_code: bool
    no_digests: bool = False
    work_dir: str | None = None
    token_prompts: str | None = None
    anonymous: bool = False


class Environment(Record, frozen=True, kw_only=True):
    """The software and hardware of the run."""

    python: str
    platform: str
    torch: str
    transformers: str
    device_name: str
    n_threads: int
    matmul: Annotated[
        Literal["default", "onednn"] | None,
        Meta(
            description="in results of earlier versions: how float32 matrices were multiplied on a CPU; null "
            "for torch's default"
        ),
    ] = None


class PromptRecord(Record, frozen=True, kw_only=True):
    """One prompt. `text` is what the user gave; `rendered` is what the models read of it."""

    index: int
    text: str
    group: str | None
    n_tokens: Annotated[int, Meta(ge=1)]
    rendered: str | None
    finetuned_n_tokens: Annotated[
        int | None, Meta(description="with align text: tokens in the fine-tuned model's own reading")
    ] = None


class Summary(Record, frozen=True, kw_only=True):
    """The few numbers that a reader looks for first; null where there is none."""

    most_divergent_layer: Layer | None
    max_divergence: float | None
    first_flagged_layer: Layer | None
    n_flagged_layers: int
    verdict: Annotated[
        Verdict | None,
        Meta(
            description="of what was compared: bit for bit the same; different by no more than the noise, or "
            "than the rounding of the stored weights; or changed"
        ),
    ] = None
    causes: Annotated[
        list[str], Meta(description="where nothing changed: what was found that may explain it")
    ] = field(default_factory=list)
    weights_identical: Annotated[
        bool | None,
        Meta(
            description="both run on the same weights, and what was not compared is the same; null where "
            "that is not known"
        ),
    ] = None
    n_prompts_left_out: Annotated[
        int | None, Meta(description="prompts of which a state could not be compared, and was left out")
    ] = None
    n_outputs_left_out: Annotated[
        int | None, Meta(description="prompts of which the logits of one of the models were not finite")
    ] = None
    onset_layer: Annotated[
        Layer | None, Meta(description="from here on every layer's divergence is above the noise")
    ] = None
    most_changed_block: Annotated[
        Layer | None, Meta(description="the block with the largest local change")
    ] = None


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
    components: list[ComponentRecord] | None = None
    results: ResultRows
    summary: Summary
    output: Output | None = None
    attribution: Attribution | None = None
    mined: Mined | None = None
    readout: list[Readout] | None = None
    groups: Groups | None = None
    tokens: list[TokenTrace] | None = None
    notes: list[str]
    note_codes: list[str] = field(default_factory=list)
