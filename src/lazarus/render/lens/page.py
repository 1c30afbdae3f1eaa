"""The page of compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from lazarus.render.base.escape import escaped
from lazarus.render.base.frame import Answer, Kit, unsaid, write_page
from lazarus.render.lens import grids, plots
from lazarus.render.lens.summary import (
    LEAST_JS,
    last_choice,
    names,
    place,
    read_layers,
    summary_lines,
    title,
)
from lazarus.render.lens.text import emergence
from lazarus.render.lens.tokens import quoted, quoted_token, shown
from lazarus.results import CompareRecord, LensModel
from lazarus.results.lens_glossary import LENS_METRICS

MOST_PLOTS = 24
STYLES = ("one", "two", "three")


def write_html(record: CompareRecord, stream: IO[bytes]) -> None:
    """Write the page: one file that needs no network, the same bytes for the same result.

    Its only script is that of the theme's button.
    """
    kit = Kit("lens/page.html", ("colours", "theme"), has_plots=False)
    write_page(kit, _context(record), {}, stream)


def headline(record: CompareRecord) -> str:
    """Return whether both end with the same token."""
    one, other = last_choice(record.model1), last_choice(record.model2)
    match record.summary.same_first_choice:
        case True if one is not None:
            return f"Both end with {quoted_token(one.token)}."
        case False if one is not None and other is not None:
            return (
                f"They end with different tokens: {quoted_token(one.token)} and {quoted_token(other.token)}."
            )
        case _:
            return "Not known: the final probabilities of a model are not finite."


def answers(record: CompareRecord) -> list[Answer]:
    """Return how sure each is, when each settled, and where the two part."""
    return [_how_sure(record), _when(record), _where(record)]


@dataclass(frozen=True)
class Seen:
    """A model as the page shows it: its name, the lens, and the prompt as it reads it."""

    name: str
    grid: Sequence[grids.GridRow]
    n_ranks: int
    tokens: Sequence[str]
    rendered: str | None


def _context(record: CompareRecord) -> dict[str, Any]:
    same = {True: "identical", False: "changed", None: "none"}
    return {
        "command": "logit lens",
        "record": record,
        "names": names(record),
        "verdict": same[record.summary.same_first_choice],
        "headline": headline(record),
        "answers": answers(record),
        "summary": unsaid(summary_lines(record)),
        "notes": [escaped(note) for note in record.notes],
        "absent": [],
        "prompt": quoted(record.prompt),
        "models": [_seen(record, i) for i in (0, 1)],
        "tracked": tracked_plots(record),
        "n_tracked": len(record.tracked),
        "emergences": grids.emergences(record),
        "evolutions": grids.evolutions(record),
        "distance": distance_plot(record),
        "distances": grids.distances(record),
        "provenance": grids.provenance(record),
        "metrics": list(LENS_METRICS.values()),
        "size": plots,
    }


def tracked_plots(record: CompareRecord) -> list[tuple[str, plots.Plot]]:
    """Each tracked token's probability over layers, in both models; the first 24 of them."""
    found = []
    for index in range(min(MOST_PLOTS, len(record.tracked))):
        name = quoted_token(title(record, index))
        lines = [
            plots.Line(of, style, model.tracked[index].probability)
            # two of three styles: the third is for JS in the other plot
            for of, style, model in zip(names(record), STYLES, _models(record), strict=False)
        ]
        told = "; ".join(
            f"{line.name}: {emergence(model.tracked[index])}"
            for line, model in zip(lines, _models(record), strict=True)
        )
        found.append((name, plots.plot(f"Probability of {name} over layers. {told}.", lines)))
    return found


def distance_plot(record: CompareRecord) -> plots.Plot:
    """KL both ways and JS, at each layer of model 1."""
    lines = [
        plots.Line("KL(1‖2)", "one", [pair.kl_1_2 for pair in record.layers]),
        plots.Line("KL(2‖1)", "two", [pair.kl_2_1 for pair in record.layers]),
        plots.Line("JS", "three", [pair.js for pair in record.layers]),
    ]
    return plots.plot("KL and JS over layers, in nats. The table has their numbers.", lines)


def _models(record: CompareRecord) -> tuple[LensModel, LensModel]:
    return record.model1, record.model2


def _seen(record: CompareRecord, i: int) -> Seen:
    model = _models(record)[i]
    return Seen(
        names(record)[i],
        grids.rows(model),
        max(len(layer.top) for layer in model.layers),
        [shown(token) for token in model.prompt_tokens],
        None if model.rendered is None else quoted(model.rendered),
    )


def _how_sure(record: CompareRecord) -> Answer:
    found = [last_choice(model) for model in _models(record)]
    values = [None if choice is None else choice.probability for choice in found]
    reason = "The probability of each model's first choice, model 1 and model 2."
    return Answer("How sure are they?", " | ".join(_short(value) for value in values), reason)


def _when(record: CompareRecord) -> Answer:
    layers = [_settled(model) for model in _models(record)]
    told = " | ".join("–" if layer is None else f"layer {layer}" for layer in layers)
    depths = " and ".join(str(len(model.layers)) for model in _models(record))
    reason = f"The layer from which each reads its final first choice, of {depths} layers."
    return Answer("When did they settle?", told, reason)


def _settled(model: LensModel) -> int | None:
    """The first layer from which the lens's first choice is the final one."""
    choices = [layer.top[0].token_id if layer.top else None for layer in model.layers]
    if choices[-1] is None:
        return None
    others = [layer for layer, choice in enumerate(choices) if choice != choices[-1]]
    return others[-1] + 1 if others else 0


def _where(record: CompareRecord) -> Answer:
    question, layer = "Where do they differ most?", record.summary.most_divergent_layer
    if layer is None or record.summary.max_js is None:
        return Answer(question, "Not known", "No layer of the two could be compared.")
    if record.summary.max_js <= LEAST_JS:
        return Answer(question, "Nowhere", f"Both lenses read the same at {read_layers(record)}.")
    pair = next(pair for pair in record.layers if pair.layer == layer)
    reason = f"JS {_short(record.summary.max_js)} nats, of at most 0.6931, at {place(record, pair)}."
    return Answer(question, f"Layer {layer}", reason)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if value >= 5e-5 or not value else f"{value:.1e}"
