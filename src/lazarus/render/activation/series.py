"""The series of the plots: the report, the figure and the notebook draw the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lazarus.results import ActivationDiffRecord

Values = Sequence[float | None]


@dataclass(frozen=True)
class LayerSeries:
    """The curve over layers; each series has one value a layer, None where it was not measured."""

    layers: Sequence[int]
    divergence: Values
    low: Values
    """the lower end of the 95 % interval"""
    high: Values
    noise_floor: Values
    """in divergence"""
    unrelated: Values
    """the divergence of unrelated prompts: 1 − `unrelated_similarity`"""
    local: Values
    """the local change, in relative L2"""
    cka: Values
    flagged: Sequence[bool]
    threshold: float

    @classmethod
    def of(cls, record: ActivationDiffRecord) -> LayerSeries:
        """Return the series of a result."""
        layers = record.layers
        return cls(
            layers=[layer.layer for layer in layers],
            divergence=[layer.divergence for layer in layers],
            low=[layer.interval[0] if layer.interval else None for layer in layers],
            high=[layer.interval[1] if layer.interval else None for layer in layers],
            noise_floor=[layer.noise_floor_divergence for layer in layers],
            unrelated=[
                None if layer.unrelated_similarity is None else 1 - layer.unrelated_similarity
                for layer in layers
            ],
            local=[layer.local.relative_l2 if layer.local else None for layer in layers],
            cka=[layer.cka for layer in layers],
            flagged=[layer.flagged for layer in layers],
            threshold=record.settings.threshold,
        )


def measured(values: Values) -> bool:
    """Return whether there is anything to draw.

    >>> measured([None, 0.5]), measured([None, None])
    (True, False)
    """
    return any(value is not None for value in values)
