"""Frozen records of a result. Fields of later features are there from the start, null until measured."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from lazarus.results.glossary import METRICS
from lazarus.results.outside import NotCompared
from lazarus.results.rows import Layer, Record, ResultRows

SCHEMA_VERSION: Literal["1.0"] = "1.0"

Verdict = Literal["identical", "within_noise", "within_rounding", "changed"]
Cosine = Annotated[float, METRICS["cosine_similarity"].meta]
Divergence = Annotated[float, METRICS["divergence"].meta]


class Tool(Record, frozen=True, kw_only=True):
    """Program that made the result."""

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
    not_compared: Annotated[
        list[NotCompared], Meta(description="what it holds besides what was compared")
    ] = field(default_factory=list)


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
    attribute: Literal["blocks", "tensors"] | None = None
    readout: str | None = None
    noise_floor: bool
    fail_above: float | None
    expect: Literal["identical", "changed"] | None
    only_compared: bool = False
    no_split: bool
    truncate: bool
    layers_path: str | None
    seed: int
    trust_remote_code: bool
    work_dir: str | None = None
    token_prompts: str | None = None


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
    """One prompt. `text` is what the user gave; `rendered` is what a chat template made of it."""

    index: int
    text: str
    group: str | None
    n_tokens: Annotated[int, Meta(ge=1)]
    rendered: str | None
    finetuned_n_tokens: Annotated[
        int | None, Meta(description="with align text: tokens in the fine-tuned model's own reading")
    ] = None


class LocalChange(Record, frozen=True, kw_only=True):
    """Change by a block's own weights, apart from what it inherits: F(b) against B(b)."""

    relative_l2: Annotated[float | None, METRICS["local_relative_l2"].meta]
    cosine_similarity: Annotated[float | None, Meta(description="cosine of F(b) and B(b)")]


class Measures(Record, frozen=True, kw_only=True):
    """The numbers of one layer or site: means over prompts of each prompt's own mean over tokens."""

    cosine_similarity: Cosine | None
    divergence: Divergence | None
    flagged: Annotated[bool, Meta(description="divergence above settings.threshold")]
    n_prompts: Annotated[int, Meta(ge=0, description="prompts with at least one finite pair")]
    relative_l2: Annotated[float | None, METRICS["relative_l2"].meta]
    norm_ratio: Annotated[float | None, METRICS["norm_ratio"].meta]
    centered_cosine_similarity: Annotated[float | None, METRICS["centered_cosine_similarity"].meta]
    noise_floor: Annotated[float | None, METRICS["noise_floor"].meta] = None
    noise_floor_divergence: Annotated[
        float | None, Meta(description="what numerical noise alone may reach, in divergence")
    ] = None
    unrelated_similarity: Annotated[float | None, METRICS["unrelated_similarity"].meta] = None
    normalized_divergence: Annotated[float | None, METRICS["normalized_divergence"].meta] = None
    interval: Annotated[tuple[float, float] | None, METRICS["interval"].meta] = None
    top1_share: Annotated[float | None, METRICS["top1_share"].meta] = None
    top3_share: Annotated[
        float | None, Meta(description="share of the mean cosine that its three largest dimensions carry")
    ] = None
    cka: Annotated[float | None, METRICS["cka"].meta] = None
    local: LocalChange | None = None


class LayerRecord(Measures, frozen=True, kw_only=True):
    """One block: the residual stream after it, before the final norm."""

    layer: Layer
    finetuned_layer: Annotated[
        Layer | None, Meta(description="its counterpart in a model of other depth; null where it is the same")
    ] = None


class SiteRecord(Measures, frozen=True, kw_only=True):
    """A site outside the blocks: what enters the first one, and what leaves the final norm."""

    name: Literal["embedding", "final_norm"]


class Output(Record, frozen=True, kw_only=True):
    """The effect on the next-token distribution at the compared position: means over prompts."""

    kl_base_finetuned: Annotated[float | None, METRICS["kl_base_finetuned"].meta]
    kl_finetuned_base: Annotated[float | None, Meta(description="KL(finetuned‖base), nats")]
    js: Annotated[float | None, METRICS["js"].meta]
    top1_agreement: Annotated[float | None, METRICS["top1_agreement"].meta]
    base_rank_of_finetuned_top1: Annotated[
        float | None, Meta(description="rank in base of the fine-tuned model's first choice, from 1")
    ]
    logits_relative_l2: Annotated[float | None, Meta(description="‖f − b‖ / ‖b‖ of the logits")]
    noise_floor: Annotated[
        float | None, Meta(description="what numerical noise alone may reach, in the logits' relative L2")
    ]


