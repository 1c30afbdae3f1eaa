"""What `python -m benchmarks.attribution` measures, and the page that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from msgspec import Struct

from benchmarks.trust_report import table


class Complete(Struct, frozen=True):
    """The parts of one pair, added up."""

    pair: str
    kl: float
    error: float
    n_points: int
    first: str
    share: float


class Restored(Struct, frozen=True):
    """The divergence of one pair, and what is left of it with three blocks set back to base."""

    pair: str
    kl: float
    attribution: float
    weight_change: float
    local_change: float


class Agreement(Struct, frozen=True):
    """How one number of each group goes with the exact Shapley values; Spearman's over blocks alone."""

    number: str
    groups: float | None
    """Pearson's correlation over all groups; None where only blocks have this number"""
    blocks: float
    ranks: float


class Shapley(Struct, frozen=True):
    """The exact values of a pair, and what was held against them."""

    pair: str
    kl: float
    exact: dict[str, float]
    agreements: list[Agreement]


class Alone(Struct, frozen=True):
    """The parts where one block, or one tensor, is the fine-tune's."""

    changed: str
    kl: float
    share: float
    others: float
    """the largest part of another block, without its sign"""
    error: float
    n_points: int


class Subject(Struct, frozen=True):
    """A group of prompts of a model of which two blocks were trained, each on a subject of its own."""

    training: str
    group: str
    block: int
    kl: float
    """of the group, by transformers alone"""
    own: float
    """the share of the block that was trained on the group's subject"""
    other: float


class Cost(Struct, frozen=True):
    """Seconds of one processor in rounds of all in turn, and the peaks of memory in bytes."""

    n_prompts: int
    forward: list[float] = []
    """one pass of base over the batches, up to the final norm"""
    without: list[float] = []
    """a run without an attribution"""
    attributed: list[float] = []
    peak_without: int = 0
    peak: int = 0

    @property
    def passes(self) -> list[float]:
        """Return what the attribution takes in passes of base, round by round."""
        rounds = zip(self.attributed, self.without, self.forward, strict=True)
        return [(attributed - without) / forward for attributed, without, forward in rounds]


class Results(Struct, frozen=True):
    """All that was measured."""

    completeness: list[Complete] = []
    adapter: list[Complete] = []
    alone: list[Alone] = []
    shapley: Shapley | None = None
    subjects: list[Subject] = []
    restored: list[Restored] = []
    cost: Cost | None = None


def page(results: Results) -> list[str]:
    """The measured part of docs/attribution.md."""
    return [
        *_completeness([*results.completeness, *results.adapter]),
        *_alone(results.alone),
        *_shapley(results.shapley),
        *_subjects(results.subjects),
        *_restored(results.restored),
        *_cost(results.cost),
    ]


def _completeness(rows: Sequence[Complete]) -> list[str]:
    cells = [
        [c.pair, f"{c.kl:.4f}", f"{c.error:.3%}", str(c.n_points), f"{c.first}, {c.share:.0%}"] for c in rows
    ]
    return [
        "### How exact the sum is",
        table(["pair", "KL, nats", "error of the sum", "points", "first"], cells),
    ]


def _alone(rows: Sequence[Alone]) -> list[str]:
    cells = [
        [
            a.changed,
            f"{a.kl:.5f}",
            f"{a.share:.0%}",
            "0" if a.others == 0 else f"{a.others:.1e}",
            f"{a.error:.3%}",
            str(a.n_points),
        ]
        for a in rows
    ]
    head = ["changed", "KL, nats", "share", "largest other part", "error of the sum", "points"]
    return [
        "### One block alone",
        "SmolLM2 with one block, or one tensor, of its fine-tune.",
        table(head, cells),
    ]


def _shapley(found: Shapley | None) -> list[str]:
    if found is None:
        return []
    cells = [
        [a.number, "–" if a.groups is None else f"{a.groups:.3f}", f"{a.blocks:.3f}", f"{a.ranks:.2f}"]
        for a in found.agreements
    ]
    head = ["number", "Pearson, all groups", "Pearson, blocks", "Spearman, blocks"]
    return [
        "### Exact Shapley values",
        f"The {found.pair}: KL of all {2 ** len(found.exact):,} hybrids of {len(found.exact)} groups, and "
        "how other numbers go with the Shapley values that they give.",
        table(head, cells),
    ]


def _subjects(rows: Sequence[Subject]) -> list[str]:
    cells = [
        [s.training, s.group, f"{s.kl:.4f}", str(s.block), f"{s.own:.1%}", f"{s.other:.1%}"] for s in rows
    ]
    head = ["training", "prompts of", "KL, nats", "its block", "share of its block", "share of the other"]
    return [
        "### Two blocks, two subjects",
        "One block of SmolLM2 is trained on lines of arithmetic, another on invented facts, each from base; "
        "both are put into one model. With a penalty, KL(base‖trained) on the other subject's text is added "
        "to the loss, so that a block learns its own subject alone.",
        table(head, cells),
    ]


def _restored(rows: Sequence[Restored]) -> list[str]:
    cells = [
        [r.pair, *(f"{value:.4f}" for value in (r.kl, r.attribution, r.weight_change, r.local_change))]
        for r in rows
    ]
    beats = [
        sum(r.attribution <= getattr(r, other) for r in rows) for other in ("weight_change", "local_change")
    ]
    both = sum(r.attribution <= min(r.weight_change, r.local_change) for r in rows)
    return [
        "### What restoring gains",
        "The KL that is left where three blocks are set back to base: the three that attribution names, the "
        "three with the largest relative change of their weights, and the three with the largest local "
        f"change. Of {len(rows)} pairs attribution leaves no more than the change of the weights in "
        f"{beats[0]}, no more than the local change in {beats[1]}, and no more than either in {both}.",
        table(["pair", "KL", "by attribution", "by weight change", "by local change"], cells),
    ]


def _cost(found: Cost | None) -> list[str]:
    if found is None:
        return []
    passes, mib = found.passes, 2**20
    return [
        "### What it costs",
        f"`--attribute blocks` on {found.n_prompts} prompts of SmolLM2 in float32, one thread, beyond a run "
        f"without: {median(passes):.1f} passes of base ({min(passes):.1f} to {max(passes):.1f} in "
        f"{len(passes)} rounds). Peak memory is {found.peak / mib:.0f} MiB, "
        f"{found.peak / found.peak_without:.2f} times the {found.peak_without / mib:.0f} MiB of a run "
        "without.",
    ]
