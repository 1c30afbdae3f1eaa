"""The tables of compare's page: each model's lens, the tracked tokens, and the distance at each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from lazarus.render.base.cells import Cell, Heading, Row, Table, cell, plain, run_tables
from lazarus.render.base.cells import shown as number
from lazarus.render.lens.summary import last_choice, names, title
from lazarus.render.lens.text import emergence
from lazarus.render.lens.tokens import quoted_token, shown
from lazarus.results import CompareRecord, LensModel, LensToken, TokenEvolution
from lazarus.results.lens_glossary import LENS_METRICS

MOST_TRACKED = 24
"""tokens whose every layer is in the page's table"""


@dataclass(frozen=True)
class GridCell:
    """A token of a layer: its text, its probability as it is shown and exactly, and how dark the cell is."""

    token: str
    probability: Cell
    share: str
    title: str
    is_final: bool


@dataclass(frozen=True)
class GridRow:
    """A layer, and its tokens by rank."""

    layer: int
    cells: Sequence[GridCell]


def rows(model: LensModel) -> list[GridRow]:
    """The lens of a model, the last layer on top."""
    final = last_choice(model)
    last = None if final is None else final.token_id
    return [
        GridRow(layer.layer, [_grid_cell(token, token.token_id == last) for token in layer.top])
        for layer in reversed(model.layers)
    ]


def _grid_cell(token: LensToken, is_final: bool) -> GridCell:
    value = token.probability
    exact = "not finite" if value is None else repr(value)
    return GridCell(
        shown(token.token),
        cell(value, ".3f", "probability"),
        f"{100 * (value or 0.0):.1f}%",
        f"{shown(token.token)}: probability {exact}, id {token.token_id}",
        is_final,
    )


def emergences(record: CompareRecord) -> Table:
    """Each tracked token in each model: where it emerges, and how it ends."""
    headings = (
        Heading("Model"),
        Heading("Its token"),
        Heading("Emergence", LENS_METRICS["emergence_layer"].formula),
        Heading("Final prob", LENS_METRICS["probability"].formula),
        Heading("Final rank", LENS_METRICS["rank"].formula),
        Heading("Best rank", "over all layers, and the first layer that has it"),
    )
    return Table(
        "Where each tracked token emerges",
        [Heading("Tracked"), *headings],
        [
            Row(quoted_token(title(record, index)), _emergence(name, model.tracked[index]))
            for index in range(len(record.tracked))
            for name, model in _models(record)
        ],
    )


def _emergence(name: str, found: TokenEvolution) -> list[Cell]:
    token = plain("–") if found.token is None else plain(quoted_token(found.token))
    layer = "" if found.emergence_layer is None else str(found.emergence_layer)
    known = [rank for rank in found.rank if rank is not None]
    best = min(known, default=None)
    told = number(None) if best is None else f"{best} (layer {found.rank.index(best)})"
    return [
        plain(name),
        token,
        Cell(emergence(found), layer, "emergence_layer"),
        cell(found.final_probability, LENS_METRICS["probability"].format, "final_probability"),
        cell(found.rank[-1] if found.rank else None, "", "final_rank"),
        Cell(told, "" if best is None else str(best), "best_rank"),
    ]


def evolutions(record: CompareRecord) -> list[Table]:
    """Each model's tracked tokens at every layer: the probability, and the rank after it."""
    return [
        Table(
            f"Probability and rank of the tracked tokens, {name}",
            [Heading("Layer"), *_titles(record)],
            [
                Row(str(layer.layer), [_at_layer(found, i) for found in model.tracked[:MOST_TRACKED]])
                for i, layer in enumerate(model.layers)
            ],
        )
        for name, model in _models(record)
    ]


def _titles(record: CompareRecord) -> list[Heading]:
    shown_here = range(min(MOST_TRACKED, len(record.tracked)))
    return [Heading(quoted_token(title(record, index))) for index in shown_here]


def _at_layer(found: TokenEvolution, i: int) -> Cell:
    rank = "" if found.rank[i] is None else f" ({found.rank[i]})"
    value = cell(found.probability[i], LENS_METRICS["probability"].format, "probability")
    return Cell(value.shown + rank, value.value, value.field)


def distances(record: CompareRecord) -> Table:
    """Return how far apart the two lenses are, layer by layer."""
    kl, js, same = (LENS_METRICS[name] for name in ("kl_1_2", "js", "same_first_choice"))
    differ = record.model1.info.n_layers != record.model2.info.n_layers
    counterpart = [Heading("Model 2's layer", "at the same relative depth")] if differ else []
    columns = (
        Heading(kl.heading, kl.formula),
        Heading("KL(2‖1)", "the other way round"),
        Heading(js.heading, js.formula),
        Heading(same.heading, same.formula),
    )
    return Table(
        "KL and JS at each layer, in nats",
        [Heading("Model 1's layer" if differ else "Layer"), *counterpart, *columns],
        [
            Row(
                str(pair.layer),
                [
                    *([cell(pair.model2_layer, "", "model2_layer")] if differ else []),
                    cell(pair.kl_1_2, kl.format, "kl_1_2"),
                    cell(pair.kl_2_1, kl.format, "kl_2_1"),
                    cell(pair.js, js.format, "js"),
                    cell(pair.same_first_choice, "", "same_first_choice"),
                ],
            )
            for pair in record.layers
        ],
    )


def provenance(record: CompareRecord) -> list[Table]:
    """Both models, every setting and the environment: all that repeats the run."""
    models = {
        f"Model {i}": {**msgspec.structs.asdict(model.info), "n_vocabulary": model.n_vocabulary}
        for i, (_, model) in enumerate(_models(record), 1)
    }
    return run_tables(record, models, {})


def _models(record: CompareRecord) -> list[tuple[str, LensModel]]:
    return list(zip(names(record), (record.model1, record.model2), strict=True))
