"""What is inside the blocks: a line, curves of each sublayer over the layers, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lazarus.render.base.cells import Heading, Row, Table, cell
from lazarus.render.base.words import short, times
from lazarus.results import METRICS, ActivationDiffRecord, ComponentRecord

_NAMES = {"attn_out": "attention output", "mlp_out": "MLP output", "router": "router"}
_WIDTH, _HEIGHT = 640.0, 200.0


def component_lines(record: ActivationDiffRecord) -> list[str]:
    """Return in one line which component changed most, and whether experts flip."""
    if record.components is None:
        return []
    found = [(each.divergence, each) for each in record.components if each.divergence is not None]
    if not found:
        return ["Inside the blocks: nothing could be compared"]
    divergence, largest = max(found, key=lambda each: each[0])
    if not divergence:
        return ["Inside the blocks: no component changes" + _flips(record.components)]
    told = f"Inside the blocks: the {_NAMES[largest.name]} of block {largest.layer} diverges most"
    floor = largest.noise_floor_divergence
    ratio = f", {times(divergence / floor)} the noise floor" if floor else ""
    return [f"{told} ({short(divergence)}{ratio}){_own(record.components)}{_flips(record.components)}"]


def _own(components: Sequence[ComponentRecord]) -> str:
    """Return which component changes most by its own weights, where that was measured."""
    changes = [(each.local.relative_l2 or 0.0, each) for each in components if each.local is not None]
    change, each = max(changes, key=lambda found: found[0], default=(0.0, None))
    if each is None or not change:
        return ""
    return (
        f"; by its own weights, the {_NAMES[each.name]} of block {each.layer} changes most ({short(change)})"
    )


def _flips(components: Sequence[ComponentRecord]) -> str:
    """Return where most tokens flip, among the routers above the noise if there are any, and its weight."""
    routers = [each for each in components if each.flipped_share is not None]
    if not routers:
        return ""
    above = [each for each in routers if (each.flipped_share or 0) > _floor(each)]
    router = max(above or routers, key=lambda each: each.flipped_share or 0)
    if not router.flipped_share:
        return "; no token is sent to another expert"
    noise = "" if router.flipped_share_noise is None else f" (noise: up to {router.flipped_share_noise:.1%})"
    share = router.flipped_change_share
    weight = "" if share is None else f", where {share:.0%} of that block's change is"
    return (
        f"; experts flip at {router.flipped_share:.1%} of the tokens in block {router.layer}{noise}{weight}"
    )


def _floor(router: ComponentRecord) -> float:
    return 1.0 if router.flipped_share_noise is None else router.flipped_share_noise


def components_table(record: ActivationDiffRecord) -> Table | None:
    """Return every component, layer by layer; None where none was compared."""
    found = record.components or []
    has_local = any(each.local is not None for each in found)
    metrics = [METRICS[name] for name in ("divergence", "relative_l2", "norm_ratio", "noise_floor")]
    local = METRICS["local_relative_l2"]
    headings = [Heading(metric.heading, metric.formula) for metric in (*metrics, *[local][:has_local])]
    rows = [
        Row(
            f"{each.layer} {each.name}",
            [
                *(cell(getattr(each, metric.name), metric.format, metric.name) for metric in metrics),
                *[cell(each.local.relative_l2 if each.local else None, local.format, local.name)][:has_local],
            ],
        )
        for each in found
    ]
    caption = "What is inside each block, as a mean over prompts"
    return Table(caption, [Heading("Component"), *headings], rows) if rows else None


def experts_table(record: ActivationDiffRecord) -> Table | None:
    """Return the experts that each router picks; None where there are none, or they could not be seen."""
    routers = [each for each in record.components or [] if each.expert_agreement is not None]
    columns = (
        ("expert_agreement", "Agreement", "experts that both models pick, of those that one picks"),
        ("expert_agreement_noise", "Noise", "down to which noise alone may bring the agreement"),
        ("flipped_share", "Flipped", "tokens of which a picked expert differs"),
        ("flipped_share_noise", "Noise", "what noise alone may reach"),
        ("flipped_change_share", "Of the change", "share of the block's squared change at these tokens"),
        ("flipped_change_share_noise", "Noise", "the largest such share in a trial of the noise"),
    )
    rows = [
        Row(str(each.layer), [cell(getattr(each, field), ".1%", field) for field, _, _ in columns])
        for each in routers
    ]
    headings = [Heading("Router of block"), *(Heading(name, meaning) for _, name, meaning in columns)]
    return Table("The experts that are picked", headings, rows) if rows else None


@dataclass(frozen=True)
class Curve:
    """A line of the report's picture; a part of it ends where a layer has no value."""

    name: str
    kind: str
    parts: Sequence[str]
    """the points of each part, as SVG has them"""


@dataclass(frozen=True)
class Curves:
    """The divergence of each sublayer over the layers."""

    lines: Sequence[Curve]
    most: str
    """the value at the upper edge"""
    last_layer: int


def component_curves(record: ActivationDiffRecord) -> Curves | None:
    """Return the curves of attention and MLP, and their noise floors; None where nothing was measured."""
    found = [each for each in record.components or [] if each.name != "router"]
    values = [each.divergence for each in found if each.divergence is not None]
    if not values:
        return None
    most, n_layers = max(values) or 1.0, len(record.layers)

    def parts(name: str, field: str) -> list[str]:
        at = {each.layer: getattr(each, field) for each in found if each.name == name}
        runs: list[list[str]] = [[]]
        for layer in range(n_layers):
            value = at.get(layer)
            if value is None:
                runs.append([])
            else:
                x, y = _WIDTH * (layer + 0.5) / n_layers, _HEIGHT * (1 - min(value / most, 1.0))
                runs[-1].append(f"{x:.1f},{y:.1f}")
        return [" ".join(run) for run in runs if run]

    lines = [
        Curve(_NAMES[name] + told, f"{name} {kind}".strip(), parts(name, field))
        for name in ("attn_out", "mlp_out")
        for field, told, kind in (
            ("divergence", "", ""),
            ("noise_floor_divergence", ", noise floor", "floor"),
        )
    ]
    return Curves([line for line in lines if line.parts], short(most), n_layers - 1)
