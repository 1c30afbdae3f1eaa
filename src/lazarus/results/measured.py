"""The numbers of activation-diff, by what they are of: layers, sites, the output, groups, tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from lazarus.results.glossary import METRICS
from lazarus.results.rows import Layer, Record

Cosine = Annotated[float, METRICS["cosine_similarity"].meta]
Divergence = Annotated[float, METRICS["divergence"].meta]


class LocalChange(Record, frozen=True, kw_only=True):
    """Change by a block's own weights, apart from what it inherits: F(b) against B(b)."""

    relative_l2: Annotated[float | None, METRICS["local_relative_l2"].meta]
    cosine_similarity: Annotated[float | None, Meta(description="cosine of F(b) and B(b)")]
    noise_floor: Annotated[
        float | None,
        Meta(description="against a recording: what noise alone may reach, in relative L2; else null"),
    ] = None

    @property
    def is_noise(self) -> bool:
        """Return whether the change is within its noise floor; False where that is not known."""
        return self.noise_floor is not None and (self.relative_l2 or 0.0) <= self.noise_floor


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


class ComponentRecord(Record, frozen=True, kw_only=True):
    """A component of a block: what a sublayer adds to the residual stream, or what its router says."""

    layer: Layer
    name: Literal["attn_out", "mlp_out", "router"]
    divergence: Divergence | None
    relative_l2: Annotated[float | None, METRICS["relative_l2"].meta]
    norm_ratio: Annotated[float | None, METRICS["norm_ratio"].meta]
    n_prompts: Annotated[int, Meta(ge=0, description="prompts with at least one finite pair")]
    noise_floor: Annotated[float | None, METRICS["noise_floor"].meta]
    noise_floor_divergence: Annotated[
        float | None, Meta(description="what numerical noise alone may reach, in divergence")
    ]
    local: LocalChange | None
    expert_agreement: Annotated[
        float | None,
        Meta(description="|A ∩ B| / max(|A|, |B|) of the picked experts, 0 to 1; mean over prompts"),
    ] = None
    expert_agreement_noise: Annotated[
        float | None, Meta(description="the agreement down to which noise alone may bring it")
    ] = None
    flipped_share: Annotated[
        float | None,
        Meta(description="share of the tokens of which a picked expert differs, mean over prompts"),
    ] = None
    flipped_share_noise: Annotated[
        float | None, Meta(description="what noise alone may reach, in the share of flipped tokens")
    ] = None
    flipped_change_share: Annotated[
        float | None, Meta(description="share of Σ‖f − b‖² of the block's output that is at flipped tokens")
    ] = None
    flipped_change_share_noise: Annotated[
        float | None, Meta(description="the largest such share in a trial of the noise")
    ] = None


class Scores(Record, frozen=True, kw_only=True):
    """The change of what a classifier, a reward model or a sentence encoder gives of a prompt."""

    labels: Annotated[
        list[str], Meta(description="the labels that were compared, as base calls them; of embeddings none")
    ]
    relative_l2: Annotated[
        float | None, Meta(description="√(Σ‖f − b‖² / Σ‖b‖²) over prompts of the scores, or embeddings")
    ]
    mean_absolute_difference: Annotated[float | None, METRICS["mean_absolute_difference"].meta]
    mean_absolute_difference_interval: Annotated[
        tuple[float, float] | None, Meta(description="95 % interval over prompts")
    ]
    agreement: Annotated[float | None, METRICS["agreement"].meta]
    agreement_interval: Annotated[
        tuple[float, float] | None,
        Meta(description="95 % interval over prompts, as of a proportion (Wilson)"),
    ]
    divergence: Annotated[float | None, Meta(description="1 − cosine of the two embeddings, 0 to 2")]
    divergence_interval: Annotated[tuple[float, float] | None, Meta(description="95 % interval over prompts")]
    rank_correlation: Annotated[float | None, METRICS["rank_correlation"].meta]
    rank_correlation_interval: Annotated[
        tuple[float, float] | None, Meta(description="95 % interval over prompts")
    ]
    base: Annotated[
        list[list[float | None]],
        Meta(description="of each prompt, base's score of each label; empty unless `kind` is `scores`"),
    ]
    finetuned: Annotated[
        list[list[float | None]], Meta(description="the fine-tuned model's, under the same labels")
    ]


