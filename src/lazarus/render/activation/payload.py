"""The numbers that the page's scripts draw, as plain JSON; whole matrices as base64 of their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgspec
import numpy as np

from lazarus.render.activation.sample import Sample, TokenSample
from lazarus.render.activation.series import LayerSeries, measured
from lazarus.render.base.script import matrix
from lazarus.results import METRICS, ActivationDiffRecord, GroupCurve, TokenTrace

MOST_CURVES = 8
"""Groups that are drawn: more lines cannot be told from one another."""
DECIMALS = 4
"""of the probability of a likely token, which the page shows as a percentage"""


def payload(record: ActivationDiffRecord, sample: Sample, tokens: TokenSample | None) -> dict[str, Any]:
    """All that the scripts need of the prompts and tokens that the page has; equal for equal results.

    A matrix is {rows, columns, base64}: float64, little-endian, row by row, NaN where nothing was measured,
    so that the page has the exact values of the result.
    """
    return {
        "series": _series(record),
        "formats": {"divergence": METRICS["divergence"].format, "cka": METRICS["cka"].format},
        "prompts": _prompts(record, sample),
        "groups": _groups(record),
        "tokens": None if tokens is None else _tokens(tokens),
    }


def drawn_groups(record: ActivationDiffRecord) -> list[GroupCurve]:
    """The groups whose curves are drawn, in their order in the result."""
    return record.groups.curves[:MOST_CURVES] if record.groups else []


def _series(record: ActivationDiffRecord) -> dict[str, Any]:
    series = LayerSeries.of(record)
    return {
        name: list(values) if isinstance(values, Sequence) else values
        for name, values in asdict(series).items()
    }


def _prompts(record: ActivationDiffRecord, sample: Sample) -> dict[str, Any]:
    chosen = [record.prompts[i] for i in sample.indexes]
    names = list(dict.fromkeys(prompt.group for prompt in chosen if prompt.group is not None))
    places = {name: i for i, name in enumerate(names)}
    divergence = record.results.column("divergence")[list(sample.indexes)]
    return {
        "index": list(sample.indexes),
        "text": list(sample.texts),
        "characters": {
            str(i): len(prompt.text)
            for i, prompt in enumerate(chosen)
            if len(prompt.text) > sample.characters
        },
        "groups": names,
        "group": [None if prompt.group is None else places[prompt.group] for prompt in chosen],
        "n_tokens": [prompt.n_tokens for prompt in chosen],
        "divergence": None if np.isnan(divergence).all() else matrix(divergence),
    }


def _groups(record: ActivationDiffRecord) -> list[dict[str, Any]]:
    curves = [curve for curve in drawn_groups(record) if measured(curve.divergence)]
    return [
        {"group": curve.group, "n_prompts": curve.n_prompts, "divergence": list(curve.divergence)}
        for curve in curves
    ]


def _tokens(tokens: TokenSample) -> list[dict[str, Any]]:
    return [
        {
            "prompt_index": trace.prompt_index,
            "positions": list(trace.positions),
            "tokens": list(trace.tokens),
            "divergence": matrix(np.array(trace.divergence, dtype=np.float64)),
            "output": None if trace.kl is None else _output(trace),
        }
        for trace in tokens.traces
    ]


def _output(trace: TokenTrace) -> dict[str, Any]:
    """Return what both models would say after each token of a trace that has it."""
    sides = (trace.base_choices or [], trace.finetuned_choices or [])
    parting = trace.parting
    return {
        "kl": list(trace.kl or []),
        "choices": [
            [[[c.token, round(c.probability, DECIMALS)] for c in token] for token in side] for side in sides
        ],
        "parting": None if parting is None else msgspec.structs.asdict(parting),
    }
