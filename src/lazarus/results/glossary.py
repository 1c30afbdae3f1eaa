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
            formula="share of prompts with the same first choice",
            source="base_rank_of_finetuned_top1: the rank in base of the fine-tuned model's first choice",
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

WEIGHT_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "relative_change",
            heading="Rel. Diff",
            unit="1",
            range="0 to ∞",
            format=".6f",
            formula="‖f − b‖ / ‖b‖",
            source="relative error in the Frobenius norm, over all numbers of a tensor",
            schema="‖f − b‖ / ‖b‖, Frobenius norms, 0 to ∞; null where it is not finite, or base is all zero",
        ),
        Metric(
            "cosine_similarity",
            heading="Cosine",
            unit="1",
            range="-1 to 1",
            format=".6f",
            formula="⟨b, f⟩ / (‖b‖ ‖f‖)",
            source="of all numbers of a tensor as one vector",
            schema="of all its numbers as one vector, -1 to 1",
        ),
        Metric(
            "max_abs_change",
            heading="Largest change",
            unit="1",
            range="0 to ∞",
            format=".2e",
            formula="max |f − b|",
            source="of a single number",
            schema="largest |f − b| of a number",
        ),
        Metric(
            "share_changed",
            heading="Share changed",
            unit="1",
            range="0 to 1",
            format=".4f",
            formula="numbers with other bits / all numbers",
            source="a dense update moves nearly all; of a very small one many disappear in the rounding",
            schema="share of its numbers with other bits, 0 to 1",
        ),
        Metric(
            "base_norm",
            heading="‖b‖",
            unit="1",
            range="0 to ∞",
            format=".4g",
            formula="√Σ b²",
            source="Frobenius norm of base's tensor",
            schema="‖b‖",
        ),
        Metric(
            "change_norm",
            heading="‖f − b‖",
            unit="1",
            range="0 to ∞",
            format=".4g",
            formula="√Σ (f − b)²",
            source="Frobenius norm of the update",
            schema="‖f − b‖",
        ),
        Metric(
            "spectral_norm",
            heading="Spectral norm",
            unit="1",
            range="0 to ∞",
            format=".4g",
            formula="σ₁, the largest singular value of f − b",
            source="how far the update can move a state of length 1",
            schema="σ₁",
        ),
        Metric(
            "stable_rank",
            heading="Stable rank",
            unit="1",
            range="1 to min(rows, columns)",
            format=".2f",
            formula="Σσ² / σ₁²",
            source="a rank that small singular values do not move (Rudelson & Vershynin 2007)",
            schema="Σσ² / σ₁², 1 to min(rows, columns)",
        ),
        Metric(
            "effective_rank",
            heading="Effective rank",
            unit="1",
            range="1 to min(rows, columns)",
            format=".2f",
            formula="exp(−Σ p log p), p = σ / Σσ",
            source="entropy of the singular values (Roy & Vetterli 2007)",
            schema="exp of the entropy of σ / Σσ; null where not all σ were computed",
        ),
        Metric(
            "rank_90",
            heading="Rank for 90 %",
            unit="1",
            range="1 to min(rows, columns)",
            format="",
            formula="fewest σ that hold 90 % of Σσ²",
            source="how many directions nearly all of the update is in",
            schema="fewest σ that hold 90 % of Σσ²; null where more are needed than were computed",
        ),
        Metric(
            "share_computed",
            heading="σ² computed",
            unit="1",
            range="0 to 1",
            format=".4f",
            formula="Σσ² of the computed σ / ‖f − b‖²",
            source="1 where all singular values were computed; less by a randomised SVD (Halko et al. 2011)",
            schema="share of Σσ² that the computed σ hold, 0 to 1",
        ),
        Metric(
            "rounding_norm",
            heading="Rounding",
            unit="1",
            range="0 to ∞",
            format=".2e",
            formula="expected ‖rounding of f to its stored type‖",
            source="what an update of low rank is spread to when it is merged and stored",
            schema=(
                "expected Frobenius norm of the rounding to the stored type; 0 where there is none, "
                "null where it is not known, as of quantised numbers"
            ),
        ),
        Metric(
            "adapter_rank",
            heading="Adapter rank",
            unit="1",
            range="1 to min(rows, columns)",
            format="",
            formula="the number of σ above the rounding, where the rest is no more than rounding",
            source="the rank of a merged low-rank adapter (Hu et al. 2021, arXiv 2106.09685)",
            schema=(
                "the rank, where the update looks like a low-rank adapter's: few σ stand above the "
                "rounding of the stored type, and the rest is no more than that"
            ),
        ),
        Metric(
            "relative_error",
            heading="Error",
            unit="1",
            range="0 to ∞",
            format=".4f",
            formula="‖q − w‖ / ‖w‖",
            source="how far a quantised tensor q is from what it was before, w",
            schema="‖q − w‖ / ‖w‖ of the quantised tensor q and the other one, w",
        ),
        Metric(
            "nearest_relative_error",
            heading="Nearest",
            unit="1",
            range="0 to ∞",
            format=".4f",
            formula="the error of rounding w to nearest, in the same bits and blocks",
            source="scale 2 max|w| / (2^bits − 1): the rule of compressed-tensors without calibration",
            schema="the same of w rounded to nearest in these bits and blocks; null of floats of few bits",
        ),
        Metric(
            "error_ratio",
            heading="Of nearest",
            unit="1",
            range="0 to ∞",
            format=".3f",
            formula="error / that of rounding to nearest",
            source="above 1 where a method has moved weights away to lower the error of its activations",
            schema="relative_error / nearest_relative_error",
        ),
        Metric(
            "outlier_share",
            heading="In outliers",
            unit="1",
            range="0 to 1",
            format=".3f",
            formula="share of Σ (q − w)² in the 1 % of the columns that have most of it",
            source="0.01 where the error is spread evenly; more where few input channels hold it",
            schema="share of the squared error in the 1 % of the columns (input channels) with most of it",
        ),
    )
}
"""The metrics of weight-diff."""
