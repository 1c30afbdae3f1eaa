"""Series: the result of series."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from lazarus.errors import GateNotMetError, ResultFileError
from lazarus.messages import option
from lazarus.notes import Notes
from lazarus.options import SeriesOptions, check
from lazarus.render.series import figure, notebook, table, text
from lazarus.result_classes.activation import ActivationDiff
from lazarus.result_classes.base import Result, data_frame
from lazarus.results import (
    SCHEMA_VERSION,
    ActivationDiffRecord,
    ResultRows,
    SeriesFinding,
    SeriesMember,
    SeriesRecord,
    steps_of,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

_INTEGERS = ("step",)
"""columns of whole numbers that may be empty"""


class Series(Result[SeriesRecord]):
    """The result of `series`: many models against one base.

    `record` is the whole of it as plain data; the properties are its parts that are used most.
    Printing it gives the table of the command line.
    """

    kind = SeriesRecord
    has_gates = True

    @classmethod
    def of(cls, diffs: Mapping[str, ActivationDiff]) -> Series:
        """Return results of activation-diff against one base as a series, by what its members are called.

        There are no states in them: no distances are known, and no findings are looked for.

        Raises:
            ResultFileError: there are none, or they are not of one base and the same prompts.
        """
        records = {name: diff.record for name, diff in diffs.items()}
        if not records:
            raise ResultFileError("no result of activation-diff: a series needs at least one.")
        first_name, first = next(iter(records.items()))
        for name, record in records.items():
            same_base = record.base.n_layers == first.base.n_layers and record.base.id == first.base.id
            if not same_base or record.prompts != first.prompts:
                raise ResultFileError(
                    f"{name}: of another base, or of other prompts, than {first_name}. A series is of one "
                    "base and the same prompts."
                )
        steps = steps_of(list(records))
        members = [
            SeriesMember(
                model=replace(record.finetuned, id=name),
                step=step,
                summary=record.summary,
                layers=record.layers,
                sites=record.sites,
                output=record.output,
                distance=None,
                turn=None,
                previous=None,
            )
            for (name, record), step in zip(records.items(), steps, strict=True)
        ]
        count, notes = len(members), Notes()
        notes.add(
            "no-distances",
            "the models were compared with base while they were trained, and their states were not kept: "
            "they were not compared with one another",
        )
        return cls(
            SeriesRecord(
                schema_version=SCHEMA_VERSION,
                command="series",
                tool=first.tool,
                created=first.created,
                base=first.base,
                settings=first.settings,
                environment=first.environment,
                prompts=first.prompts,
                members=members,
                distances=[[0.0 if i == j else None for j in range(count)] for i in range(count)],
                findings=[],
                notes=notes.texts,
                note_codes=notes.codes,
            )
        )

    @property
    def members(self) -> list[SeriesMember]:
        """One record a model, in the order given: against base, and against the one before it."""
        return self.record.members

    @property
    def findings(self) -> list[SeriesFinding]:
        """Findings on the models together: copies, members out of order, a change of the training."""
        return self.record.findings

    @property
    def distances(self) -> NDArray[np.float64]:
        """The distance of any two members, [members, members]; NaN where it is not known."""
        return np.array(self.record.distances, dtype=np.float64)

    def _pair(self, member: int) -> ActivationDiff:
        """Return one member against base as activation-diff has it, without the rows of its prompts."""
        record, found = self.record, self.record.members[member]
        empty = np.zeros((0, len(found.layers)))
        return ActivationDiff(
            ActivationDiffRecord(
                schema_version=SCHEMA_VERSION,
                command="activation-diff",
                tool=record.tool,
                created=record.created,
                base=record.base,
                finetuned=found.model,
                settings=record.settings,
                environment=record.environment,
                prompts=record.prompts,
                layers=found.layers,
                sites=found.sites,
                results=ResultRows([], {"divergence": empty}),
                summary=found.summary,
                output=found.output,
                notes=record.notes,
                note_codes=record.note_codes,
            )
        )

    def to_pandas(self) -> pandas.DataFrame:
        """The layers of every member as a data frame: one row each, with the columns of the CSV file.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        frame = data_frame(table.columns(self.record))
        return frame.astype(dict.fromkeys(_INTEGERS, "Int64"))  # they may be missing

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the divergence of layers by members; without `ax` with distances and KL in a new figure.

        Returns the axes of the map.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return figure.plot_map(self.record, ax, "plot")

    def _repr_html_(self) -> str:
        return notebook.to_html(self.record)

    def with_threshold(self, threshold: float) -> Series:
        """The same result with the layers above another divergence, 0 to 2, flagged.

        Raises:
            UsageError: it is no divergence.
        """
        check(SeriesOptions, threshold=threshold)
        pairs = [self._pair(i).with_threshold(threshold).record for i in range(len(self.members))]
        members = [
            replace(member, layers=pair.layers, sites=pair.sites, summary=pair.summary)
            for member, pair in zip(self.members, pairs, strict=True)
        ]
        settings = replace(self.record.settings, threshold=threshold)
        return Series(replace(self.record, settings=settings, members=members))

    @staticmethod
    def check_options(fail_above: float | None, expect: str | None) -> None:
        """Refuse what is no gate of such a result.

        Raises:
            UsageError: it names the gate.
        """
        check(SeriesOptions, fail_above=fail_above, expect=expect)

    def check_gates(
        self,
        *,
        fail_above: float | None = None,
        expect: str | None = None,
        only_compared: bool = False,
        expect_path: bool = False,
    ) -> None:
        """Hold every member against the gates of `activation_diff`, and the series against one of its own.

        `expect_path` fails where members are copies of one another or of base, share their first blocks, or
        are out of order. A change point is no fault.

        Raises:
            UsageError: a value that is no gate.
            GateNotMetError: a member does not meet a gate; it is named.
        """
        check(SeriesOptions, fail_above=fail_above, expect=expect)
        for i, member in enumerate(self.members):
            try:
                self._pair(i).check_gates(fail_above=fail_above, expect=expect, only_compared=only_compared)
            except GateNotMetError as error:
                raise GateNotMetError(f"{member.model.id}: {error.marked}", option=error.option) from error
        faults = [found.text for found in self.findings if found.kind != "change_point"]
        if expect_path and faults:
            raise GateNotMetError(
                f"{option('expect_path', True)}: {'; '.join(faults)}.", option="expect_path"
            )

    def __str__(self) -> str:
        return text.page(self.record)

    def __repr__(self) -> str:
        counts = (
            f"{len(self.members)} models, {len(self.record.prompts)} prompts, {len(self.findings)} findings"
        )
        return f"<Series {self.record.base.id}: {counts}>"