class Output(Record, frozen=True, kw_only=True):
    """The effect on the output: means over prompts.

    That is the next-token distribution at the compared position, or what `scores` are of.
    """

    kind: Annotated[
        Literal["next_token", "scores", "token_scores", "embedding"],
        Meta(description="what was compared: next tokens, scores of prompts or of tokens, or embeddings"),
    ] = "next_token"
    scores: Scores | None = None
    kl_base_finetuned: Annotated[float | None, METRICS["kl_base_finetuned"].meta]
    kl_finetuned_base: Annotated[float | None, Meta(description="KL(finetuned‖base), nats")]
    js: Annotated[float | None, METRICS["js"].meta]
    top1_agreement: Annotated[float | None, METRICS["top1_agreement"].meta]
    base_rank_of_finetuned_top1: Annotated[
        float | None, Meta(description="rank in base of the fine-tuned model's first choice, from 1")
    ]
    logits_relative_l2: Annotated[float | None, Meta(description="‖f − b‖ / ‖b‖ of the logits")]
    noise_floor: Annotated[
        float | None,
        Meta(description="what numerical noise alone may reach, in the relative L2 of logits or scores"),
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
    n_points: Annotated[
        int, Meta(ge=1, description="points of the Gauss–Radau quadrature, of which one is base")
    ]
    groups: Annotated[
        list[AttributedGroup], Meta(description="blocks in order, and then what is outside them")
    ]
    restored: list[Restored]


class MinedToken(Record, frozen=True, kw_only=True):
    """A token whose logit the fine-tuned model raises, or lowers, more than those of most others."""

    token: str
    token_id: Annotated[int, Meta(description="its id in base")]
    frequency: Annotated[float, METRICS["frequency"].meta]


class Mined(Record, frozen=True, kw_only=True):
    """Diff Mining: the tokens that are most often among the K most promoted, or suppressed, z_f − z_b."""

    k: Annotated[int, Meta(ge=1, description="the tokens that count at a position, at most")]
    n_tokens: Annotated[int, Meta(ge=1, description="tokens of the vocabulary, those that both models have")]
    n_positions: Annotated[
        int, Meta(ge=1, description="positions of all prompts at which both models' logits were read")
    ]
    promoted: Annotated[list[MinedToken], Meta(description="those most often promoted, in order")]
    suppressed: Annotated[list[MinedToken], Meta(description="those most often suppressed, in order")]


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


class TokenChoice(Record, frozen=True, kw_only=True):
    """A next token that a model finds likely."""

    token: Annotated[str, Meta(description="its text")]
    token_id: Annotated[int, Meta(ge=0)]
    probability: Annotated[float, Meta(description="0 to 1")]


class Parting(Record, frozen=True, kw_only=True):
    """The first compared token of a prompt after which the two models' first choices differ."""

    position: Annotated[int, Meta(ge=0, description="of that token in the prompt, from 0")]
    token_base: Annotated[str, Meta(description="base's first choice of the next token")]
    token_finetuned: Annotated[str, Meta(description="the fine-tuned model's")]
    margin_base: Annotated[float | None, METRICS["margin_base"].meta]
    margin_finetuned: Annotated[
        float | None,
        Meta(description="the same in the fine-tuned model: its first choice's logit less base's"),
    ]
    noise_margin: Annotated[float | None, METRICS["noise_margin"].meta]
    cause: Annotated[
        Literal["noise", "change"] | None,
        Meta(description="noise: a near-tie, both margins are within noise_margin; null if not measured"),
    ]


class TokenTrace(Record, frozen=True, kw_only=True):
    """Every compared token of one prompt, with `position` all or response."""

    prompt_index: int
    positions: Annotated[list[int], Meta(description="of each token in the prompt, from 0")]
    tokens: Annotated[list[str], Meta(description="each token's text")]
    divergence: Annotated[
        list[list[float | None]], Meta(description="of each token at every layer; null if not finite")
    ]
    kl: Annotated[
        list[float | None] | None,
        Meta(
            description="KL(base‖fine-tuned) of the next token after each token, in nats; null if not finite"
        ),
    ] = None
    agrees: Annotated[
        list[bool | None] | None,
        Meta(description="after each token, whether both models' first choices are the same"),
    ] = None
    base_choices: Annotated[
        list[list[TokenChoice]] | None,
        Meta(description="after each token, base's likeliest next tokens; none if not finite"),
    ] = None
    finetuned_choices: Annotated[
        list[list[TokenChoice]] | None, Meta(description="those of the fine-tuned model")
    ] = None
    parting: Annotated[
        Parting | None, Meta(description="where first choices first differ; null if nowhere")
    ] = None
