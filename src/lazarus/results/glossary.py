"""What each number is called and what it means, in one place: renderers and docs read it from here."""

from __future__ import annotations

from dataclasses import dataclass


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
        Metric(
            "local_relative_l2",
            "Local",
            "1",
            "0 to ∞",
            ".6f",
            "‖F(b) − B(b)‖ / ‖B(b)‖, both models' block on base's state",
            "what a block's own weights change, apart from what it inherits",
        ),
        Metric(
            "noise_floor",
            "Noise Floor",
            "relative L2",
            "0 to ∞",
            ".1e",
            "a factor × the largest mean relative L2 of base against base",
            "other batches and padding, and the first block's input moved by one unit in the last place",
        ),
        Metric(
            "unrelated_similarity",
            "Unrelated Cos",
            "1",
            "-1 to 1",
            ".4f",
            "A = (U·V − Σ_p U_p·V_p) / (N² − Σ_p n_p²)",
            "mean cosine of states of different prompts (Ethayarajh 2019, arXiv 1909.00512)",
        ),
        Metric(
            "normalized_divergence",
            "Normalised",
            "1",
            "about 0 to 1",
            ".4f",
            "divergence / (1 − A)",
            "0 for identical, 1 for as unlike as unrelated prompts",
        ),
        Metric(
            "interval",
            "95 % interval",
            "divergence",
            "0 to 2",
            ".4f",
            "bootstrap-t over prompts on the log of the mean",
            "Efron & Tibshirani 1993, ch. 12",
        ),
        Metric(
            "top1_share",
            "Top-1 share",
            "1",
            "0 to 1",
            ".2f",
            "max_k Σ b̂_k f̂_k / Σ cos; top3_share: the three largest",
            "dimensions that dominate a cosine (Timkey & van Schijndel 2021, arXiv 2109.04404)",
        ),
        Metric(
            "cka",
            "CKA",
            "1",
            "about 0 to 1",
            ".4f",
            "H(X,Y) / √(H(X,X) H(Y,Y)), debiased",
            "models of any widths (Kornblith et al. 2019, arXiv 1905.00414)",
        ),
        Metric(
            "kl_base_finetuned",
            "KL(base‖fine-tuned)",
            "nats",
            "0 to ∞",
            ".4f",
            "Σ p (log p − log q) over the next token; kl_finetuned_base the other way round",
            "Kullback & Leibler 1951",
        ),
        Metric(
            "js",
            "JS",
            "nats",
            "0 to ln 2",
            ".4f",
            "½ KL(p‖m) + ½ KL(q‖m), m = ½(p + q)",
            "Lin 1991",
        ),
        Metric(
            "top1_agreement",
            "Top-1 agreement",
            "1",
            "0 to 1",
            ".2f",
            "share of prompts with the same first choice",
            "base_rank_of_finetuned_top1: the rank in base of the fine-tuned model's first choice",
        ),
        Metric(
            "static_share",
            "Static share",
            "1",
            "below 0 to 1",
            ".2f",
            "(‖δ̄‖² − Σ_p ‖δ̄_p − δ̄‖² / (P(P − 1))) / mean_p ‖δ̄_p‖²",
            "how much of the change is one shift for all prompts (Minder et al. 2025, arXiv 2510.13900)",
        ),
    )
}
