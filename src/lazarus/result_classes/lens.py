"""Comparison: the result of compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazarus.render.lens import notebook, text
from lazarus.result_classes.base import Result, data_frame
from lazarus.results import CompareRecord, LensModel, LensPair, LensSummary

if TYPE_CHECKING:
    import pandas


class Comparison(Result[CompareRecord]):
    """The result of `compare`: the logit lens of two models on one prompt.

    `record` is the whole of it as plain data; the properties are its parts that are used most.
    Printing it gives what the command line prints.
    """

    kind = CompareRecord

    @property
    def models(self) -> tuple[LensModel, LensModel]:
        """Return what each model's lens reads: top tokens a layer, tracked tokens and where they emerge."""
        return self.record.model1, self.record.model2

    @property
    def layers(self) -> list[LensPair]:
        """Return how far apart the two lenses are, one record a layer of model 1."""
        return self.record.layers

    @property
    def summary(self) -> LensSummary:
        """The few numbers that a reader looks for first."""
        return self.record.summary

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a data frame: one a model, layer and rank, with the columns of the CSV file.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        from lazarus.render.lens.table import columns

        return data_frame(columns(self.record))

    def _repr_html_(self) -> str:
        return notebook.to_html(self.record)

    def __str__(self) -> str:
        return text.page(self.record)

    def __repr__(self) -> str:
        one, other = (model.info.id for model in self.models)
        return (
            f"<Comparison {one} | {other}: {len(self.record.prompt)} characters, {len(self.layers)} layers>"
        )
