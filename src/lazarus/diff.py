"""ActivationDiff: what a user of the library holds. A thin face over the record; no torch here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lazarus.errors import GateNotMetError, MissingPackageError, ResultFileError
from lazarus.options import check_bound, check_gates
from lazarus.render import figure, notebook, save, text
from lazarus.results import (
    ActivationDiffRecord,
    LayerRecord,
    PromptRecord,
    ResultRows,
    SiteRecord,
    Summary,
    flag_above,
    read_json,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


class ActivationDiff:
    """The result of `activation_diff`.

    `record` is the whole of it as plain data; the properties are its parts that are used most.
    Printing it gives the table of the command line.
    """

    def __init__(self, record: ActivationDiffRecord) -> None:
        self.record = record

    @property
    def layers(self) -> list[LayerRecord]:
        """One record a block, in order: cosine similarity, divergence and the rest."""
        return self.record.layers

    @property
    def sites(self) -> list[SiteRecord]:
        """The same outside the blocks: `embedding` and, where the model has one, `final_norm`."""
        return self.record.sites

    @property
    def results(self) -> ResultRows:
        """One row a prompt and layer; `results.column("divergence")` is the array [prompts, layers]."""
        return self.record.results

    @property
    def prompts(self) -> list[PromptRecord]:
        """The prompts, whole, with their number of tokens."""
        return self.record.prompts

    @property
    def summary(self) -> Summary:
        """The few numbers that a reader looks for first."""
        return self.record.summary

    @property
    def notes(self) -> list[str]:
        """What was left out, what was assumed, what could not be measured."""
        return self.record.notes

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a data frame: one a prompt and layer, with the columns of the CSV file.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingPackageError(
                "to_pandas needs the package pandas. Install it with "
                "`pip install 'lazarus-introspect[pandas]'`."
            ) from error
        from lazarus.render.table import columns

        return pandas.DataFrame(columns(self.record))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the divergence per layer with its interval and its references; CKA where widths differ.

        Without `ax` it is a new figure of pyplot's, with the local change below where it was measured.
        Returns the axes of the curve.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return figure.plot_curve(self.record, ax)

    def heatmap(self, ax: Axes | None = None, *, sort: bool = False) -> Axes:
        """Draw the divergence of every prompt at every layer; with `sort`, the most divergent prompt first.

        Without `ax` it is a new figure of pyplot's. Returns the axes.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return figure.plot_heatmap(self.record, ax, sort=sort)

    def _repr_html_(self) -> str:
        return notebook.to_html(self.record)

    def with_threshold(self, threshold: float) -> ActivationDiff:
        """The same result with the layers and sites above another divergence, 0 to 2, flagged.

        Raises:
            UsageError: it is no divergence.
        """
        check_bound("threshold", threshold)
        return ActivationDiff(flag_above(self.record, threshold))

    def save(self, path: str | Path) -> list[str]:
        """Write the result; the suffix names the format.

        These are .json, .csv, .parquet, .md, .html, .png, .svg and .pdf. Each file is written beside its
        target and renamed, so that nobody reads half of it. Returns the files: the one that was named, and
        before it the rows (`NAME.rows.parquet`) that a page of very many prompts leaves out.

        Raises:
            OutputError: the format or the place cannot be written.
            SaveError: the disk gave out on the way; an older file is left as it was.
        """
        save.check_output(str(path))
        return save.save(self.record, str(path))

    @classmethod
    def load(cls, path: str | Path) -> ActivationDiff:
        """Read back what was saved as JSON.

        Raises:
            ResultFileError: it cannot be read, or is no result of this schema version.
        """
        try:
            return cls(read_json(Path(path).read_bytes()))
        except OSError as error:
            raise ResultFileError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
        except ResultFileError as error:
            raise ResultFileError(f"{path}: {error}") from error

    def check_gates(self, *, fail_above: float | None = None, expect: str | None = None) -> None:
        """Hold the result against gates: no layer's divergence above `fail_above`, 0 to 2; a verdict of
        `identical` (or within the noise) or of `changed`.

        Raises:
            UsageError: a value that is no gate.
            GateNotMetError: a layer's divergence is above the limit, or could not be measured; or the
                models are not what was expected of them, beyond the noise, or no verdict could be given.
        """
        check_gates(fail_above, expect)
        if fail_above is not None:
            self._check_limit(fail_above)
        verdict = self.summary.verdict
        if expect is not None and (verdict is None or (verdict == "changed") != (expect == "changed")):
            raise GateNotMetError(f"--expect {expect}: {text.verdict(self.record)}")

    def _check_limit(self, limit: float) -> None:
        for layer in self.layers:
            if layer.divergence is None:
                raise GateNotMetError(
                    f"--fail-above {limit:g}: layer {layer.layer} could not be measured; see the notes."
                )
        worst = max(self.layers, key=lambda layer: layer.divergence or 0.0)
        if (worst.divergence or 0.0) > limit:
            raise GateNotMetError(
                f"--fail-above {limit:g}: layer {worst.layer} has a divergence of {worst.divergence:.6g}."
            )

    def __str__(self) -> str:
        return text.page(self.record)

    def __repr__(self) -> str:
        base, finetuned = self.record.base.id, self.record.finetuned.id
        return (
            f"<ActivationDiff {base} | {finetuned}: {len(self.layers)} layers, {len(self.prompts)} prompts>"
        )
