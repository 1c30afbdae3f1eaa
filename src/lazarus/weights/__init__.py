"""weight-diff: what changed in the weights, tensor pair by tensor pair."""

from __future__ import annotations

from typing import Any


def weight_diff(*_arguments: Any, **_options: Any) -> Any: ...
