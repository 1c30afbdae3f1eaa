"""Results to draw, built without a model: every shape that a figure or a notebook may meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from lazarus.results import ActivationDiffRecord, GroupCurve, Groups, LayerRecord, LocalChange, Summary
from made_records import THRESHOLD, model, record_of


def drawn(
    divergence: Sequence[float | None] = (0.02, 0.05, 0.125, 0.25),
    n_prompts: int = 5,
    *,
    base: str = "base",
    finetuned: str = "finetuned",
    prompt: str = "Hello",
) -> ActivationDiffRecord:
    """A result with this mean divergence per layer, its intervals, noise floor and unrelated prompts."""
    layers = [_layer(i, value, n_prompts) for i, value in enumerate(divergence)]
    texts = [f"{prompt} {i}" for i in range(n_prompts)]
    means = np.array([np.nan if value is None else value for value in divergence])
    spread = np.linspace(0.5, 1.5, n_prompts) if n_prompts > 1 else np.ones(1)
    largest = max((value for value in divergence if value is not None), default=None)
    return record_of(
        spread[:, None] * means,
        texts,
        base=model(base, len(layers)),
        finetuned=model(finetuned, len(layers)),
        layers=layers,
        sites=[],
        summary=Summary(
            most_divergent_layer=None if largest is None else list(divergence).index(largest),
            max_divergence=largest,
            first_flagged_layer=next((layer.layer for layer in layers if layer.flagged), None),
            n_flagged_layers=sum(layer.flagged for layer in layers),
        ),
        notes=["A note."],
    )


def with_layers(record: ActivationDiffRecord, **changes: Any) -> ActivationDiffRecord:
    """The same with these fields in every layer; a list gives each layer its own."""
    layers = [
        replace(
            layer, **{name: value[i] if isinstance(value, list) else value for name, value in changes.items()}
        )
        for i, layer in enumerate(record.layers)
    ]
    return replace(record, layers=layers)


def with_local(record: ActivationDiffRecord, values: Sequence[float | None]) -> ActivationDiffRecord:
    """The same with a local change per layer."""
    local = [LocalChange(relative_l2=value, cosine_similarity=None) for value in values]
    measured = replace(record, settings=replace(record.settings, localize=True))
    return with_layers(measured, local=local)


def with_groups(record: ActivationDiffRecord, names: Sequence[str]) -> ActivationDiffRecord:
    """The same with a curve for each group, from the mean upwards."""
    curves = [
        GroupCurve(
            group=name,
            n_prompts=i + 1,
            divergence=[
                None if layer.divergence is None else layer.divergence * (1 + i / 4)
                for layer in record.layers
            ],
        )
        for i, name in enumerate(names)
    ]
    return replace(record, groups=Groups(curves=curves, contrasts=[]))


def of_widths(cka: Sequence[float | None]) -> ActivationDiffRecord:
    """A result of models whose widths differ: CKA is all there is."""
    record = drawn([None] * len(cka), 60)
    wider = replace(record.finetuned, hidden_size=64)
    return with_layers(replace(record, finetuned=wider), cka=list(cka), unrelated_similarity=None)


def _layer(layer: int, divergence: float | None, n_prompts: int) -> LayerRecord:
    has_many = n_prompts >= 5 and divergence is not None
    return LayerRecord(
        layer=layer,
        cosine_similarity=None if divergence is None else 1 - divergence,
        divergence=divergence,
        flagged=divergence is not None and divergence > THRESHOLD,
        n_prompts=0 if divergence is None else n_prompts,
        relative_l2=None if divergence is None else 2 * divergence,
        norm_ratio=None if divergence is None else 1.0,
        centered_cosine_similarity=None,
        noise_floor=None if divergence is None else 1e-6,
        noise_floor_divergence=None if divergence is None else 1e-13,
        unrelated_similarity=0.5 if n_prompts > 1 and divergence is not None else None,
        interval=(divergence * 0.75, divergence * 1.5) if has_many and divergence is not None else None,
    )
