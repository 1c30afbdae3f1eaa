"""Flags of layers: the one part of a result that is a choice and no measurement."""

from __future__ import annotations

from typing import TypeVar

from msgspec.structs import replace

from lazarus.results.measured import Measures
from lazarus.results.records import ActivationDiffRecord

M = TypeVar("M", bound=Measures)


def flag_above(record: ActivationDiffRecord, threshold: float) -> ActivationDiffRecord:
    """The record as a run with this threshold would have given it."""
    layers = [_flagged(layer, threshold) for layer in record.layers]
    above = [layer.layer for layer in layers if layer.flagged]
    return replace(
        record,
        settings=replace(record.settings, threshold=threshold),
        layers=layers,
        sites=[_flagged(site, threshold) for site in record.sites],
        summary=replace(
            record.summary, first_flagged_layer=above[0] if above else None, n_flagged_layers=len(above)
        ),
    )


def _flagged(measures: M, threshold: float) -> M:
    above = measures.divergence is not None and measures.divergence > threshold
    return replace(measures, flagged=above)
