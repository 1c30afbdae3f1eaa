"""Consistency of a record that was read from a file: its parts speak of the same layers, rows and notes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lazarus.results.lens import CompareRecord
from lazarus.results.measured import Groups, TokenTrace
from lazarus.results.records import ActivationDiffRecord
from lazarus.results.series import SeriesRecord
from lazarus.results.weights import WeightDiffRecord


def contradiction(record: Any) -> str | None:
    """Return which parts of a result contradict each other, as in a file that was edited; None if none do."""
    codes, notes = getattr(record, "note_codes", []), record.notes
    if codes and len(codes) != len(notes):  # results of older versions have none
        return f"note_codes: {len(codes)} codes for {len(notes)} notes"
    if isinstance(record, ActivationDiffRecord):
        return _in_activation_diff(record)
    if isinstance(record, WeightDiffRecord):
        return _in_weight_diff(record)
    if isinstance(record, SeriesRecord):
        return _in_series(record)
    return _in_compare(record) if isinstance(record, CompareRecord) else None


def _in_activation_diff(record: ActivationDiffRecord) -> str | None:
    n_layers, n_prompts = record.results.n_layers, record.results.n_prompts
    for name, found, expected in (
        ("layers", len(record.layers), n_layers),
        ("prompts", len(record.prompts), n_prompts),
    ):
        if found != expected:
            return f"{name}: {found}, and results has the rows of {expected}"
    summary = record.summary
    groups = record.groups or Groups(curves=[], contrasts=[])
    named: dict[str, list[int | None]] = {
        "layers": [row.layer for row in record.layers],
        "summary.most_divergent_layer": [summary.most_divergent_layer],
        "summary.first_flagged_layer": [summary.first_flagged_layer],
        "summary.onset_layer": [summary.onset_layer],
        "summary.most_changed_block": [summary.most_changed_block],
        "readout": [each.layer for each in record.readout or ()],
        "groups.contrasts": [each.layer for each in groups.contrasts],
    }
    for name, layers in named.items():
        if absent := [layer for layer in layers if layer is not None and layer >= n_layers]:
            return f"{name}: there is no layer {absent[0]} among {n_layers}"
    curves: dict[str, list[list[float | None]]] = {
        "groups.curves": [each.divergence for each in groups.curves],
        "groups.contrasts": [each.log_ratio for each in groups.contrasts],
        "tokens": [row for each in record.tokens or () for row in each.divergence],
    }
    for name, rows in curves.items():
        if short := [row for row in rows if len(row) != n_layers]:
            return f"{name}: {len(short[0])} values for {n_layers} layers"
    return next((why for each in record.tokens or () if (why := _in_trace(each, n_prompts))), None)


def _in_trace(trace: TokenTrace, n_prompts: int) -> str | None:
    if not 0 <= trace.prompt_index < n_prompts:
        return f"tokens: there is no prompt {trace.prompt_index} among {n_prompts}"
    n_tokens = len(trace.tokens)
    optional = (trace.kl, trace.agrees, trace.base_choices, trace.finetuned_choices)
    lists = [trace.positions, trace.divergence, *(each for each in optional if each is not None)]
    if other := [each for each in lists if len(each) != n_tokens]:
        return f"tokens: {len(other[0])} values for {n_tokens} tokens of prompt {trace.prompt_index}"
    return None if n_tokens else f"tokens: none of prompt {trace.prompt_index}"


def _in_series(record: SeriesRecord) -> str | None:
    n_members = len(record.members)
    if not n_members:
        return "members: there are none"
    if record.distances and [len(row) for row in record.distances] != [n_members] * n_members:
        return f"distances: not those of {n_members} members to each other"
    places = [place for found in record.findings for place in (*found.members, *(found.interval or ()))]
    if absent := [place for place in places if not 0 <= place < n_members]:
        return f"findings: there is no member {absent[0]} among {n_members}"
    return None


def _in_weight_diff(record: WeightDiffRecord) -> str | None:
    n_rows, summary = len(record.results), record.summary
    if summary.n_tensors != n_rows:
        return f"summary.n_tensors: {summary.n_tensors}, and results has {n_rows} rows"
    if summary.n_unmatched != len(record.unmatched):
        return f"summary.n_unmatched: {summary.n_unmatched}, and unmatched has {len(record.unmatched)}"
    if absent := [row for row in summary.most_changed if not 0 <= row < n_rows]:
        return f"summary.most_changed: there is no row {absent[0]} among {n_rows}"
    if unknown := [row for row in summary.most_changed if record.results[row].relative_change is None]:
        return f"summary.most_changed: row {unknown[0]} has no relative_change"
    in_rows = {row.layer for row in record.results} - {None}
    if in_rows != {row.layer for row in record.layers}:
        return "layers: not those that the rows of results are in"
    return None


def _in_compare(record: CompareRecord) -> str | None:
    models = {"model1": record.model1, "model2": record.model2}
    for name, model in models.items():
        n_layers = model.info.n_layers
        if len(model.layers) != n_layers or any(row.layer != i for i, row in enumerate(model.layers)):
            return f"{name}.layers: not the {n_layers} layers of the model, in order"
        if len(model.tracked) != len(record.tracked):
            return f"{name}.tracked: {len(model.tracked)} tokens, and tracked has {len(record.tracked)}"
        if any(len(found) != n_layers for t in model.tracked for found in (t.probability, t.rank)):
            return f"{name}.tracked: not one value for each of {n_layers} layers"
    if [pair.layer for pair in record.layers] != list(range(record.model1.info.n_layers)):
        return "layers: not the layers of model1, in order"
    counterparts: Iterable[int] = (pair.model2_layer for pair in record.layers)
    if max(counterparts) >= record.model2.info.n_layers:
        return "layers: a model2_layer is not among the layers of model2"
    most = record.summary.most_divergent_layer
    if most is not None and most >= len(record.layers):
        return f"summary.most_divergent_layer: there is no layer {most} among {len(record.layers)}"
    return None
