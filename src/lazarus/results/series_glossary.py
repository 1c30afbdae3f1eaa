"""The metrics of series beside those of activation-diff, each described once."""

from __future__ import annotations

from lazarus.results.glossary import Metric

SERIES_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "distance",
            heading="Distance",
            unit="1",
            range="0 to ∞",
            format=".4f",
            formula="√( mean over blocks of Σ‖x − y‖² / Σ‖b‖² ), sums over prompts and compared tokens",
            source="relative L2 of the change, all blocks together; a Euclidean distance, 0 only where every "
            "state is the same bit for bit",
            schema="root of the mean over blocks of Σ‖x − y‖² / Σ‖b‖², b the states of base; 0 where the two "
            "give the same states bit for bit",
        ),
        Metric(
            "turn",
            heading="Cos to last step",
            unit="1",
            range="-1 to 1",
            format=".4f",
            formula="cos(xᵢ − xᵢ₋₁, xᵢ₋₁ − xᵢ₋₂), by the distances",
            source="1 goes on in the same direction, 0 turns at a right angle, below 0 goes back; before the "
            "first member stands base",
            schema="cosine of this step and the step before it, base standing before the first member",
        ),
    )
}