class AttributedGroup(Record, frozen=True, kw_only=True):
    """The part of a block, or of a tensor, in KL(base‖fine-tuned)."""

    name: str
    layer: Annotated[Layer | None, Meta(description="the block; null outside the blocks")]
    component: Annotated[
        str | None, Meta(description="of a tensor, its standard name, such as attn_q; null of a block")
    ]
    nats: Annotated[float, METRICS["nats"].meta]
    share: Annotated[float | None, Meta(description="nats / sum; null where the sum is 0")]
    interval: Annotated[
        tuple[float, float] | None, Meta(description="95 % interval of nats over prompts; null with few")
    ]


class Restored(Record, frozen=True, kw_only=True):
    """The fine-tuned model with these groups set back to base."""

    groups: list[str]
    kl: Annotated[float, Meta(description="the mean KL(base‖it) that is left, in nats")]


class Attribution(Record, frozen=True, kw_only=True):
    """Parts of KL(base‖fine-tuned) that add up: who caused the change of the output."""

    target: Literal["kl_base_finetuned"] = "kl_base_finetuned"
    kl: Annotated[float, Meta(description="mean KL(base‖fine-tuned) in nats, in float32, measured by itself")]
    sum: Annotated[float, Meta(description="of the parts of all groups")]
    completeness_error: Annotated[
        float, Meta(ge=0, description="|sum − kl| / kl: what the quadrature misses")
    ]
    n_points: Annotated[int, Meta(ge=1, description="points of the Gauss–Legendre quadrature")]
    groups: Annotated[
        list[AttributedGroup], Meta(description="blocks in order, and then what is outside them")
    ]
    restored: list[Restored]


class ReadoutToken(Record, frozen=True, kw_only=True):
    """A token that the mean difference promotes or suppresses."""

    token: str
    token_id: int
    score: float


class Readout(Record, frozen=True, kw_only=True):
    """The mean difference at a layer, read through each model's own final norm and head."""

    layer: Layer
    base_promoted: list[ReadoutToken]
    base_suppressed: list[ReadoutToken]
    finetuned_promoted: list[ReadoutToken]
    finetuned_suppressed: list[ReadoutToken]
    static_share: Annotated[float | None, METRICS["static_share"].meta]


class GroupCurve(Record, frozen=True, kw_only=True):
    """The divergence per layer of one group of prompts."""

    group: str
    n_prompts: int
    divergence: list[float | None]
    nats: Annotated[
        list[float] | None, Meta(description="with attribute: each block's part in the group's KL")
    ] = None


class GroupContrast(Record, frozen=True, kw_only=True):
    """Mean log divergence of group a less that of group b, per layer, and its test."""

    group_a: str
    group_b: str
    log_ratio: Annotated[
        list[float | None], Meta(description="mean log divergence of a less that of b; null within the noise")
    ]
    p_value: Annotated[
        float | None, Meta(description="one-sided permutation test of the largest log_ratio over layers")
    ]
    layer: Annotated[Layer | None, Meta(description="where log_ratio is largest")]


class Groups(Record, frozen=True, kw_only=True):
    """Curves and contrasts of the prompts' groups."""

    curves: list[GroupCurve]
    contrasts: list[GroupContrast]


class TokenTrace(Record, frozen=True, kw_only=True):
    """Every compared token of one prompt, with `position` all."""

    prompt_index: int
    positions: Annotated[list[int], Meta(description="of each token in the prompt, from 0")]
    tokens: Annotated[list[str], Meta(description="each token's text")]
    divergence: Annotated[
        list[list[float | None]], Meta(description="of each token at every layer; null if not finite")
    ]


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
    results: ResultRows
    summary: Summary
    output: Output | None = None
    attribution: Attribution | None = None
    readout: list[Readout] | None = None
    groups: Groups | None = None
    tokens: list[TokenTrace] | None = None
    notes: list[str]
    note_codes: list[str] = field(default_factory=list)
