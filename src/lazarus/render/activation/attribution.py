"""Who caused the change of the output: a line, bars, a map, and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazarus.render.activation.tensor_map import TensorMap
from lazarus.render.base.cells import Heading, Row, Table, cell
from lazarus.render.base.escape import escaped
from lazarus.results import METRICS, ActivationDiffRecord, AttributedGroup, Attribution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 3
"""how many groups the summary names"""
POSITIVE, NEGATIVE = "#2563A6", "#B45309"
_FORMAT = METRICS["nats"].format


def nats_by_layer(record: ActivationDiffRecord) -> list[float | None]:
    """Return the part of every block in KL(base‖fine-tuned), in nats; None where it was not measured."""
    if record.attribution is None:
        return [None] * len(record.layers)
    found: list[float | None] = record.results.column("nats").mean(axis=0).tolist()
    return found


def attribution_lines(record: ActivationDiffRecord) -> list[str]:
    """Return in one line who caused the change, what it adds up to, and what restoring shows."""
    found = record.attribution
    if found is None:
        return []
    if not found.groups:
        return ["Who caused it: no weight changed"]
    if record.summary.verdict == "within_noise":
        return ["Who caused it: not told, because the change is within the noise"]
    ranked = _ranked(found.groups)
    named = ", ".join(f"{escaped(group.name)} {_nats(group.nats)}" for group in ranked[:NAMED])
    others = sum(group.nats for group in ranked[NAMED:])
    n_others = len(ranked) - NAMED
    rest = f", {n_others} other{'s' if n_others > 1 else ''} {_nats(others)}" if n_others > 0 else ""
    line = (
        f"Who caused it: {named}{rest}: together {_nats(found.sum)} of KL {_nats(found.kl)} nats "
        f"(error {found.completeness_error:.2%}, {found.n_points} points)"
    )
    if found.restored:
        last = found.restored[-1]
        what = escaped(last.groups[0]) if len(last.groups) == 1 else f"the first {len(last.groups)}"
        line += f"; with {what} set back to base {_nats(last.kl)} is left"
    return [line]


def attribution_table(record: ActivationDiffRecord) -> Table | None:
    """Return every group, the largest part first; None without an attribution."""
    found = record.attribution
    if found is None or not found.groups:
        return None
    return Table(
        caption="Each part of KL(base‖fine-tuned), the largest first",
        headings=[
            Heading("Group"),
            Heading("Nats", METRICS["nats"].formula),
            Heading("Share", "of the sum"),
            Heading("95 % from", "over prompts"),
            Heading("to"),
        ],
        rows=[
            Row(
                escaped(group.name),
                [
                    cell(group.nats, _FORMAT, "nats"),
                    cell(group.share, ".1%"),
                    cell(group.interval and group.interval[0], _FORMAT),
                    cell(group.interval and group.interval[1], _FORMAT),
                ],
            )
            for group in _ranked(found.groups)
        ],
    )


@dataclass(frozen=True)
class Bar:
    """A bar of the report's chart, in percent of its width; those below 0 go to the left."""

    name: str
    start: float
    width: float
    is_negative: bool
    told: str


def bars(record: ActivationDiffRecord) -> list[Bar]:
    """Return a bar for each block and for what is outside the blocks, in the order of the model."""
    found = record.attribution
    if found is None:
        return []
    parts: dict[str, float] = {}
    for group in found.groups:
        name = group.name if group.layer is None else f"block {group.layer}"
        parts[name] = parts.get(name, 0.0) + group.nats
    low, high = min(0.0, *parts.values(), 0.0), max(0.0, *parts.values(), 0.0)
    scale = 100 / ((high - low) or 1.0)
    return [
        Bar(escaped(name), (min(nats, 0.0) - low) * scale, abs(nats) * scale, nats < 0, _nats(nats))
        for name, nats in parts.items()
    ]


def draw_attribution(found: Attribution, axes: Axes) -> None:
    """Draw a bar for each group, in the order of the model; of single tensors a map, components by layers."""
    tensors = TensorMap.of(found)
    if tensors is None:
        _draw_bars(found, axes)
    else:
        _draw_map(tensors, axes)


def _draw_bars(found: Attribution, axes: Axes) -> None:
    names = [group.name.removeprefix("block ") for group in found.groups]
    nats = [group.nats for group in found.groups]
    colours = [POSITIVE if value >= 0 else NEGATIVE for value in nats]
    axes.bar(range(len(nats)), nats, color=colours, width=0.7)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small", parse_math=False)
    axes.set_ylabel("Part of the KL (nats)")
    axes.set_xlabel(f"Block, and what is outside the blocks; sum {_nats(found.sum)}, KL {_nats(found.kl)}")


def _draw_map(tensors: TensorMap, axes: Axes) -> None:
    import matplotlib

    components, values, most = tensors.components, tensors.values, tensors.most
    colours = matplotlib.colormaps["PuOr_r"].with_extremes(bad="#C0C0C0")
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=-most, vmax=most, interpolation="none")
    axes.set_yticks(range(len(components)), components, fontsize="small", parse_math=False)
    axes.set_xlabel("Layer")
    axes.figure.colorbar(image, ax=axes, label="Part of the KL (nats)")


def _ranked(groups: Sequence[AttributedGroup]) -> list[AttributedGroup]:
    return sorted(groups, key=lambda group: -group.nats)


def _nats(value: float) -> str:
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.0001 else f"{value:.1e}"
