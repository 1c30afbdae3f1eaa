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
    )
}
