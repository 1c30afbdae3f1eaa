"""WeightDiff: the result of weight-diff."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from lazarus.errors import GateNotMetError
from lazarus.messages import option
from lazarus.options import WeightOptions, check
from lazarus.render.weights import figure, notebook, table, text
from lazarus.result_classes.base import Result, data_frame
from lazarus.results import TensorRecord, WeightDiffRecord, WeightLayerRecord, WeightSummary, differing

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


class WeightDiff(Result[WeightDiffRecord]):
    """The result of `weight_diff`.

    `record` is the whole of it as plain data; the properties are its parts that are used most.
    Printing it gives the table of the command line.
    """

    kind = WeightDiffRecord
    has_gates = True

    @property
    def results(self) -> list[TensorRecord]:
        """One record a tensor, in the model's order."""
        return self.record.results

    @property
    def layers(self) -> list[WeightLayerRecord]:
        """One record a block: all its tensors together."""
        return self.record.layers

    @property
    def summary(self) -> WeightSummary:
        """The few numbers that a reader looks for first."""
        return self.record.summary

    def to_pandas(self) -> pandas.DataFrame:
        """The tensors as a data frame: one row each, with the columns of the CSV file.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        frame = data_frame(table.columns(self.record))
        return frame.astype(dict.fromkeys(table.INTEGERS, "Int64"))  # they may be missing

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the relative change of each component at each layer, on a log scale; white is exactly 0.

        Without `ax` it is a new figure of pyplot's, with the tensors outside the layers below the map.
        Returns the axes of the map.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return figure.plot_map(self.record, ax, "plot")

    def heatmap(self, ax: Axes | None = None) -> Axes:
        """The same as `plot`: the map of components by layers.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return figure.plot_map(self.record, ax, "heatmap")

    def _repr_html_(self) -> str:
        return notebook.to_html(self.record)

    def with_threshold(self, threshold: float) -> WeightDiff:
        """The same result with the tensors above another relative change flagged.

        Raises:
            UsageError: it is no relative change.
        """
        check(WeightOptions, threshold=threshold)
        return WeightDiff(_flag_above(self.record, threshold))

    @staticmethod
    def check_options(fail_above: float | None, expect: str | None) -> None:
        """Refuse what is no gate of such a result.

        Raises:
            UsageError: it names the gate.
        """
        check(WeightOptions, fail_above=fail_above, expect=expect)

    def check_gates(
        self, *, fail_above: float | None = None, expect: str | None = None, only_compared: bool = False
    ) -> None:
        """Hold the result against gates: no tensor's relative change above `fail_above`; a verdict of
        `identical` or of `changed`. A verdict of `rounding` meets `identical`.

        What was not compared fails `identical` where it differs or is not known, unless `only_compared`.

        Raises:
            UsageError: a value that is no gate.
            GateNotMetError: a tensor’s relative change is above the limit or not finite, tensors of the two
                have no counterpart, or the checkpoints are not what was expected of them.
        """
        check(WeightOptions, fail_above=fail_above, expect=expect)
        if fail_above is not None:
            self._check_limit(fail_above)
        if expect is not None and (self.summary.verdict == "changed") != (expect == "changed"):
            raise GateNotMetError(f"{option('expect', expect)}: {text.verdict(self.record)}", option="expect")
        others = differing(self.record.base.not_compared, self.record.finetuned.not_compared)
        if expect == "identical" and others and not only_compared:
            raise GateNotMetError(
                f"{option('expect', 'identical')}: {text.verdict(self.record)}. "
                f"{option('only_compared', True)} leaves that out.",
                option="expect",
            )

    def _check_limit(self, limit: float) -> None:
        if (fault := self._fault(limit)) is not None:
            raise GateNotMetError(f"{option('fail_above', limit, 'g')}: {fault}.", option="fail_above")

    def _fault(self, limit: float) -> str | None:
        """Return what keeps the gate from being met: a larger change, or one that is not known."""
        if not self.results:
            return "no tensor was compared; see the notes"
        if self.record.unmatched:
            n_unmatched, first = len(self.record.unmatched), self.record.unmatched[0]
            return (
                f"{n_unmatched} tensors have no counterpart of their shape, first {first.name}; see the notes"
            )
        for row in self.results:
            if row.relative_change is None:
                return f"{text.place(row)} has no relative change; see the notes"
        worst = max(self.results, key=lambda row: row.relative_change or 0.0)
        if (worst.relative_change or 0.0) <= limit:
            return None
        return f"{text.place(worst)} has a relative change of {worst.relative_change:.6g}"

    def __str__(self) -> str:
        return text.page(self.record)

    def __repr__(self) -> str:
        base, finetuned = self.record.base.id, self.record.finetuned.id
        return f"<WeightDiff {base} | {finetuned}: {len(self.results)} tensors, {len(self.layers)} layers>"


def _flag_above(record: WeightDiffRecord, threshold: float) -> WeightDiffRecord:
    """The record as a run with this threshold would have given it."""
    rows = [replace(row, flagged=(row.relative_change or 0.0) > threshold) for row in record.results]
    return replace(
        record,
        settings=replace(record.settings, threshold=threshold),
        results=rows,
        summary=replace(record.summary, n_flagged_tensors=sum(row.flagged for row in rows)),
    )
