"""ActivationDiff: the result of activation-diff."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lazarus.errors import GateNotMetError
from lazarus.messages import option
from lazarus.options import Options, check
from lazarus.render.activation import figure, notebook, text
from lazarus.render.activation.summary import verdict
from lazarus.result_classes.base import Result, data_frame
from lazarus.results import (
    BROKEN,
    ActivationDiffRecord,
    LayerRecord,
    PromptRecord,
    ResultRows,
    SiteRecord,
    Summary,
    differing,
    flag_above,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


class ActivationDiff(Result[ActivationDiffRecord]):
    """The result of `activation_diff`.

    `record` is the whole of it as plain data; the properties are its parts that are used most.
    Printing it gives the table of the command line.
    """

    kind = ActivationDiffRecord
    has_gates = True

    def __init__(
        self, record: ActivationDiffRecord, vectors: Mapping[str, NDArray[np.float32]] | None = None
    ) -> None:
        """Take the record and, of a run, the mean difference δ̄ of each layer as `resid_post.N`, [hidden].

        A result that was read back has no vectors, and neither have models of two widths.
        """
        super().__init__(record)
        self.vectors = vectors

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

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a data frame: one a prompt and layer, with the columns of the CSV file.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        from lazarus.render.activation.table import columns

        return data_frame(columns(self.record))

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

    def plot_attribution(self, ax: Axes | None = None) -> Axes:
        """Draw what each block, and what is outside them, contributes to KL(base‖fine-tuned), in nats.

        Of single tensors it is a map of components by layers. Without `ax` it is a new figure of pyplot's.
        Returns the axes.

        Raises:
            MissingPackageError: matplotlib is not installed.
            UsageError: the result has no attribution.
        """
        return figure.plot_attribution(self.record, ax)

    def _repr_html_(self) -> str:
        return notebook.to_html(self.record)

    def with_threshold(self, threshold: float) -> ActivationDiff:
        """The same result with the layers and sites above another divergence, 0 to 2, flagged.

        Raises:
            UsageError: it is no divergence.
        """
        check(Options, threshold=threshold)
        return ActivationDiff(flag_above(self.record, threshold), self.vectors)

    @staticmethod
    def check_options(fail_above: float | None, expect: str | None) -> None:
        """Refuse what is no gate of such a result.

        Raises:
            UsageError: it names the gate.
        """
        check(Options, fail_above=fail_above, expect=expect)

    def check_gates(
        self, *, fail_above: float | None = None, expect: str | None = None, only_compared: bool = False
    ) -> None:
        """Hold the result against gates: no layer's divergence above `fail_above`, 0 to 2; a verdict of
        `identical` (or within the noise or the rounding of the stored weights) or of `changed`.

        A gate is met by what was measured: a prompt that was left out fails `fail_above` and `identical`.
        What was not compared fails `identical` where it differs or is not known, unless `only_compared`.

        Raises:
            UsageError: a value that is no gate.
            GateNotMetError: a layer's divergence is above the limit, or could not be measured on every
                prompt; or the models are not what was expected of them, beyond the noise, or no verdict
                could be given.
        """
        check(Options, fail_above=fail_above, expect=expect)
        if fail_above is not None:
            self._check_limit(fail_above)
        found = self.summary.verdict
        if expect is not None and (found is None or (found == "changed") != (expect == "changed")):
            raise GateNotMetError(f"{option('expect', expect)}: {verdict(self.record)}", option="expect")
        if expect == "identical":
            self._check_whole("expect", option("expect", "identical"))
            others = differing(self.record.base.not_compared, self.record.finetuned.not_compared)
            if others and not only_compared:
                raise GateNotMetError(
                    f"{option('expect', 'identical')}: {verdict(self.record)}. "
                    f"{option('only_compared', True)} leaves that out.",
                    option="expect",
                )

    def _check_whole(self, name: str, gate: str) -> None:
        """Refuse a result in which prompts are missing: a gate is met only by what was measured.

        `gate` is the option of that name, with its value.
        """
        summary, n_prompts = self.summary, len(self.prompts)
        left_out = summary.n_prompts_left_out
        if left_out is None:  # saved by an earlier version
            left_out = max(n_prompts - layer.n_prompts for layer in self.layers)
        for n_left_out, what in ((left_out, "states"), (summary.n_outputs_left_out, "logits")):
            if n_left_out:
                raise GateNotMetError(
                    f"{gate}: {n_left_out} of {n_prompts} prompts have {what} that could not be compared; "
                    "see the notes.",
                    option=name,
                )
        for model in (self.record.base, self.record.finetuned):
            if any(part.what.startswith(BROKEN) for part in model.not_compared):
                raise GateNotMetError(f"{gate}: {model.id} has {BROKEN}; see the notes.", option=name)

    def _check_limit(self, limit: float) -> None:
        gate = option("fail_above", limit, "g")
        self._check_whole("fail_above", gate)
        for layer in self.layers:
            if layer.divergence is None:
                raise GateNotMetError(
                    f"{gate}: layer {layer.layer} could not be measured; see the notes.", option="fail_above"
                )
        n_theirs, n_compared = self.record.finetuned.n_layers, len({*self._counterparts()})
        if n_compared < n_theirs:
            raise GateNotMetError(
                f"{gate}: {n_theirs - n_compared} of {n_theirs} layers of fine-tuned have no counterpart in "
                "base, and were not compared.",
                option="fail_above",
            )
        worst = max(self.layers, key=lambda layer: layer.divergence or 0.0)
        if (worst.divergence or 0.0) > limit:
            raise GateNotMetError(
                f"{gate}: layer {worst.layer} has a divergence of {worst.divergence:.6g}.",
                option="fail_above",
            )

    def _counterparts(self) -> list[int]:
        """The layers of fine-tuned that were compared."""
        return [r.layer if r.finetuned_layer is None else r.finetuned_layer for r in self.layers]

    def __str__(self) -> str:
        return text.page(self.record)

    def __repr__(self) -> str:
        base, finetuned = self.record.base.id, self.record.finetuned.id
        return (
            f"<ActivationDiff {base} | {finetuned}: {len(self.layers)} layers, {len(self.prompts)} prompts>"
        )
