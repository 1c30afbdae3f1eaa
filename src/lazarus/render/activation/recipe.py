"""The blocks in the order of what they cost, as a list of modules to leave out of a quantisation."""

from __future__ import annotations

from typing import IO

from lazarus.errors import OutputError
from lazarus.messages import option
from lazarus.render.base.recipe import write_list
from lazarus.results import ActivationDiffRecord


def write_recipe(record: ActivationDiffRecord, stream: IO[bytes]) -> None:
    """Write a pattern for each block, the largest local change first.

    Raises:
        OutputError: the local change was not measured.
    """
    changes = {
        rf"re:.*\.(layers|layer|h|blocks|block)\.{layer.layer}\..*": layer.local.relative_l2
        for layer in record.layers
        if layer.local is not None and layer.local.relative_l2 is not None
    }
    if not changes:
        raise OutputError(
            "a recipe ranks blocks by their local change, which was not measured. Run with "
            f"{option('localize')}.",
            option="localize",
        )
    write_list(changes, "local change", stream)
