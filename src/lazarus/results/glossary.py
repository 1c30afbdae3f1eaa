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

WEIGHT_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "relative_change",
            "Rel. Diff",
            "1",
            "0 to ∞",
            ".6f",
            "‖f − b‖ / ‖b‖",
            "relative error in the Frobenius norm, over all numbers of a tensor",
        ),
        Metric(
            "cosine_similarity",
            "Cosine",
            "1",
            "-1 to 1",
            ".6f",
            "⟨b, f⟩ / (‖b‖ ‖f‖)",
            "of all numbers of a tensor as one vector",
        ),
        Metric("max_abs_change", "Largest change", "1", "0 to ∞", ".2e", "max |f − b|", "of a single number"),
        Metric(
            "share_changed",
            "Share changed",
            "1",
            "0 to 1",
            ".4f",
            "numbers with other bits / all numbers",
            "a dense update moves nearly all; of a very small one many disappear in the rounding",
        ),
        Metric("base_norm", "‖b‖", "1", "0 to ∞", ".4g", "√Σ b²", "Frobenius norm of base's tensor"),
        Metric("change_norm", "‖f − b‖", "1", "0 to ∞", ".4g", "√Σ (f − b)²", "Frobenius norm of the update"),
        Metric(
            "spectral_norm",
            "Spectral norm",
            "1",
            "0 to ∞",
            ".4g",
            "σ₁, the largest singular value of f − b",
            "how far the update can move a state of length 1",
        ),
        Metric(
            "stable_rank",
            "Stable rank",
            "1",
            "1 to min(rows, columns)",
            ".2f",
            "Σσ² / σ₁²",
            "a rank that small singular values do not move (Rudelson & Vershynin 2007)",
        ),
        Metric(
            "effective_rank",
            "Effective rank",
            "1",
            "1 to min(rows, columns)",
            ".2f",
            "exp(−Σ p log p), p = σ / Σσ",
            "entropy of the singular values (Roy & Vetterli 2007)",
        ),
        Metric(
            "rank_90",
            "Rank for 90 %",
            "1",
            "1 to min(rows, columns)",
            "",
            "fewest σ that hold 90 % of Σσ²",
            "how many directions nearly all of the update is in",
        ),
        Metric(
            "share_computed",
            "σ² computed",
            "1",
            "0 to 1",
            ".4f",
            "Σσ² of the computed σ / ‖f − b‖²",
            "1 where all singular values were computed; less by a randomised SVD (Halko et al. 2011)",
        ),
        Metric(
            "rounding_norm",
            "Rounding",
            "1",
            "0 to ∞",
            ".2e",
            "expected ‖rounding of f to its stored type‖",
            "what an update of low rank is spread to when it is merged and stored",
        ),
        Metric(
            "adapter_rank",
            "Adapter rank",
            "1",
            "1 to min(rows, columns)",
            "",
            "the number of σ above the rounding, where the rest is no more than rounding",
            "the rank of a merged low-rank adapter (Hu et al. 2021, arXiv 2106.09685)",
        ),
    )
}
"""The same of weight-diff."""
