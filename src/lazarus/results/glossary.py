"""The metrics, each described once: renderers, the records, the JSON Schema and the docs read it here."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Meta


@dataclass(frozen=True)
class Metric:
    """The name, unit, range, formula and source of one number, wherever it is shown."""

    name: str
    """its field in the records"""
    heading: str
    """its column in tables"""
    unit: str
    range: str
    format: str
    """how it is printed, as for `format`"""
    formula: str
    source: str
    """where the formula comes from, or what the number tells"""
    schema: str = ""
    """its description in the JSON Schema, where the formula alone is not one"""

    @property
    def meta(self) -> Meta:
        """Return the annotation that describes a record's field in the JSON Schema."""
        return Meta(description=self.schema or self.formula)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "cosine_similarity",
            heading="Avg Cos Sim",
            unit="1",
            range="-1 to 1",
            format=".4f",
            formula="1 − divergence",
            source="cosine of the angle between the two states",
            schema="cosine similarity, -1 to 1, mean over prompts",
        ),
        Metric(
            "divergence",
            heading="Divergence",
            unit="1",
            range="0 to 2",
            format=".4f",
            formula="½‖b̂ − f̂‖², which is 1 − cos without the cancellation",
            source="law of cosines on unit vectors",
            schema="1 - cosine similarity, 0 to 2, mean over prompts",
        ),
        Metric(
            "relative_l2",
            heading="Rel. L2",
            unit="1",
            range="0 to ∞",
            format=".4f",
            formula="‖f − b‖ / ‖b‖",
            source="relative error in the Euclidean norm",
        ),
        Metric(
            "norm_ratio",
            heading="Norm Ratio",
            unit="1",
            range="0 to ∞",
            format=".4f",
            formula="‖f‖ / ‖b‖",
            source="ratio of lengths",
        ),
        Metric(
            "centered_cosine_similarity",
            heading="Centred Cos",
            unit="1",
            range="-1 to 1",
            format=".4f",
            formula="cosine after each state's own feature mean is taken off",
            source="what a LayerNorm reads (Ba et al. 2016, arXiv 1607.06450)",
            schema="feature-mean-centred cosine; null without LayerNorm",
        ),
        Metric(
            "local_relative_l2",
            heading="Local",
            unit="1",
            range="0 to ∞",
            format=".6f",
            formula="‖F(b) − B(b)‖ / ‖B(b)‖, both models' block on base's state",
            source="what a block's own weights change, apart from what it inherits",
            schema="‖F(b) − B(b)‖ / ‖B(b)‖",
        ),
        Metric(
            "nats",
            heading="Nats",
            unit="nats",
            range="-∞ to ∞",
            format=".6f",
            formula="∫₀¹ ⟨∇KL(base‖base + tΔ), Δ⟩ dt over the parameters of the block",
            source="Aumann–Shapley value along the straight path between the weights (Aumann & Shapley 1974; "
            "Sundararajan et al. 2017, arXiv 1703.01365)",
            schema="part in KL(base‖fine-tuned) of the next token, in nats; below 0 where it makes up for "
            "others",
        ),
        Metric(
            "noise_floor",
            heading="Noise Floor",
            unit="relative L2",
            range="0 to ∞",
            format=".1e",
            formula="a factor × the largest mean relative L2 of base against base",
            source="other batches and padding, and the first block's input moved by one unit in the last "
            "place",
            schema="what numerical noise alone may reach, in relative L2",
        ),
        Metric(
            "unrelated_similarity",
            heading="Unrelated Cos",
            unit="1",
            range="-1 to 1",
            format=".4f",
            formula="A = (U·V − Σ_p U_p·V_p) / (N² − Σ_p n_p²)",
            source="mean cosine of states of different prompts (Ethayarajh 2019, arXiv 1909.00512)",
            schema="mean cosine of unrelated prompts",
        ),
        Metric(
            "normalized_divergence",
            heading="Normalised",
            unit="1",
            range="about 0 to 1",
            format=".4f",
            formula="divergence / (1 − A)",
            source="0 for identical, 1 for as unlike as unrelated prompts",
            schema="divergence over 1 - unrelated_similarity",
        ),
        Metric(
            "interval",
            heading="95 % interval",
            unit="divergence",
            range="0 to 2",
            format=".4f",
            formula="bootstrap-t over prompts on the log of the mean",
            source="Efron & Tibshirani 1993, ch. 12",
            schema="95 % interval of the divergence: low, high",
        ),
        Metric(
            "top1_share",
            heading="Top-1 share",
            unit="1",
            range="0 to 1",
            format=".2f",
            formula="max_k Σ b̂_k f̂_k / Σ cos; top3_share: the three largest",
            source="dimensions that dominate a cosine (Timkey & van Schijndel 2021, arXiv 2109.04404)",
            schema="share of the mean cosine that its largest dimension carries",
        ),
        Metric(
            "cka",
            heading="CKA",
            unit="1",
            range="about 0 to 1",
            format=".4f",
            formula="H(X,Y) / √(H(X,X) H(Y,Y)), debiased",
            source="models of any widths (Kornblith et al. 2019, arXiv 1905.00414)",
            schema="debiased linear CKA",
        ),
        Metric(
            "kl_base_finetuned",
            heading="KL(base‖fine-tuned)",
            unit="nats",
            range="0 to ∞",
            format=".4f",
            formula="Σ p (log p − log q) over the next token; kl_finetuned_base the other way round",
            source="Kullback & Leibler 1951",
            schema="KL(base‖finetuned), nats",
        ),
        Metric(
            "js",
            heading="JS",
            unit="nats",
            range="0 to ln 2",
            format=".4f",
            formula="½ KL(p‖m) + ½ KL(q‖m), m = ½(p + q)",
            source="Lin 1991",
            schema="Jensen-Shannon divergence, nats, 0 to ln 2",
        ),
        Metric(
            "top1_agreement",
            heading="Top-1 agreement",
            unit="1",
            range="0 to 1",
            format=".2f",
            formula="share of prompts, or of their compared tokens, with the same first choice",
            source="base_rank_of_finetuned_top1: the rank in base of the fine-tuned model's first choice",
        ),
        Metric(
            "margin_base",
            heading="Margin",
            unit="logits",
            range="0 to ∞",
            format=".4f",
            formula="base's logit of its own first choice less that of the fine-tuned model's",
            source="how near base was to the other choice; 0 is a tie",
            schema="base's logit of its own first choice less that of the other's, from 0; null where base "
            "cannot give that token",
        ),
        Metric(
            "noise_margin",
            heading="Noise",
            unit="logits",
            range="0 to ∞",
            format=".1e",
            formula="1.75 × the most that noise moves the margin of base's two likeliest tokens; one ulp "
            "of the logits at least",
            source="two models that are the same may part where both margins are below it",
            schema="what numerical noise alone may move a margin by, in logits; null if not measured",
        ),
        Metric(
            "mean_absolute_difference",
            heading="Mean |difference|",
            unit="that of the scores",
            range="0 to ∞",
            format=".4g",
            formula="mean of |f − b| over labels, or over the numbers of an embedding",
            source="of scores before any softmax or sigmoid",
            schema="mean |f − b| over labels (or an embedding's numbers), tokens and prompts",
        ),
        Metric(
            "agreement",
            heading="Agreement",
            unit="1",
            range="0 to 1",
            format=".2f",
            formula="share of prompts, or of their tokens, whose largest score is the same label's",
            source="its interval is that of a proportion (Wilson 1927)",
        ),
        Metric(
            "rank_correlation",
            heading="Rank correlation",
            unit="1",
            range="-1 to 1",
            format=".4f",
            formula="Spearman's ρ over prompts of a label's score, mean over labels; of embeddings, over "
            "pairs of prompts, of cosines",
            source="Spearman 1904; of pairs, Kriegeskorte et al. 2008",
            schema="Spearman's ρ over prompts of each label's score, mean over labels; of embeddings, of the "
            "cosines of all pairs of prompts, or of a sample's",
        ),
        Metric(
            "frequency",
            heading="Frequency",
            unit="1",
            range="0 to 1",
            format=".0%",
            formula="mean over prompts of the share of positions at which a token has one of the K largest "
            "z_f − z_b",
            source="Diff Mining, by Top-K frequency (Kocher et al. 2026, arXiv 2608.26462); of suppressed "
            "tokens, among the K smallest",
            schema="share of positions at which it is among the K, as a mean over prompts",
        ),
        Metric(
            "static_share",
            heading="Static share",
            unit="1",
            range="below 0 to 1",
            format=".2f",
            formula="(‖δ̄‖² − Σ_p ‖δ̄_p − δ̄‖² / (P(P − 1))) / mean_p ‖δ̄_p‖²",
            source="how much of the change is one shift for all prompts (Minder et al. 2025, arXiv "
            "2510.13900)",
            schema="how much of the change is one shift for all prompts; below 0: none detected",
        ),
    )
}
