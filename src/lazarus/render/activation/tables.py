"""The tables that need no script: layers, groups, output, tokens and where the result comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lazarus.render.activation.scores import score_table
from lazarus.render.base.cells import Cell, Heading, Row, Table, Value, base_and_finetuned, cell, run_tables
from lazarus.render.base.escape import escaped
from lazarus.results import (
    METRICS,
    ActivationDiffRecord,
    GroupContrast,
    Measures,
    ReadoutToken,
    SiteRecord,
)

MOST_CONTRASTS = 100
MOST_GROUPS = 20
_RANKED = ("local_relative_l2", "local_cosine_similarity", "divergence")


@dataclass(frozen=True)
class _Column:
    """A field of Measures: its heading, its format and how it is read."""

    field: str
    heading: str
    format: str
    meaning: str
    read: Callable[[Measures], Value]


def layers(record: ActivationDiffRecord) -> Table:
    """Every field of every layer and site, in the order in which a token passes them."""
    first = [site for site in record.sites if site.name == "embedding"]
    last = [site for site in record.sites if site.name != "embedding"]
    places: list[Measures] = [*first, *record.layers, *last]
    columns = _columns(record)
    there = [column for column in columns if any(column.read(place) is not None for place in places)]
    return Table(
        caption="Every number of every layer, as a mean over prompts",
        headings=[Heading("Layer"), *(Heading(c.heading, c.meaning) for c in there)],
        rows=[
            Row(_name(place), [cell(c.read(place), c.format, c.field) for c in there], place.flagged)
            for place in places
        ],
        left_out=[column.heading for column in columns if column not in there],
    )


def groups(record: ActivationDiffRecord) -> Table | None:
    """The divergence of each group of prompts a layer."""
    if not record.groups or not record.groups.curves:
        return None
    found, metric = record.groups.curves, METRICS["divergence"]
    curves = found[:MOST_GROUPS]
    left = f"; the first {MOST_GROUPS} of {len(found):,} groups" if len(found) > MOST_GROUPS else ""
    return Table(
        caption=f"Mean divergence of each group of prompts{left}",
        headings=[Heading("Layer"), *(Heading(escaped(c.group), f"{c.n_prompts} prompts") for c in curves)],
        rows=[
            Row(str(layer.layer), [cell(curve.divergence[i], metric.format) for curve in curves])
            for i, layer in enumerate(record.layers)
        ],
    )


def contrasts(record: ActivationDiffRecord) -> Table | None:
    """Each contrast between groups at the layer where it is largest."""
    if not record.groups or not record.groups.contrasts:
        return None
    headings = (
        Heading("Layer", "where the log ratio is largest"),
        Heading("Log ratio", "mean log divergence of the first group less that of the second"),
        Heading("p value", "one-sided permutation test of the largest log ratio over all layers"),
    )
    found = record.groups.contrasts
    left = len(found) - MOST_CONTRASTS
    return Table(
        caption="Contrasts between groups" + (f"; {left} more are in the JSON" if left > 0 else ""),
        headings=[Heading("Groups"), *headings],
        rows=[_contrast(contrast) for contrast in found[:MOST_CONTRASTS]],
    )


def ranking(record: ActivationDiffRecord) -> Table | None:
    """Return the blocks of a quantised pair in the order of what they cost; None of other pairs."""
    costs = {
        layer: layer.local.relative_l2
        for layer in record.layers
        if layer.local is not None and layer.local.relative_l2 is not None
    }
    if "quantised-pair" not in record.note_codes or not costs:
        return None
    columns = [column for column in _columns(record) if column.field in _RANKED]
    return Table(
        caption="Blocks in the order of what their quantisation costs: the local change",
        headings=[Heading("Block"), *(Heading(c.heading, c.meaning) for c in columns)],
        rows=[
            Row(str(layer.layer), [cell(c.read(layer), c.format, c.field) for c in columns])
            for layer in sorted(costs, key=lambda layer: -costs[layer])
        ],
    )


def output(record: ActivationDiffRecord) -> Table | None:
    """Return what became of the next token, or of the scores."""
    if record.output is None:
        return None
    if record.output.scores is not None:
        return score_table(record.output, record.output.scores)
    return Table(
        caption="The next token, as a mean over prompts",
        headings=[Heading("Measure"), Heading("Value"), Heading("What it is")],
        rows=[
            Row(heading, [cell(getattr(record.output, name), form, name), Cell(meaning, meaning)])
            for name, heading, form, meaning in _OUTPUT
        ],
    )


def mined(record: ActivationDiffRecord) -> list[list[tuple[str, Cell]]]:
    """Return the tokens that are promoted most often, and suppressed: (token, frequency); empty of none."""
    if record.mined is None:
        return []
    form = METRICS["frequency"].format
    return [
        [(_seen(token.token), cell(token.frequency, form)) for token in tokens]
        for tokens in (record.mined.promoted, record.mined.suppressed)
    ]


@dataclass(frozen=True)
class ReadoutLayer:
    """Tokens that the mean difference promotes and suppresses at one layer, by either model's LM head."""

    layer: int
    static_share: Cell
    columns: Sequence[Sequence[tuple[str, Cell]]]
    """promoted by base, by fine-tuned, suppressed by base, by fine-tuned: (token, score)"""


