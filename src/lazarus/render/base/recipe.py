"""A recipe: the modules in the order of what their quantisation costs, in the form of an ignore list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO

import msgspec


def write_list(costs: Mapping[str, float], cost: str, stream: IO[bytes]) -> None:
    """Write modules by their costs, the costliest first.

    `ignore` is what llm-compressor's modifiers take under that name: module names, or patterns after `re:`.
    Cut it where the rest is cheap enough.
    """
    ranked = dict(sorted(costs.items(), key=lambda each: -each[1]))
    recipe = {"ignore": list(ranked), "cost": cost, "costs": list(ranked.values())}
    stream.write(msgspec.json.format(msgspec.json.encode(recipe)) + b"\n")
