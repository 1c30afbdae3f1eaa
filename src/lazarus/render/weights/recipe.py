"""The tensors in the order of their error, as a list of modules to leave out of a quantisation."""

from __future__ import annotations

from typing import IO

from lazarus.errors import OutputError
from lazarus.render.base.recipe import write_list
from lazarus.results import WeightDiffRecord


def write_recipe(record: WeightDiffRecord, stream: IO[bytes]) -> None:
    """Write the modules whose weights were quantised, the largest relative error first.

    Raises:
        OutputError: no tensor is quantised on one side alone.
    """
    errors = {
        row.name.removesuffix(".weight"): row.quantisation.relative_error
        for row in record.results
        if row.quantisation is not None and row.quantisation.relative_error is not None
    }
    if not errors:
        raise OutputError(
            "a recipe lists what a quantisation did, and no tensor is quantised in one of the two alone. "
            "Compare a quantised model with the one that it was made from."
        )
    write_list(errors, "relative error of the weights", stream)
