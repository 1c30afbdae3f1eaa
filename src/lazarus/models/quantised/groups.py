"""Groups of columns with a scale and a zero point: the bits and the width that a configuration states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lazarus.models.quantised.blocks import Blocks
from lazarus.models.quantised.finding import Settings
from lazarus.models.stored import StoredTensor

Shapes = Mapping[str, tuple[int, ...]]
"""the shapes of the parts of a weight, by what they are"""


def fitting(
    parts: Mapping[str, StoredTensor],
    settings: Settings,
    blocks_of: Callable[[Shapes, int, int | None], Blocks | None],
) -> tuple[int, Blocks]:
    """Return the bits and the groups of one weight: of those that are stated the ones that its parts fit.

    `blocks_of` returns the groups of a weight with parts of these shapes, for so many bits and columns of a
    group (None is all of them), or None where the shapes do not fit each other.

    Raises:
        ValueError: they fit none.
    """
    shapes = {name: part.shape for name, part in parts.items()}
    stated = dict.fromkeys(_stated(settings))
    if all(len(shape) == (1 if name == "g_idx" else 2) for name, shape in shapes.items()):
        for bits, width in stated:
            blocks = blocks_of(shapes, bits, width)
            if blocks is not None:
                return bits, blocks
    told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    known = " or ".join(f"{bits} bits in groups of {width or 'all columns'}" for bits, width in stated)
    raise ValueError(f"the shapes of its parts ({told}) do not fit {known}, as its configuration says")


def _stated(settings: Settings) -> Iterator[tuple[int, int | None]]:
    """Yield the bits and the columns of a group: those of most modules, and then those of others.

    gptqmodel's `dynamic` and AutoRound's `extra_config` name the others by patterns, of which each library
    has a syntax of its own; the tensors tell as well which module is meant.
    """
    others = {**(settings.get("dynamic") or {}), **(settings.get("extra_config") or {})}
    for each in ({}, *(other for other in others.values() if isinstance(other, Mapping))):
        bits = _first({**settings, **each}, ("bits", "w_bit", "wbits"), 4)
        width = _first({**settings, **each}, ("group_size", "q_group_size"), 128)
        if 2 <= bits <= 8:
            yield bits, width if width > 0 else None


def _first(settings: Settings, names: tuple[str, ...], usual: int) -> int:
    found: Any = next((settings[name] for name in names if settings.get(name) is not None), usual)
    return int(found)