def readout(record: ActivationDiffRecord) -> list[ReadoutLayer]:
    """The readout, a layer after another; empty where there is none."""
    return [
        ReadoutLayer(
            found.layer,
            cell(found.static_share, METRICS["static_share"].format, "static_share"),
            [
                _tokens(found.base_promoted),
                _tokens(found.finetuned_promoted),
                _tokens(found.base_suppressed),
                _tokens(found.finetuned_suppressed),
            ],
        )
        for found in record.readout or []
    ]


def provenance(record: ActivationDiffRecord) -> list[Table]:
    """Both models, every setting and the environment: all that repeats the run."""
    return run_tables(record, base_and_finetuned(record), {"prompts": len(record.prompts)})


def _columns(record: ActivationDiffRecord) -> list[_Column]:
    """All fields of Measures, those that are read most first."""
    return [
        _field("divergence"),
        _Column("low", "95 % from", ".4f", _meaning("interval"), lambda m: m.interval and m.interval[0]),
        _Column("high", "to", ".4f", _meaning("interval"), lambda m: m.interval and m.interval[1]),
        _Column(
            "flagged",
            f"Above {record.settings.threshold:g}",
            "",
            "divergence above the threshold, which is a convention",
            lambda m: m.flagged,
        ),
        _field("cosine_similarity"),
        _Column(
            "local_relative_l2",
            METRICS["local_relative_l2"].heading,
            METRICS["local_relative_l2"].format,
            _meaning("local_relative_l2"),
            lambda m: m.local.relative_l2 if m.local else None,
        ),
        _Column(
            "local_cosine_similarity",
            "Local Cos",
            METRICS["cosine_similarity"].format,
            "cosine of F(b) and B(b)",
            lambda m: m.local.cosine_similarity if m.local else None,
        ),
        _field("cka"),
        _field("relative_l2"),
        _field("noise_floor"),
        _field("noise_floor_divergence", "Noise (Div.)", like="noise_floor"),
        _field("norm_ratio"),
        _field("unrelated_similarity"),
        _field("normalized_divergence"),
        _field("centered_cosine_similarity"),
        _field("top1_share"),
        _field("top3_share", "Top-3 share", like="top1_share"),
        _Column("finetuned_layer", "Its layer", "", "the fine-tuned model's counterpart", _counterpart),
        _Column("n_prompts", "Prompts", "", "prompts with at least one finite pair", lambda m: m.n_prompts),
    ]


def _field(name: str, heading: str = "", like: str = "") -> _Column:
    metric = METRICS[like or name]
    return _Column(
        name, heading or metric.heading, metric.format, _meaning(metric.name), lambda m: getattr(m, name)
    )


def _meaning(name: str) -> str:
    metric = METRICS[name]
    return f"{metric.formula}; {metric.range}"


def _counterpart(place: Measures) -> Value:
    return getattr(place, "finetuned_layer", None)


def _name(place: Measures) -> str:
    return place.name.replace("_", " ") if isinstance(place, SiteRecord) else str(getattr(place, "layer", ""))


def _contrast(contrast: GroupContrast) -> Row:
    ratio = None if contrast.layer is None else contrast.log_ratio[contrast.layer]
    return Row(
        f"{escaped(contrast.group_a)} against {escaped(contrast.group_b)}",
        [
            cell(contrast.layer, "", "layer"),
            cell(ratio, ".4f", "log_ratio"),
            cell(contrast.p_value, ".2g", "p_value"),
        ],
    )


def _tokens(found: Iterable[ReadoutToken]) -> list[tuple[str, Cell]]:
    return [(_seen(token.token), cell(token.score, ".2f")) for token in found]


def _seen(token: str) -> str:
    """A token that is nothing but spaces would not be seen."""
    return escaped(token) if token.strip(" ") else token.replace(" ", "␣")


_OUTPUT = (
    ("top1_agreement", METRICS["top1_agreement"].heading, ".2f", METRICS["top1_agreement"].formula),
    ("kl_base_finetuned", METRICS["kl_base_finetuned"].heading, ".4f", "nats, 0 to ∞"),
    ("kl_finetuned_base", "KL(fine-tuned‖base)", ".4f", "nats, 0 to ∞"),
    ("js", METRICS["js"].heading, ".4f", "Jensen-Shannon divergence in nats, 0 to ln 2 = 0.69"),
    (
        "base_rank_of_finetuned_top1",
        "Rank in base",
        ".2f",
        "of the fine-tuned model's first choice; 1 is agreement, and single prompts can move the mean far",
    ),
    ("logits_relative_l2", "Logits' Rel. L2", ".4f", "‖f − b‖ / ‖b‖ of the logits"),
    ("noise_floor", "Noise Floor", ".1e", "what numerical noise alone may reach, in the logits' relative L2"),
)
