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
    from lazarus.activation import activation_diff
    from lazarus.diff import ActivationDiff
    from lazarus.errors import LazarusError

__all__ = ["ActivationDiff", "LazarusError", "__version__", "activation_diff"]

_HOMES = {
    "activation_diff": "lazarus.activation",
    "ActivationDiff": "lazarus.diff",
    "LazarusError": "lazarus.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lazarus' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
