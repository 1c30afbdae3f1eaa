"""Lazarus compares two language models from the inside.

    from lazarus import activation_diff

    diff = activation_diff("base", "finetuned", ["Hello", "How are you"])
    diff.layers[11].divergence
    diff.save("diff.json")

Importing lazarus imports neither torch nor transformers; the first use of a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lazarus.version import __version__

if TYPE_CHECKING:
    from lazarus.activation import (
        Accumulation,
        ModelFacts,
        PairFacts,
        Plan,
        StatePair,
        WeightFacts,
        activation_diff,
        conclude,
        estimate_record,
        estimate_run,
        iter_state_pairs,
    )
    from lazarus.activation.capture import record
    from lazarus.errors import LazarusError
    from lazarus.lens import compare
    from lazarus.recordings import BFloat16Bits, Recording
    from lazarus.result_classes import ActivationDiff, Comparison, Series, WeightDiff, load_result
    from lazarus.results import Estimate
    from lazarus.trajectory import estimate_series, series
    from lazarus.weights import weight_diff

__all__ = [
    "Accumulation",
    "ActivationDiff",
    "BFloat16Bits",
    "Comparison",
    "Estimate",
    "LazarusError",
    "ModelFacts",
    "PairFacts",
    "Plan",
    "Recording",
    "Series",
    "StatePair",
    "WeightDiff",
    "WeightFacts",
    "__version__",
    "activation_diff",
    "compare",
    "conclude",
    "estimate_record",
    "estimate_run",
    "estimate_series",
    "iter_state_pairs",
    "load_result",
    "record",
    "series",
    "weight_diff",
]

_HOMES = {
    "Accumulation": "lazarus.activation",
    "ModelFacts": "lazarus.activation",
    "PairFacts": "lazarus.activation",
    "Plan": "lazarus.activation",
    "StatePair": "lazarus.activation",
    "WeightFacts": "lazarus.activation",
    "activation_diff": "lazarus.activation",
    "conclude": "lazarus.activation",
    "estimate_record": "lazarus.activation",
    "estimate_run": "lazarus.activation",
    "iter_state_pairs": "lazarus.activation",
    "record": "lazarus.activation",
    "compare": "lazarus.lens",
    "weight_diff": "lazarus.weights",
    "BFloat16Bits": "lazarus.recordings",
    "Recording": "lazarus.recordings",
    "Series": "lazarus.result_classes",
    "estimate_series": "lazarus.trajectory",
    "series": "lazarus.trajectory",
    "ActivationDiff": "lazarus.result_classes",
    "Comparison": "lazarus.result_classes",
    "WeightDiff": "lazarus.result_classes",
    "load_result": "lazarus.result_classes",
    "Estimate": "lazarus.results",
    "LazarusError": "lazarus.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lazarus' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
